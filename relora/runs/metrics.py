"""The metrics of a run, the trackers that receive them, and the JSONL file in the run's folder.

The file is the original record: every other view of the metrics is a copy of it.
"""

import itertools
import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from relora.common.errors import RunError
from relora.common.files import naming

REPRODUCIBLE_PREFIXES = ("train/", "eval/", "restart/", "progress/")
"""Metrics that must be equal when a step is replayed. Metrics under perf/ depend on the machine and may differ."""

MICRO_STEP = "perf/sequences_per_micro_step"
"""The sequences in one micro-step. A different number changes the order of the sums, and so the last bits."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run after an optimizer step."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    steps_per_second: float
    next_restart: int | None


class Tracker(Protocol):
    """A receiver of what the trainer reports."""

    def progress(self, progress: Progress) -> None:
        """Receive the progress. This is called after every optimizer step, so it must be cheap."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics after `step` optimizer steps."""
        ...

    def log_line(self, message: str) -> None:
        """Log one line for the user."""
        ...

    def flush(self) -> None:
        """Make the log survive a crash of the machine. This is called before a checkpoint is written."""
        ...


class Broadcast:
    """A tracker that passes every call on to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def progress(self, progress: Progress) -> None:
        """Pass the progress to each tracker."""
        for tracker in self.trackers:
            tracker.progress(progress)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass the metrics to each tracker."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def log_line(self, message: str) -> None:
        """Pass the line to each tracker."""
        for tracker in self.trackers:
            tracker.log_line(message)

    def flush(self) -> None:
        """Flush each tracker."""
        for tracker in self.trackers:
            tracker.flush()


class ReplayError(RunError):
    """A replayed step gave a different value than the first time, so the resumed run is not bit-exact."""


class MetricsLog:
    """A tracker that appends rows {"step", "time_ms", name: value, ...} to a JSONL file.

    A step that is replayed after a resume keeps its first row. If `exact`, a reproducible metric that differs on replay
    raises ReplayError. This check ends at the first row that is replayed with a different MICRO_STEP.

    An incomplete last line, which a crash can leave, is cut off when the file is opened. A damaged line in the middle
    stays in the file and is not read as a row. `lost` lists the damaged and missing rows.

    Values that are not finite would break every chart. They are left out, and the row's "nonfinite" list has their
    names.
    """

    def __init__(self, path: Path, *, exact: bool) -> None:
        self.path, self.exact = path, exact
        self._seen: dict[tuple[int, str], float] = {}
        found = recorded(path)
        self.lost, self._lines = found.lost, itertools.count(found.lines)
        for row in found.rows:
            self._seen.update({(row["step"], name): value for name, value in row_metrics(row).items()})
            self._seen.update({(row["step"], name): math.nan for name in row.get("nonfinite", ())})
        self._file = path.open("ab")
        self._file.truncate(complete_bytes(path))

    def begin(self, first_step: int) -> "list[LostRows]":
        """Begin an attempt that continues from `first_step`.

        Returns:
            The lost rows that no earlier attempt computed again. `recomputed` is set for those that this attempt will
            compute again.
        """
        lost = [rows for rows in self.lost if not rows.recomputed]
        for rows in lost:
            rows.recomputed = first_step <= rows.after_step
        if any(rows.recomputed for rows in lost):
            self._write(first_step, {RECOMPUTED: first_step})
        return lost

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics that have no value for this step yet.

        Raises:
            ReplayError: The step is replayed, and a reproducible metric differs from its first value.
            OSError: The file cannot be written. The error names the file.
        """
        fresh: dict[str, float] = {}
        if MICRO_STEP in metrics and self._seen.get((step, MICRO_STEP)) not in (None, metrics[MICRO_STEP]):
            self.exact = False
        for name, value in metrics.items():
            first = self._seen.get((step, name))
            if first is None:
                fresh[name] = self._seen[step, name] = float(value)
            elif self.exact and name.startswith(REPRODUCIBLE_PREFIXES) and not _same(first, float(value)):
                raise ReplayError(
                    f"step {step} was replayed and gave {name}={float(value)!r}, but the first time it gave {first!r}; "
                    "the machine is the same, so the cause is the code, a library or faulty memory: start a new run"
                )
        if not fresh:
            return
        finite = {name: value for name, value in fresh.items() if math.isfinite(value)}
        row: dict[str, Any] = dict(finite)
        if len(finite) < len(fresh):
            row["nonfinite"] = sorted(fresh.keys() - finite.keys())
        self._write(step, row)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": step, "time_ms": time.time_ns() // 1_000_000, **values}
        try:
            self._file.write(encoded(row, next(self._lines)))
            self._file.flush()
        except OSError as error:
            raise naming(error, self.path) from error

    def progress(self, progress: Progress) -> None:
        """Do nothing: the progress is not stored."""

    def log_line(self, message: str) -> None:
        """Do nothing: lines are not stored."""

    def flush(self) -> None:
        """Write the file to the disk. Raises OSError that names the file."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise naming(error, self.path) from error

    @classmethod
    @contextmanager
    def opened(cls, path: Path, *, exact: bool) -> Iterator[Self]:
        """Open the log, and flush and close it at the end."""
        log = cls(path, exact=exact)
        try:
            yield log
        finally:
            log.flush()
            log._file.close()


def _same(first: float, second: float) -> bool:
    return first == second or (not math.isfinite(first) and not math.isfinite(second))


# ------------------------------------------------------------------------------------------------- rows in a file


@dataclass(kw_only=True)
class LostRows:
    """A place in a file where rows are damaged or missing."""

    path: Path
    line: int
    """The number of the damaged line, or of the line after the missing ones. The first line is 1."""
    rows: int
    missing: bool
    """Whether the lines are missing. Otherwise the line is there but cannot be read."""
    after_step: int
    """The step of the row before."""
    before_step: int | None = None
    """The step of the row after; None at the end of the file."""
    recomputed: bool = False
    """Whether a later attempt continued from an earlier step, and so wrote the rows again."""

    def __str__(self) -> str:
        many = self.rows > 1
        what = f"{self.rows} rows {'are' if many else 'is'}".replace("1 rows", "1 row")
        what = f"{what} missing before line {self.line}" if self.missing else f"line {self.line} cannot be read"
        behind = "" if self.before_step is None else f" and before that of step {self.before_step}"
        return f"{self.path}: {what}, after the row of step {self.after_step}{behind}"


@dataclass(kw_only=True)
class Recorded:
    """The content of a file of rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """The readable rows, in the order in which they were written."""
    lost: list[LostRows] = field(default_factory=list)
    lines: int = 0
    """The number of the next line to write, counted from 0."""


