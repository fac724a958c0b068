"""Arms whose layers take the place of matrices: two ranks learn what one learns, and resume to the bit after a kill."""

import os
import signal
from pathlib import Path

import pytest
import torch
from processes import Ranks, at_step, trained
from safetensors.torch import load_file
from small import TINY

from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir

pytestmark = pytest.mark.slow

TOLERANCE = 2e-5
"""Absolute tolerance of losses and weights: another number of ranks sums fp32 gradients in another order."""

RESTARTS = ["method.restart_interval_steps=4", "schedule.restart_warmup_steps=2", "method.warm_start_steps=3"]
ARMS = {"lowrank": RESTARTS, "sltrain": RESTARTS, "cola": ["trainer.activation_checkpointing=true"]}


def killed_at_step_9(rank: int) -> None:
    at_step(9, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_rows(run.metrics_file) if "train/loss" in row}


@pytest.mark.parametrize("method", ARMS)
def test_two_ranks_learn_the_same_and_resume_to_the_bit(method: str, text: Path, tmp_path: Path) -> None:
    own = [each for each in TINY if not each.startswith("method.")]
    overrides = [*own, f"method={method}", "method.rank=4", *ARMS[method], "data=text", f"data.path={text}"]
    overrides += ["tracker=jsonl", "trainer.checkpoint_interval_steps=4"]
    single, several = (trained(size, [*overrides, f"runs_dir={tmp_path / str(size)}"]) for size in (1, 2))
    assert losses(single) == pytest.approx(losses(several), abs=TOLERANCE)
    weights = [load_file(run.model / "model.safetensors") for run in (single, several)]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=TOLERANCE), name

    killed = [*overrides, f"runs_dir={tmp_path / 'killed'}"]
    assert set(Ranks(2, killed, killed_at_step_9).ended()) == {-signal.SIGKILL}
    again = trained(2, killed)
    assert losses(again) == losses(several)
    for name, value in load_file(again.model / "model.safetensors").items():
        assert torch.equal(value, weights[1][name]), name
