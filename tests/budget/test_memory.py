"""The memory of an update in `relora plan`, against the memory that torch allocates."""

from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import most_allocated_bytes
from small import TINY

from relora.config.compose import compose
from relora.config.peak import USABLE_SHARE, Phases
from relora.config.plan import Device, run_plan
from relora.config.run import RunConfig
from relora.core.lowrank import low_rank_layers
from relora.data.sequences import TokenSequences
from relora.methods.lora import LoRA
from relora.runs.metrics import Broadcast
from relora.training.distributed import World
from relora.training.model import build
from relora.training.trainer import Trainer

pytestmark = pytest.mark.slow


LENGTH = 128
IN_BACKWARD = ["trainer.update_in_backward=true", "optimizer.max_grad_norm=null"]
SIZES = ["hidden_size=128", "intermediate_size=344", "layers=3", "heads=4"]


def config_of(method: str, *overrides: str) -> RunConfig:
    ours = [item for item in TINY if not item.startswith(("model", "method"))]
    return compose(
        [
            *(f"model.{size}" for size in SIZES),
            *ours,
            f"method={method}",
            f"data.sequence_length_tokens={LENGTH}",
            "trainer.sequences_per_step=16",
            *overrides,
        ]
    )


def trainer_of(config: RunConfig, folder: Path) -> Trainer:
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    path = folder / "tokens.bin"
    length = config.data.sequence_length_tokens
    count = length * 40 + 1
    path.write_bytes((np.arange(count) * 7 % vocab_size).astype(np.uint16).tobytes())
    starts = None if config.data.attend_across_documents else path.with_name("tokens.starts")
    if starts is not None:
        np.arange(0, count, 50).astype("<u8").tofile(starts)
    sequences = TokenSequences(path, "uint16", length, starts=starts)
    return Trainer(
        config,
        build(config.model, config.trained_shape(vocab_size), end_of_text_id=0, seed=0),
        sequences,
        sequences,
        Broadcast([]),
        vocab_size=vocab_size,
        checkpoint_folder=folder / "checkpoints",
        device=torch.device("cpu"),
    )


def kept_bytes(trainer: Trainer) -> int:
    """Weights, merged weights, positions of sparse values, optimizer state, and what several ranks send."""
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    merged = [layer._merged for _, layer in low_rank_layers(trainer.model) if layer._merged is not None]
    sent = [] if trainer.micro._buffer is None else [trainer.micro._buffer]
    sent += [buffer for name, buffer in trainer.model.named_buffers() if name.endswith(".support")]
    return sum(each.numel() * each.element_size() for each in [*trainer.model.parameters(), *state, *merged, *sent])


SETTINGS: tuple[tuple[str, list[str]], ...] = (
    ("full", []),
    ("full", ["trainer.activation_checkpointing=true"]),
    ("full", ["trainer.sequences_per_micro_step=4"]),
    ("full", ["data.attend_across_documents=false", "trainer.sequences_per_micro_step=4"]),
    ("full", ["data.attend_across_documents=false", "trainer.activation_checkpointing=true"]),
    ("lora", ["method.rank=16", "data.attend_across_documents=false"]),
    ("full", ["model.kv_heads=1"]),
    ("lora", ["method.rank=16", "model.kv_heads=2", "trainer.activation_checkpointing=true"]),
    ("full", ["model.kv_heads=1", "data.attend_across_documents=false"]),
    ("lora", ["method.rank=16"]),
    ("lora", ["method.rank=16", "method.merged_weight=rebuilt"]),
    ("lora", ["method.rank=16", "method.merged_weight=never"]),
    ("lora", ["method.rank=16", "method.dropout=0.1"]),
    ("lora", ["method.rank=64", "trainer.activation_checkpointing=true"]),
    ("lora", ["method.rank=16", "trainer.sequences_per_micro_step=4"]),
    ("lora", ["method.rank=16", "model.vocab_size=20000", "trainer.sequences_per_micro_step=8"]),
    ("full", ["model.vocab_size=20000", "trainer.sequences_per_micro_step=1"]),
    ("full", IN_BACKWARD),
    ("full", [*IN_BACKWARD, "trainer.activation_checkpointing=true"]),
    ("lora", ["method.rank=16", *IN_BACKWARD]),
    ("lora", ["method.rank=64", "method.merged_weight=rebuilt", *IN_BACKWARD]),
    ("full", ["model.vocab_size=20000", *IN_BACKWARD]),
    ("full", ["model.vocab_size=20000", "trainer.sequences_per_step=2", *IN_BACKWARD]),
    ("galore", ["method.rank=16", *IN_BACKWARD]),
    ("galore", ["method.rank=16", "model.vocab_size=20000", "trainer.sequences_per_step=2", *IN_BACKWARD]),
    ("fira", ["method.rank=16", *IN_BACKWARD]),
    ("apollo", ["method.rank=16", *IN_BACKWARD]),
    ("lora", ["method.rank=16", "method.merged_weight=never", "method.trainable_scaling=true"]),
    ("lora", ["method.rank=16", "method.dropout=0.1", "method.trainable_scaling=true"]),
    ("lora", ["method.rank=16", "method.merged_weight=rebuilt", "trainer.sequences_per_micro_step=1"]),
    ("lora", ["method.rank=16", "trainer.sequences_per_step=1", "data.sequence_length_tokens=96"]),
    ("full", ["model.vocab_size=140000", "trainer.sequences_per_step=1"]),
    ("control", ["method.rank=16"]),
    ("lowrank", ["method.rank=16"]),
    ("lowrank", ["method.rank=16", "trainer.activation_checkpointing=true", "trainer.sequences_per_micro_step=4"]),
    ("lowrank", ["method.rank=64", *IN_BACKWARD]),
    ("cola", ["method.rank=32"]),
    ("cola", ["method.rank=32", "trainer.activation_checkpointing=true"]),
    ("cola", ["method.rank=32", "trainer.activation_checkpointing=true", "trainer.sequences_per_micro_step=4"]),
    ("cola", ["method.rank=64", *IN_BACKWARD]),
    ("sltrain", ["method.rank=16"]),
    ("sltrain", ["method.rank=16", "trainer.activation_checkpointing=true", "trainer.sequences_per_micro_step=4"]),
    ("sltrain", ["method.rank=64", "trainer.sequences_per_step=1", *IN_BACKWARD]),
    ("galore", ["method.rank=16"]),
    ("galore", ["method.rank=16", "model.vocab_size=20000", "trainer.sequences_per_step=2"]),
    ("fira", ["method.rank=16"]),
    ("apollo", ["method.rank=16"]),
    ("apollo_mini", []),
)
PRECISIONS = ("fp32", "bf16", "bf16_autocast")