CHECK = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')
RECOMPUTED = "recomputed_from"
"""The key of a row that is written when a run with lost rows continues. Its value is the first step computed again."""
FLAGS = (RECOMPUTED, "step", "time_ms", "nonfinite", "line", "crc32")
"""The keys of a row that are not metrics. `line` is the row's number, from 0. A gap in it shows that rows are lost."""


def encoded(row: Mapping[str, Any], line: int) -> bytes:
    """Encode a row as line number `line`, with a checksum."""
    text = json.dumps({**row, "line": line}).encode()[:-1]
    return text + f', "crc32": "{zlib.crc32(text):08x}"}}\n'.encode()


def decoded(line: bytes) -> dict[str, Any] | None:
    """Decode a line into its row; None if the line is damaged. Old rows have no checksum and are accepted without."""
    line = line.rstrip(b"\n")
    check = CHECK.search(line)
    if check is not None and int(check[1], 16) != zlib.crc32(line[: check.start()]):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or (check is None and row.keys() & {"line", "crc32"}):
        return None
    row.pop("crc32", None)
    numbers = [row.get("step"), row.get("time_ms"), row.get("line", 0)]
    sound = all(type(number) is int for number in numbers) and isinstance(row.get("nonfinite", []), list)
    return row if sound and all(type(value) in (int, float) for value in row_metrics(row).values()) else None


def recorded(path: Path) -> Recorded:
    """Read all complete rows of a file, and find the lost ones. Raises OSError if the path is not a file."""
    found = Recorded()
    if not path.exists():
        return found
    step = 0
    waiting: list[LostRows] = []
    for number, line in enumerate(path.read_bytes()[: complete_bytes(path)].split(b"\n")[:-1], start=1):
        row = decoded(line)
        if row is None:
            waiting.append(LostRows(path=path, line=number, rows=1, missing=False, after_step=step))
            found.lines += 1
            continue
        own = row.pop("line", found.lines)
        if own > found.lines:
            waiting.append(LostRows(path=path, line=number, rows=own - found.lines, missing=True, after_step=step))
        found.lines, step = own + 1, row["step"]
        found.lost += waiting
        if RECOMPUTED in row:
            for lost in found.lost:
                lost.recomputed |= row[RECOMPUTED] <= lost.after_step
        else:
            for lost in waiting:
                lost.before_step = step
            found.rows.append(row)
        waiting = []
    found.lost += waiting
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all complete, undamaged rows, in the order in which they were written."""
    return recorded(path).rows


def complete_bytes(path: Path) -> int:
    """Return the length of the file up to the end of its last complete line; 0 if there is no file."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row, without its step, time and flags."""
    return {name: value for name, value in row.items() if name not in FLAGS}
