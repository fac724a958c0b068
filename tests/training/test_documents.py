"""Padded sequences and attention within documents, against a loop over the documents one by one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import (
    VOCAB,
    WITHOUT_METHOD,
    Recorder,
    assert_equal_states,
    config_of,
    padded,
    stop_after,
    tokens,
    trainer_of,
    within_documents,
    write_documents,
)
from transformers import AutoModelForCausalLM, BloomConfig

from relora.common.errors import RunError
from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.data.sequences import Batch, Sequences
from relora.runs import checkpoint
from relora.runs.metrics import MetricsLog, read_rows
from relora.training.evaluate import evaluate
from relora.training.model import build, precision_context, summed_cross_entropy
from relora.training.trainer import Interrupted, Trainer

pytestmark = pytest.mark.slow

LENGTHS = [3, 30, 1, 7, 16, 17, 18, 2, 12, 5, 40, 9, 1, 4, 25, 11, 6, 8, 33, 10, 2, 14]
"""Of documents that are shorter and longer than a sequence of 16 tokens. Two have nothing to predict."""
PAD, WITHIN = "data.packing=pad", "data.attend_across_documents=false"
OPENED: dict[str, Callable[..., Sequences]] = {PAD: padded, WITHIN: within_documents}


Reading = tuple[list[int], list[int]]
"""Tokens that one forward pass of the reference reads, and their targets."""


def readings_of_padded(documents: Sequence[list[int]], length: int) -> list[list[Reading]]:
    """Return the readings of each sequence: a document."""
    whole = [document[: length + 1] for document in documents if len(document) > 1]
    return [[(document[:-1], document[1:])] for document in whole]


def readings_within(documents: Sequence[list[int]], length: int) -> list[list[Reading]]:
    """Return the readings of each sequence: the parts of its documents. The targets may be in the next document."""
    text = [token for document in documents for token in document]
    begins = {0, *np.cumsum([len(document) for document in documents]).tolist()}
    found = []
    for first in range(0, len(text) - length, length):
        cuts = [first, *sorted(begins & set(range(first + 1, first + length))), first + length]
        found.append([(text[a:b], text[a + 1 : b + 1]) for a, b in pairwise(cuts)])
    return found


READINGS = {PAD: readings_of_padded, WITHIN: readings_within}


def loss_of(model: nn.Module, readings: Sequence[Reading]) -> Tensor:
    """Sum the losses of Hugging Face's own forward pass, one document at a time."""
    losses = []
    for inputs, targets in readings:
        logits = model(input_ids=torch.tensor([inputs]), use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits, torch.tensor(targets), reduction="sum"))
    return torch.stack(losses).sum()


def targets_in(readings: Sequence[Reading]) -> int:
    return sum(len(targets) for _, targets in readings)


def in_float64(kind: str = "sdpa") -> nn.Module:
    config = config_of()
    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0).double()
    model.set_attn_implementation(kind)  # type: ignore[operator]
    return model


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def full_rank(*overrides: str) -> RunConfig:
    return compose([*WITHOUT_METHOD, "method=full", *overrides])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    """A folder with a training and a validation text, and their documents."""
    folder = tmp_path_factory.mktemp("written")
    return folder, {name: write_documents(folder, name, LENGTHS) for name in ("training", "validation")}


def data_of(folder: Path, packing: str) -> dict[str, Any]:
    """Arguments of `trainer_of`."""
    return {name: OPENED[packing](folder, name) for name in ("training", "validation")}


# ------------------------------------------------------------------------------------ one batch, in double precision


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8).filter(lambda drawn: max(drawn) >= 2),
    length=st.integers(2, 12),
    micro=st.integers(1, 4),
    kind=st.sampled_from(["sdpa", "eager"]),
    packing=st.sampled_from([PAD, WITHIN]),
    recompute=st.booleans(),
)
def test_a_batch_has_the_loss_and_the_gradient_of_its_documents_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    length: int,
    micro: int,
    kind: str,
    packing: str,
    recompute: bool,
) -> None:
    """With "eager", the full logits are computed, as for a model that relora did not build."""
    folder = tmp_path_factory.mktemp("drawn")
    if packing == WITHIN:
        lengths = [*lengths, length + 1]
    documents = write_documents(folder, "drawn", lengths)
    data, model = OPENED[packing](folder, "drawn", length), in_float64(kind)
    batch = data.batch(np.arange(data.count, dtype=np.int64))
    losses = [
        summed_cross_entropy(model, part.inputs_BxT, part.targets_BxT, positions_BxT=part[2], recompute=recompute)
        for part in batch.split(micro)
    ]
    readings = [each for sequence in READINGS[packing](documents, length) for each in sequence]
    loss, expected = torch.stack(losses).sum(), loss_of(model, readings)
    assert batch.target_tokens == data.target_tokens == targets_in(readings)
    exact = 1e-12 if kind == "sdpa" else 1e-6  # relora computes the loss of full logits in fp32
    assert loss.item() == pytest.approx(expected.item(), rel=exact)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=exact * 1e2)


