"""Helpers of all tests: the project folder, the overrides of a run that takes seconds, full disks and waiting."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent

TINY = (
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.layers=2",
    "model.heads=2",
    "method.rank=4",
    "method.warm_start_steps=3",
    "method.warm_start_learning_rate=2e-3",
    "method.reset_interval_steps=4",
    "optimizer.embedding_learning_rate=null",
    "schedule.warmup_steps=2",
    "schedule.restart_warmup_steps=2",
    "trainer.total_steps=14",
    "trainer.sequences_per_step=4",
    "trainer.validation_interval_steps=5",
    "trainer.checkpoint_interval_steps=5",
    "trainer.device=cpu",
    "data.sequence_length_tokens=16",
    "data.vocab_size=300",
    "data.validation_fraction=0.05",
    "data.test_fraction=0.05",
    "baseline_rates=[1]",
)
"""Restarts at steps 7 and 11 of 14, re-warm-ups of 2 steps, and an evaluation and a checkpoint every 5 steps."""


def skip_or_fail(needed: str, reason: str) -> NoReturn:
    """Skip the test, or fail it if RELORA_REQUIRE names what it needs."""
    if needed in os.environ.get("RELORA_REQUIRE", ""):
        pytest.fail(reason)
    pytest.skip(reason)


def fill(disk: Path, free_bytes: int) -> Path:
    """Fill a file system except `free_bytes`. Return the file that fills it."""
    filler, found = disk / "filler", os.statvfs(disk)
    filler.write_bytes(bytes(found.f_bavail * found.f_frsize - free_bytes))
    return filler


def eventually(question: Callable[[], T | None], what: str, seconds: float = 600.0) -> T:
    """Ask until the answer is true, and return this answer. Fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)