def cases() -> list[tuple[str, list[str], str]]:
    """The first setting of each method in every precision, and each other setting in one of them, in turn."""
    first = {method: number for number, (method, _) in reversed(list(enumerate(SETTINGS)))}
    return [
        (method, settings, precision)
        for number, (method, settings) in enumerate(SETTINGS)
        for place, precision in enumerate(PRECISIONS)
        if number == first[method] or number % len(PRECISIONS) == place
    ]


@pytest.mark.parametrize(("method", "settings", "precision"), cases())
def test_the_peak_of_an_update_is_within_5_percent_of_the_plan(
    method: str, settings: list[str], precision: str, tmp_path: Path
) -> None:
    config = config_of(method, "model.vocab_size=500", f"trainer.precision={precision}", *settings)
    trainer = trainer_of(config, tmp_path)
    trainer.model.train()
    trainer.begin_method(0)

    def update(step: int) -> None:
        trainer.update(step, trainer.forward_backward(step))
        trainer.refresh()

    update(0)
    kept = kept_bytes(trainer)
    measured = kept + most_allocated_bytes(lambda: update(1))
    planned = run_plan(config)
    assert isinstance(trainer.method, LoRA) == (method == "lora")
    assert planned.weight_bytes + planned.merged_weight_bytes + planned.optimizer_bytes == kept
    assert planned.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("method", "settings", "precision"),
    [
        ("full", [], "fp32"),
        ("full", ["trainer.activation_checkpointing=true"], "bf16"),
        ("lora", ["method.rank=16"], "bf16_autocast"),
        ("lora", ["method.rank=16", "data.attend_across_documents=false"], "bf16"),
        ("galore", ["method.rank=16", "model.vocab_size=20000"], "fp32"),
        ("cola", ["method.rank=32"], "bf16"),
    ],
)
def test_the_chosen_micro_step_fits_into_the_device(
    method: str, settings: list[str], precision: str, tmp_path: Path
) -> None:
    settings = ["model.vocab_size=500", f"trainer.precision={precision}", *settings]
    config = config_of(method, *settings)
    assert config.model.vocab_size is not None
    phases = Phases(config=config, vocab_size=config.model.vocab_size)
    device_bytes = round(phases.peak_bytes(4) / USABLE_SHARE) + 1
    config = config_of(method, *settings, f"plan.device_memory={device_bytes}")
    device = Device(memory_bytes=device_bytes, name="given", is_gpu=False)
    trainer = trainer_of(config, tmp_path)
    assert trainer.micro.sequences_per_micro_step == run_plan(config, device=device).sequences_at_a_time == 4
    trainer.model.train()
    trainer.begin_method(0)

    def update(step: int) -> None:
        trainer.update(step, trainer.forward_backward(step))
        trainer.refresh()

    update(0)
    measured = kept_bytes(trainer) + most_allocated_bytes(lambda: update(1))
    assert 0.8 * device_bytes < measured < device_bytes


@pytest.mark.parametrize("method", ["full", "lora", "galore", "sltrain", "cola"])
def test_a_checkpoint_is_as_large_as_planned(method: str, tmp_path: Path) -> None:
    rank = [] if method == "full" else ["method.rank=16"]
    config = config_of(method, "model.vocab_size=5000", "trainer.sequences_per_step=2", *rank)
    trainer = trainer_of(config, tmp_path)
    trainer.model.train()
    trainer.begin_method(0)
    trainer.update(0, trainer.forward_backward(0))
    trainer.save(1)
    (file,) = (tmp_path / "checkpoints").iterdir()
    assert run_plan(config).checkpoint_bytes == pytest.approx(file.stat().st_size, rel=0.03)


class Two(World):
    """One of two ranks. It allocates its buffers to send and to receive, and needs no second rank."""

    def _all_reduce(self, tensor: torch.Tensor) -> None: ...


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_rank_is_that_of_its_share(precision: str, size: int, tmp_path: Path) -> None:
    cluster = ["cluster=slurm", "cluster.nodes=2", "model.vocab_size=20000", "trainer.sequences_per_step=8"]
    cluster += [f"trainer.sequences_per_micro_step={size}"]
    config = config_of("lora", "method.rank=16", f"trainer.precision={precision}", *cluster)
    trainer = trainer_of(config, tmp_path)
    trainer.micro.world, trainer.micro.share, trainer.micro.sequences_per_micro_step = Two(rank=0, size=2), 4, size
    trainer.model.train()
    trainer.begin_method(0)

    def gradient() -> None:
        trainer.update(0, trainer.forward_backward(0))
        trainer.refresh()

    gradient()
    measured = kept_bytes(trainer) + most_allocated_bytes(gradient)
    assert run_plan(config).peak_bytes == pytest.approx(measured, rel=0.05)