@pytest.mark.parametrize(("kind", "exact"), [("sdpa", 1e-12), ("eager", 1e-6)])
def test_the_token_after_a_document_is_predicted_too(kind: str, exact: float, tmp_path: Path) -> None:
    """Attention within documents predicts all that padding predicts, and the first token of each next document."""
    documents = write_documents(tmp_path, "t", [5, 9, 2, 17])
    model = in_float64(kind)
    packed, alone = within_documents(tmp_path, "t", 32), padded(tmp_path, "t", 32)
    first, every = np.array([0], dtype=np.int64), np.arange(4, dtype=np.int64)
    of_packed = summed_cross_entropy(model, *packed.batch(first)[:2], positions_BxT=packed.batch(first)[2])
    of_padded = summed_cross_entropy(model, *alone.batch(every)[:2])
    after = [(document, following[0]) for document, following in pairwise(documents)]
    kept = [
        F.cross_entropy(model(input_ids=torch.tensor([document])).logits[0, -1], torch.tensor(target))
        for document, target in after
    ]
    assert packed.target_tokens == alone.target_tokens + 3
    assert of_packed.item() == pytest.approx((of_padded + torch.stack(kept).sum()).item(), rel=exact)


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16"])
def test_in_bf16_attention_stays_within_a_document(tmp_path: Path, precision: str) -> None:
    """Other tokens in the documents before do not change the logits of a document by one bit."""
    write_documents(tmp_path, "t", [40, 60, 29])
    inputs, targets, positions = within_documents(tmp_path, "t", 128).batch(np.array([0], dtype=np.int64))
    config = config_of()
    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    targets = targets.where(torch.arange(128) >= 100, -100)
    changed = inputs.where(torch.arange(128) >= 100, (inputs + 1) % VOCAB)
    with precision_context(precision, torch.device("cpu")), torch.no_grad():
        losses = [summed_cross_entropy(model, each, targets, positions_BxT=positions) for each in (inputs, changed)]
        across = [summed_cross_entropy(model, each, targets) for each in (inputs, changed)]
    assert losses[0].item() == losses[1].item()
    assert across[0].item() != across[1].item()


