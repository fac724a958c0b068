"""A trainer on a few made-up tokens, with a tracker and stops for tests."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from small import TINY
from torch import Tensor, nn

from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.data.sequences import PaddedSequences, TokenSequences
from relora.runs.metrics import Progress
from relora.training.model import build, summed_cross_entropy
from relora.training.trainer import Trainer

VOCAB = 64


class Recorder:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.said: list[str] = []
        self.progressed: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        self.progressed.append(progress)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.setdefault(step, {}).update(metrics)

    def log_line(self, message: str) -> None:
        self.said.append(message)

    def flush(self) -> None:
        pass


def config_of(*overrides: str) -> RunConfig:
    return compose([*TINY, *overrides])


def tokens(folder: Path, name: str, count: int) -> TokenSequences:
    """A noisy cycle through the vocabulary: learnable, and no two sequences are equal."""
    chance = np.random.default_rng(len(name))
    values = (np.arange(count) * 3 + chance.integers(0, 3, count)) % VOCAB
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.bin"
    path.write_bytes(values.astype(np.uint16).tobytes())
    return TokenSequences(path, "uint16", 16)


END_OF_TEXT = 0


def write_documents(folder: Path, name: str, lengths: Sequence[int]) -> list[list[int]]:
    """Write documents of these lengths in tokens to NAME.bin and NAME.starts, and return their tokens.

    A document ends with the end-of-text token, which counts in its length.
    """
    chance = np.random.default_rng(sum(lengths) + len(name))
    made = [[*chance.integers(1, VOCAB, length - 1).tolist(), END_OF_TEXT] for length in lengths]
    folder.mkdir(exist_ok=True)
    np.array([token for document in made for token in document], dtype="<u2").tofile(folder / f"{name}.bin")
    np.cumsum([0, *lengths[:-1]]).astype("<u8").tofile(folder / f"{name}.starts")
    return made


def padded(folder: Path, name: str, length: int = 16) -> PaddedSequences:
    """The documents of `write_documents`, one in each sequence."""
    return PaddedSequences(folder / f"{name}.bin", "uint16", length, starts=folder / f"{name}.starts")


def within_documents(folder: Path, name: str, length: int = 16) -> TokenSequences:
    """The documents of `write_documents`, packed. Attention stays within a document."""
    return TokenSequences(folder / f"{name}.bin", "uint16", length, starts=folder / f"{name}.starts")


def trainer_of(config: RunConfig, folder: Path, **changes) -> Trainer:
    parts = {
        "model": build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=config.trainer.seed),
        "training": tokens(folder, "training", 1500),
        "validation": tokens(folder, "validation", 200),
        "tracker": Recorder(),
        "vocab_size": VOCAB,
        "checkpoint_folder": folder / "checkpoints",
        "device": torch.device("cpu"),
        **changes,
    }
    trainer = Trainer(config, **parts)
    if isinstance(trainer.stop, stop_after):
        trainer.update = trainer.stop.counting(trainer.update)  # type: ignore[method-assign]
    return trainer


class stop_after:  # noqa: N801 -- used as a function
    """A stop that is requested when a trainer of `trainer_of` has made `steps` updates."""

    def __init__(self, steps: int) -> None:
        self.steps, self.made = steps, 0

    def counting(self, update: Callable[..., None]) -> Callable[..., None]:
        def counted(*args) -> None:
            update(*args)
            self.made += 1

        return counted

    def __call__(self) -> str | None:
        return "test" if self.made == self.steps else None


def stop_in_validation(batches: int, monkeypatch: pytest.MonkeyPatch):
    """A stop that is requested when `batches` batches are evaluated."""
    done: list[int] = []

    def counted(model, inputs_BxT, targets_BxT, **settings):
        done.append(len(inputs_BxT))
        return summed_cross_entropy(model, inputs_BxT, targets_BxT, **settings)

    monkeypatch.setattr("relora.training.evaluate.summed_cross_entropy", counted)
    return lambda: "test" if len(done) >= batches else None, done


def assert_equal_states(one: Trainer, other: Trainer) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    old, new = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert old["param_groups"] == new["param_groups"]
    for number, state in old["state"].items():
        for name, value in state.items():
            assert torch.equal(value, new["state"][number][name]), (number, name)


class OutOfMemory(nn.Module):
    """A model that fails above `limit` sequences at a time: by a real failed allocation, or by CUDA's exception."""

    def __init__(self, model: nn.Module, limit: int, kind: str) -> None:
        super().__init__()
        self.inner, self.limit, self.kind = model, limit, kind
        self.limit_of_evaluation = 10_000

    def forward(self, input_ids: Tensor, **settings):
        if len(input_ids) > (self.limit if self.training else self.limit_of_evaluation):
            if self.kind == "cpu":
                torch.empty(1 << 55, dtype=torch.uint8)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(input_ids=input_ids, **settings)


WITHOUT_METHOD = tuple(override for override in TINY if not override.startswith("method"))
