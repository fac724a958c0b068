"""What a run reports and where it goes first: a JSONL file in its folder, the truth that every other view mirrors."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from relora.errors import RunError

REPRODUCIBLE_PREFIXES = ("train/", "eval/", "restart/", "progress/")
"""Metrics that a replayed step must give again; perf/ is about the machine and may differ."""

MICRO_STEP = "perf/sequences_per_micro_step"
"""How many sequences a pass took: another number sums in another order and changes the last bits."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after an update."""

    step: int
    """Updates done."""
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    next_restart: int | None


class Tracker(Protocol):
    """What the trainer tells the world."""

    def progress(self, progress: Progress) -> None:
        """Called after every update; must be cheap."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after `step` updates."""
        ...

    def say(self, message: str) -> None:
        """A line for people."""
        ...

    def flush(self) -> None:
        """Make what was logged survive a crash of the machine; called before a checkpoint is written."""
        ...


class Broadcast:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def progress(self, progress: Progress) -> None:
        """To each."""
        for tracker in self.trackers:
            tracker.progress(progress)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To each."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def say(self, message: str) -> None:
        """To each."""
        for tracker in self.trackers:
            tracker.say(message)

    def flush(self) -> None:
        """Each."""
        for tracker in self.trackers:
            tracker.flush()


class ReplayError(RunError):
    """A replayed step gave another value than the first time: the run does not resume to the bit."""


class MetricsLog:
    """Appends rows {"step", "time_ms", name: value, ...} to a JSONL file.

    A step that is replayed after a resume keeps its first row. With `exact`, a reproducible metric that differs on
    replay raises ReplayError, up to the first row that is replayed with another MICRO_STEP. A line torn by a crash is
    cut off when the file is opened. Values that are not finite are kept out of the numbers and named in the row's
    "nonfinite" list: they would wreck every chart.
    """

    def __init__(self, path: Path, *, exact: bool) -> None:
        self.exact = exact
        self._seen: dict[tuple[int, str], float] = {}
        for row in read_rows(path):
            self._seen.update({(row["step"], name): value for name, value in row_metrics(row).items()})
            self._seen.update({(row["step"], name): math.nan for name in row.get("nonfinite", ())})
        self._file = path.open("ab")
        self._file.truncate(complete_bytes(path))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics that this step has no value for yet."""
        fresh: dict[str, float] = {}
        if MICRO_STEP in metrics and self._seen.get((step, MICRO_STEP)) not in (None, metrics[MICRO_STEP]):
            self.exact = False
        for name, value in metrics.items():
            first = self._seen.get((step, name))
            if first is None:
                fresh[name] = self._seen[step, name] = float(value)
            elif self.exact and name.startswith(REPRODUCIBLE_PREFIXES) and not _same(first, float(value)):
                raise ReplayError(
                    f"step {step} was replayed and gave {name}={float(value)!r} where the first pass gave {first!r}; "
                    "the machine is the same, so its code, a library or its memory is at fault: start a new run"
                )
        if not fresh:
            return
        finite = {name: value for name, value in fresh.items() if math.isfinite(value)}
        row: dict[str, Any] = {"step": step, "time_ms": time.time_ns() // 1_000_000, **finite}
        if len(finite) < len(fresh):
            row["nonfinite"] = sorted(fresh.keys() - finite.keys())
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def progress(self, progress: Progress) -> None:
        """Not kept."""

    def say(self, message: str) -> None:
        """Not kept."""

    def flush(self) -> None:
        """To the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    @classmethod
    @contextmanager
    def opened(cls, path: Path, *, exact: bool) -> Iterator[Self]:
        """Flushed and closed at the end."""
        log = cls(path, exact=exact)
        try:
            yield log
        finally:
            log.flush()
            log._file.close()


def _same(first: float, second: float) -> bool:
    return first == second or (not math.isfinite(first) and not math.isfinite(second))


def complete_bytes(path: Path) -> int:
    """Length of the file up to its last complete line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows, in the order they were written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes()[: complete_bytes(path)].splitlines()]


def row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's metrics without its step, time and flags."""
    return {name: value for name, value in row.items() if name not in ("step", "time_ms", "nonfinite")}