def test_a_model_without_positions_is_refused() -> None:
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    inputs = torch.ones(1, 8, dtype=torch.int64)
    assert summed_cross_entropy(model, inputs, inputs).isfinite()
    with pytest.raises(RunError, match=r"attend_across_documents=false .* BloomForCausalLM accepts none; set it to tr"):
        summed_cross_entropy(model, inputs, inputs, positions_BxT=torch.zeros_like(inputs))


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("micro", [1, 2, 3, 4])
@pytest.mark.parametrize("packing", [PAD, WITHIN])
def test_a_run_equals_a_plain_loop_over_documents(
    packing: str, micro: int, written: tuple[Path, dict[str, list[list[int]]]], tmp_path: Path
) -> None:
    folder, documents = written
    batch_size = "trainer.sequences_per_step=12"
    config = full_rank(packing, batch_size, f"trainer.sequences_per_micro_step={micro}")
    trainer = trainer_of(config, tmp_path, **data_of(folder, packing))
    trainer.train()
    rows = trainer.tracker.rows  # type: ignore[attr-defined]

    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, fused=True)
    sequences = READINGS[packing](documents["training"], 16)
    seen = 0
    for step in range(14):
        drawn = trainer.training._numbers(step * 12, 12, 0).tolist()
        readings = [each for number in drawn for each in sequences[number]]
        loss = loss_of(model, readings) / targets_in(readings)
        loss.backward()
        seen += targets_in(readings)
        row = rows[step + 1]
        assert row["train/loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert row["progress/tokens"] == seen
        assert row["progress/flops"] == (step + 1) * trainer.reporter.method_cost.flops_per_update(12 * 16)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = row["train/lr"]
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), plain in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=2e-5, rtol=1e-3), name
    held_out = [each for sequence in READINGS[packing](documents["validation"], 16) for each in sequence]
    with torch.no_grad():
        mean = loss_of(model, held_out).item() / targets_in(held_out)
    assert rows[14]["eval/loss"] == pytest.approx(mean, rel=2e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("packing", [PAD, WITHIN])
def test_an_evaluation_is_the_mean_over_the_tokens_of_every_document(
    packing: str, batch_size: int, written: tuple[Path, dict[str, list[list[int]]]]
) -> None:
    folder, documents = written
    data, model = OPENED[packing](folder, "validation"), in_float64()
    readings = [each for sequence in READINGS[packing](documents["validation"], 16) for each in sequence]
    found = evaluate(model, data, sequences_per_batch=batch_size, precision="fp32", device=torch.device("cpu"))
    with torch.no_grad():
        assert found.loss == pytest.approx(loss_of(model, readings).item() / found.tokens, rel=1e-12)
    assert found.tokens == targets_in(readings)


@pytest.mark.parametrize("step", [2, 5, 8, 11])
@pytest.mark.parametrize("packing", [PAD, WITHIN])
def test_a_run_continues_to_the_bit(
    packing: str, step: int, written: tuple[Path, dict[str, list[list[int]]]], tmp_path: Path
) -> None:
    config, parts = config_of(packing), data_of(written[0], packing)
    whole = trainer_of(config, tmp_path, checkpoint_folder=tmp_path / "whole", **parts)
    whole.train()
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.opened(path, exact=True) as log, pytest.raises(Interrupted):
        trainer_of(config, tmp_path, tracker=log, stop=stop_after(step), **parts).train()
    with MetricsLog.opened(path, exact=True) as log:
        resumed = trainer_of(config, tmp_path, tracker=log, **parts)
        resumed.train()
    assert_equal_states(resumed, whole)
    seen = {row["step"]: row["progress/tokens"] for row in read_rows(path) if "progress/tokens" in row}
    assert seen == {number: row["progress/tokens"] for number, row in whole.tracker.rows.items()}  # type: ignore[attr-defined]
    assert resumed.counters.tokens == whole.counters.tokens


def test_a_checkpoint_of_an_earlier_version_has_seen_all_tokens_of_its_steps(tmp_path: Path) -> None:
    config = config_of()
    with pytest.raises(Interrupted):
        trainer_of(config, tmp_path, stop=stop_after(6)).train()
    state = checkpoint.load(checkpoint.path_of(tmp_path / "checkpoints", 6))
    assert state["counters"].pop("tokens") == 6 * 4 * 16
    checkpoint.save(tmp_path / "checkpoints", 6, state)
    resumed = trainer_of(config, tmp_path)
    assert resumed.counters.tokens == 6 * 4 * 16
    resumed.train()
    assert resumed.tracker.rows[14]["progress/tokens"] == 14 * 4 * 16  # type: ignore[attr-defined]


def final_of(config: RunConfig, folder: Path, parts: dict[str, Any]) -> Trainer:
    trainer = trainer_of(config, folder, **parts)
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [PAD, WITHIN])
def test_updates_in_backward_and_recomputed_activations_give_the_same_run(
    packing: str, written: tuple[Path, dict[str, list[list[int]]]], tmp_path: Path
) -> None:
    parts = data_of(written[0], packing)
    plain = final_of(config_of(packing, "optimizer.max_grad_norm=null"), tmp_path / "plain", parts)
    switches = ["trainer.update_in_backward=true", "trainer.activation_checkpointing=true"]
    other = final_of(config_of(packing, "optimizer.max_grad_norm=null", *switches), tmp_path / "other", parts)
    assert_equal_states(plain, other)


@pytest.mark.filterwarnings("ignore")  # warnings of torch while it traces
@pytest.mark.parametrize("packing", [PAD, WITHIN])
def test_a_compiled_model_trains_equally(
    packing: str, written: tuple[Path, dict[str, list[list[int]]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relora.training.model.COMPILER", "aot_eager")
    torch.compiler.reset()
    parts = data_of(written[0], packing)
    plain = final_of(config_of(packing), tmp_path / "plain", parts).tracker
    compiled = final_of(config_of(packing, "trainer.compile=true"), tmp_path / "compiled", parts).tracker
    assert isinstance(plain, Recorder)
    assert isinstance(compiled, Recorder)
    assert compiled.rows[14]["eval/loss"] == pytest.approx(plain.rows[14]["eval/loss"], abs=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_speed_and_the_time_left_count_no_padding(
    written: tuple[Path, dict[str, list[list[int]]]], tmp_path: Path
) -> None:
    trainer = final_of(config_of(PAD), tmp_path, data_of(written[0], PAD))
    assert isinstance(trainer.tracker, Recorder)
    last = trainer.tracker.progressed[-1]
    assert last.tokens_per_second / last.steps_per_second == pytest.approx(trainer.counters.tokens / 14)
    assert trainer.counters.tokens < 14 * 4 * 16
    assert asdict(trainer.counters)["tokens"] == trainer.counters.tokens


def test_batches_of_packed_text_have_no_positions(tmp_path: Path) -> None:
    """Then attention needs no mask and is as fast as before."""
    batch = tokens(tmp_path, "training", 200).training_batch(0, 4, 0)
    assert isinstance(batch, Batch)
    assert batch.positions_BxT is None
    assert math.prod(batch.targets_BxT.shape) == batch.target_tokens
