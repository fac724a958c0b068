"""Padded sequences and attention within documents with several ranks: real processes, gloo on the CPU."""

import json
from pathlib import Path

import pytest
from processes import trained
from safetensors.torch import load_file
from small import TINY

from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Absolute tolerance of losses and weights, as in test_ranks.py: the ranks sum fp32 gradients in another order."""


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose sequences have very different numbers of tokens."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = ["abc def gh " * (1 if number % 3 else 12) + str(number) for number in range(240)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def series(run: RunDir, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_rows(run.metrics_file) if name in row}


@pytest.mark.parametrize("packing", ["data.packing=pad", "data.attend_across_documents=false"])
def test_two_ranks_train_and_evaluate_as_one(packing: str, uneven: Path, tmp_path: Path) -> None:
    settings = [*TINY, packing, "data=text", f"data.path={uneven}", "tracker=jsonl"]
    one, two = (
        trained(ranks, [*settings, f"trainer.sequences_per_micro_step={micro}", f"runs_dir={tmp_path / str(ranks)}"])
        for ranks, micro in ((1, 4), (2, 1))
    )
    for name in ("train/loss", "eval/loss"):
        assert series(two, name) == pytest.approx(series(one, name), abs=TOLERANCE), name
    assert series(two, "progress/tokens") == series(one, "progress/tokens")
    first, second = (load_file(run.model / "model.safetensors") for run in (one, two))
    assert max((value - second[name]).abs().max().item() for name, value in first.items()) < TOLERANCE
    summaries = [run.status.summary for run in (one, two) if run.status is not None]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert summaries[1]["test_loss"] == pytest.approx(summaries[0]["test_loss"], abs=TOLERANCE)
