"""What a run reports and where it goes first: a JSONL file in its folder, the truth that every other view mirrors."""

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

    def log_line(self, message: str) -> None:
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

    def log_line(self, message: str) -> None:
        """To each."""
        for tracker in self.trackers:
            tracker.log_line(message)

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
    cut off when the file is opened; a damaged line in the middle stays where it is and is no row: `lost` has what of
    the file could not be read. Values that are not finite are kept out of the numbers and named in the row's
    "nonfinite" list: they would wreck every chart.
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
        """What of the file is lost to an attempt that goes on from `first_step`, or is computed again by it."""
        lost = [rows for rows in self.lost if not rows.recomputed]
        for rows in lost:
            rows.recomputed = first_step <= rows.after_step
        if any(rows.recomputed for rows in lost):
            self._write(first_step, {RECOMPUTED: first_step})
        return lost

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
        """Not kept."""

    def log_line(self, message: str) -> None:
        """Not kept."""

    def flush(self) -> None:
        """To the disk. Raises OSError that names the file."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise naming(error, self.path) from error

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


# ------------------------------------------------------------------------------------------------- rows in a file


@dataclass(kw_only=True)
class LostRows:
    """A place in a file where rows are damaged or missing."""

    path: Path
    line: int
    """Counted from 1."""
    rows: int
    missing: bool
    """Whether the line itself is gone; otherwise it is there and cannot be read."""
    after_step: int
    """Of the row before."""
    before_step: int | None = None
    """Of the row behind; None at the end."""
    recomputed: bool = False
    """Whether a later attempt went on from before it, and so wrote the rows anew."""

    def __str__(self) -> str:
        many = self.rows > 1
        what = f"{self.rows} rows {'are' if many else 'is'}".replace("1 rows", "1 row")
        what = f"{what} missing before line {self.line}" if self.missing else f"line {self.line} cannot be read"
        behind = "" if self.before_step is None else f" and before that of step {self.before_step}"
        return f"{self.path}: {what}, after the row of step {self.after_step}{behind}"


@dataclass(kw_only=True)
class Recorded:
    """What a file of rows holds."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Those that can be read, in the order they were written."""
    lost: list[LostRows] = field(default_factory=list)
    lines: int = 0
    """The number of the next one."""


CHECK = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')
RECOMPUTED = "recomputed_from"
"""Of a row that is written when a run with lost rows goes on: from this step on all rows are computed again."""
FLAGS = (RECOMPUTED, "step", "time_ms", "nonfinite", "line", "crc32")
"""What a row holds besides metrics; `line` is its number, from 0, by which a lost row is noticed."""


def encoded(row: Mapping[str, Any], line: int) -> bytes:
    """A row as the line of that number, with a checksum."""
    text = json.dumps({**row, "line": line}).encode()[:-1]
    return text + f', "crc32": "{zlib.crc32(text):08x}"}}\n'.encode()


def decoded(line: bytes) -> dict[str, Any] | None:
    """The row of a line, None for a damaged one. Rows from before checksums were written are read as they are."""
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
    """All complete rows of a file, and what of it is lost. Raises OSError for what is no file."""
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
    """All complete rows that can be read, in the order they were written."""
    return recorded(path).rows


def complete_bytes(path: Path) -> int:
    """Length of the file up to its last complete line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's metrics without its step, time and flags."""
    return {name: value for name, value in row.items() if name not in FLAGS}
