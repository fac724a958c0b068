"""Two ranks on two GPUs: these tests check what gloo cannot show. Nobody has run them yet."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Ranks, at_step, trained

from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TOLERANCE = 1e-4
"""Absolute tolerance of losses. A GPU sums a matrix product in an order that depends on the shapes."""


@pytest.fixture
def on_gpus(tiny: list[str]) -> list[str]:
    return [*tiny, "trainer.device=cuda", "trainer.sequences_per_micro_step=1"]


@pytest.fixture
def long(on_gpus: list[str]) -> list[str]:
    return [*on_gpus, "trainer.total_steps=20003", "method.reset_interval_steps=10000"]


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_rows(run.metrics_file) if "train/loss" in row}


def test_two_gpus_learn_the_same_as_one(on_gpus: list[str], tmp_path: Path) -> None:
    one, two = (losses(trained(size, [*on_gpus, f"runs_dir={tmp_path / str(size)}"])) for size in (1, 2))
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < TOLERANCE


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(long: list[str]) -> None:
    ranks = Ranks(2, long)
    ranks.until_step(20)
    ranks.send(1, signal.SIGTERM)
    assert ranks.ended() == [130, 130], ranks.shown
    assert list(ranks.run.checkpoints.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_is_noticed_at_once(long: list[str], rank: int) -> None:
    ranks = Ranks(2, long, partial(fails, rank))
    began = time.monotonic()
    assert ranks.ended() == [1, 1], ranks.shown
    assert time.monotonic() - began < 60
    status = ranks.run.status
    assert status is not None
    assert status.state == "failed"
    assert "ZeroDivisionError: division by zero" in status.message


def test_a_killed_rank_ends_the_other_within_the_limit(long: list[str]) -> None:
    """NCCL does not report that a peer is dead. The other rank ends when its wait reaches the limit."""
    ranks = Ranks(2, long, waits_ten_seconds)
    ranks.until_step(20)
    ranks.send(1, signal.SIGKILL)
    assert ranks.ended() == [1, -signal.SIGKILL]
    status = ranks.run.status
    assert status is not None
    assert status.state == "failed"
    assert "another rank" in status.message


def test_two_ranks_on_one_gpu_are_refused(on_gpus: list[str]) -> None:
    ranks = Ranks(2, on_gpus, sees_one_gpu)
    assert ranks.ended() == [1, 1]
    message = r"ranks 0, 1 [^;\n]*same GPU[^;\n]*; start one rank [^;\n]*trainer\.device=cpu"
    assert len(re.findall(message, ranks.shown)) == 1, ranks.shown


# --------------------------------------------------------------------------------------------------------- sabotage


def fails(failing: int, rank: int) -> None:
    """One rank fails after a step."""
    if rank == failing:
        at_step(9, lambda trainer: 1 / 0)


def waits_ten_seconds(rank: int) -> None:
    import relora.training.distributed

    relora.training.distributed.WATCHED_SECONDS = 10.0


def sees_one_gpu(rank: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
