import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.runs.metrics import (
    MICRO_STEP,
    Broadcast,
    MetricsLog,
    Progress,
    ReplayError,
    read_rows,
    recorded,
    row_metrics,
)
from relora.runs.rundir import RunDir


def write(path: Path, steps: range, *, exact: bool = True, shift: float = 0.0) -> None:
    """One row a step. Its values follow from the step."""
    with MetricsLog.opened(path, exact=exact) as log:
        for step in steps:
            log.log(step, {"train/loss": 1 / (step + 3) + shift, "perf/tokens_per_second": 100.0 * step})


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time_ms"} for row in read_rows(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


# ------------------------------------------------------------------------------------------------------------ rows


def test_a_row_is_one_line_of_json_with_its_step_and_time(path: Path) -> None:
    before = time.time_ns() // 1_000_000
    with MetricsLog.opened(path, exact=True) as log:
        log.log(0, {"eval/loss": 5.5})
        log.log(1, {"train/loss": 0.1, "train/skipped_updates": 0})
        log.log(1, {"eval/loss": 5.25})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = [row.pop("time_ms") for row in rows]
    assert [row.pop("line") for row in rows] == [0, 1, 2]
    assert all(len(row.pop("crc32")) == 8 for row in rows)
    assert rows == [
        {"step": 0, "eval/loss": 5.5},
        {"step": 1, "train/loss": 0.1, "train/skipped_updates": 0.0},
        {"step": 1, "eval/loss": 5.25},
    ]
    assert before <= times[0] <= times[1] <= times[2] <= time.time_ns() // 1_000_000
    assert timeless(path) == rows
    assert row_metrics(read_rows(path)[1]) == {"train/loss": 0.1, "train/skipped_updates": 0.0}


def test_values_are_kept_to_the_bit(path: Path) -> None:
    values = {f"train/{number}": value for number, value in enumerate([0.1, 1e-320, -0.0, 1.7e308, 2 / 3, math.pi])}
    with MetricsLog.opened(path, exact=True) as log:
        log.log(1, values)
    read = row_metrics(read_rows(path)[0])
    assert {name: value.hex() for name, value in read.items()} == {name: v.hex() for name, v in values.items()}


def test_rows_are_readable_while_the_run_trains(path: Path) -> None:
    with MetricsLog.opened(path, exact=True) as log:
        log.log(1, {"train/loss": 2.0})
        assert timeless(path) == [{"step": 1, "train/loss": 2.0}]


@pytest.mark.slow
def test_rows_survive_a_process_that_is_killed(path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from relora.runs.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), exact=True)\n"
        "for step in range(50): log.log(step, {'train/loss': float(step)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -9
    assert [row["step"] for row in read_rows(path)] == list(range(50))


def test_a_missing_file_has_no_rows(path: Path) -> None:
    assert read_rows(path) == []
    with MetricsLog.opened(path, exact=True):
        pass
    assert read_rows(path) == []


def test_an_error_keeps_the_rows_written_before_it(path: Path) -> None:
    def fail() -> None:
        with MetricsLog.opened(path, exact=True) as log:
            log.log(1, {"train/loss": 2.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert timeless(path) == [{"step": 1, "train/loss": 2.0}]


# ----------------------------------------------------------------------------------------------------------- crash


def test_an_incomplete_last_line_is_removed_and_written_again(path: Path) -> None:
    write(path, range(4))
    whole = timeless(path)
    path.write_bytes(path.read_bytes()[:-7])
    assert timeless(path) == whole[:3]
    write(path, range(2, 4))
    assert timeless(path) == whole
    assert path.read_bytes().endswith(b"}\n")


def test_a_last_line_without_its_line_end_is_incomplete(path: Path) -> None:
    write(path, range(3))
    path.write_bytes(path.read_bytes()[:-1])
    write(path, range(3, 4))
    assert [row["step"] for row in read_rows(path)] == [0, 1, 3]


def test_a_file_of_one_incomplete_line_has_no_rows(path: Path) -> None:
    path.write_bytes(b'{"step": 1, "time_')
    write(path, range(1))
    assert [row["step"] for row in read_rows(path)] == [0]


# ---------------------------------------------------------------------------------------------------------- damage

GARBAGE = [
    b"",
    b"\0\0\0\0",
    b"\xff\xfe garbage",
    b"[1, 2]",
    b"7",
    b'{"step": 3}',
    b'{"step": "x", "time_ms": 1}',
    b"[" * 9999,
]


@pytest.mark.slow
@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_a_damaged_line_in_the_middle_loses_only_its_row_and_is_named(path: Path, garbage: bytes) -> None:
    write(path, range(6))
    rows = timeless(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], garbage, *lines[4:]]) + b"\n")
    found = recorded(path)
    assert timeless(path) == rows[:3] + rows[4:]
    (lost,) = found.lost
    assert re.fullmatch(rf"{re.escape(str(path))}: line 4 cannot be read, after .*step 2 .*before .*step 4", str(lost))
    assert not lost.recomputed


@pytest.mark.parametrize(("first", "count"), [(1, 1), (3, 2), (0, 1)])
def test_missing_lines_are_noticed(path: Path, first: int, count: int) -> None:
    write(path, range(6))
    rows, lines = timeless(path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:first] + lines[first + count :]))
    assert timeless(path) == rows[:first] + rows[first + count :]
    (lost,) = recorded(path).lost
    assert (lost.rows, lost.missing, lost.line) == (count, True, first + 1)
    assert (lost.after_step, lost.before_step) == (max(0, first - 1), first + count)


def test_every_flipped_bit_of_a_row_is_noticed(path: Path) -> None:
    write(path, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(len(lines[1]) - 1):
        for bit in range(8):
            changed = lines[1][:number] + bytes([lines[1][number] ^ 1 << bit]) + lines[1][number + 1 :]
            path.write_bytes(lines[0] + changed + lines[2])
            assert [row["step"] for row in read_rows(path)] == [0, 2]
            assert recorded(path).lost


def test_an_attempt_writes_lost_rows_again_and_the_file_says_so(path: Path) -> None:
    write(path, range(8))
    rows, lines = timeless(path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:5], *lines[6:]]))
    with MetricsLog.opened(path, exact=True) as log:
        early, late = log.begin(4)
        for step in range(4, 8):
            log.log(step, {"train/loss": 1 / (step + 3), "perf/tokens_per_second": 100.0 * step})
    assert (early.recomputed, late.recomputed) == (False, True)
    assert sorted(timeless(path), key=lambda row: row["step"]) == [row for row in rows if row["step"] != 1]
    assert [lost.recomputed for lost in recorded(path).lost] == [False, True]
    with MetricsLog.opened(path, exact=True) as log:
        assert [str(lost) for lost in log.begin(6)] == [str(early)], "recomputed rows are not reported again"


def test_old_rows_without_line_numbers_are_read_and_continued(path: Path) -> None:
    old = [{"step": step, "time_ms": 1, "train/loss": 1 / (step + 3)} for step in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    write(path, range(1, 5))
    assert recorded(path).lost == []
    assert [row["step"] for row in read_rows(path) if "train/loss" in row] == [0, 1, 2, 3, 4]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2] + lines[-1:]))
    assert [lost.missing for lost in recorded(path).lost] == [True]


# ------------------------------------------------------------------------------------------------- crash and replay

TOTAL_STEPS = 12
permille = st.integers(0, 1000)


def train(path: Path, first: int, last: int) -> None:
    """Write the rows of an attempt from step `first` to before `last`: one to three rows a step."""
    with MetricsLog.opened(path, exact=True) as log:
        for step in range(first, last):
            if step % 4 == 0:
                log.log(step, {"eval/loss": 9 / (step + 1), "progress/tokens": 64 * step})
            log.log(step, {"train/loss": 1 / (step + 3), "train/grad_norm": math.nan if step == 5 else 0.1 * step})
            if step % 3 == 0:
                log.log(step, {"restart/number": step // 3})


@pytest.mark.slow
@settings(max_examples=80)
@given(crashes=st.lists(st.tuples(permille, permille, permille), min_size=1, max_size=4))
def test_crashes_and_replays_give_the_rows_of_an_uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, crashes: list[tuple[int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("crashes")
    uninterrupted, crashed = folder / "uninterrupted.jsonl", folder / "crashed.jsonl"
    train(uninterrupted, 0, TOTAL_STEPS)

    resumed = 0
    for reached, bytes_on_the_disk, checkpoint in crashes:
        train(crashed, resumed, resumed + (TOTAL_STEPS - resumed) * reached // 1000)
        os.truncate(crashed, crashed.stat().st_size * bytes_on_the_disk // 1000)
        newest = max((row["step"] for row in read_rows(crashed)), default=0)
        resumed = newest * checkpoint // 1000
    train(crashed, resumed, TOTAL_STEPS)

    assert timeless(crashed) == timeless(uninterrupted)


# ---------------------------------------------------------------------------------------------------------- replay


def test_a_replayed_step_keeps_its_first_row(path: Path) -> None:
    write(path, range(6))
    first = path.read_bytes()
    write(path, range(2, 6))
    assert path.read_bytes() == first
    write(path, range(2, 8))
    assert path.read_bytes().startswith(first)
    assert [row["step"] for row in read_rows(path)] == list(range(8))


def test_a_step_logged_twice_in_one_attempt_keeps_its_first_value(path: Path) -> None:
    with MetricsLog.opened(path, exact=False) as log:
        log.log(3, {"train/loss": 1.0})
        log.log(3, {"train/loss": 2.0, "eval/loss": 3.0})
    assert timeless(path) == [{"step": 3, "train/loss": 1.0}, {"step": 3, "eval/loss": 3.0}]


@pytest.mark.parametrize("name", ["train/loss", "eval/perplexity", "restart/relative_update", "progress/tokens"])
@pytest.mark.parametrize("replayed", [math.nextafter(0.1, 1.0), math.nan, math.inf, -0.1])
def test_another_value_on_replay_is_an_error_where_runs_are_exact(path: Path, name: str, replayed: float) -> None:
    with MetricsLog.opened(path, exact=True) as log:
        log.log(7, {name: 0.1})
    before = path.read_bytes()
    with MetricsLog.opened(path, exact=True) as log, pytest.raises(ReplayError, match=rf"step 7 .*{name}=.*0\.1;"):
        log.log(7, {name: replayed})
    assert path.read_bytes() == before


def test_another_value_on_replay_is_no_error_where_runs_are_not_exact(path: Path) -> None:
    write(path, range(3))
    first = path.read_bytes()
    write(path, range(3), exact=False, shift=0.5)
    assert path.read_bytes() == first


def test_a_replay_with_another_micro_batch_may_give_other_values(path: Path) -> None:
    with MetricsLog.opened(path, exact=True) as log:
        log.log(1, {MICRO_STEP: 4, "train/loss": 2.0})
        log.log(2, {MICRO_STEP: 2, "train/loss": 1.0})
        log.log(3, {MICRO_STEP: 2, "train/loss": 0.5})
    first = path.read_bytes()
    with MetricsLog.opened(path, exact=True) as log, pytest.raises(ReplayError):
        log.log(1, {MICRO_STEP: 4, "train/loss": 2.1})
    with MetricsLog.opened(path, exact=True) as log:
        log.log(1, {MICRO_STEP: 4, "train/loss": 2.0})
        log.log(2, {MICRO_STEP: 4, "train/loss": 1.1})
        log.log(3, {MICRO_STEP: 2, "train/loss": 0.6})
    assert path.read_bytes() == first


@pytest.mark.parametrize("name", ["perf/tokens_per_second", "summary/wall_clock_seconds"])
def test_values_that_depend_on_the_machine_may_differ(path: Path, name: str) -> None:
    for value in (1.0, 2.0):
        with MetricsLog.opened(path, exact=True) as log:
            log.log(4, {name: value})
    assert timeless(path) == [{"step": 4, name: 1.0}]


# ------------------------------------------------------------------------------------------------------ non-finite


def test_values_that_are_not_finite_are_named_and_kept_out(path: Path) -> None:
    with MetricsLog.opened(path, exact=True) as log:
        log.log(2, {"train/loss": math.inf, "train/lr": 0.5, "train/grad_norm": math.nan})
        log.log(3, {"train/loss": -math.inf})
    assert timeless(path) == [
        {"step": 2, "train/lr": 0.5, "nonfinite": ["train/grad_norm", "train/loss"]},
        {"step": 3, "nonfinite": ["train/loss"]},
    ]
    assert [row_metrics(row) for row in read_rows(path)] == [{"train/lr": 0.5}, {}]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_value_that_is_not_finite_can_be_replayed(path: Path) -> None:
    with MetricsLog.opened(path, exact=True) as log:
        log.log(2, {"train/loss": math.nan})
    first = path.read_bytes()
    with MetricsLog.opened(path, exact=True) as log:
        log.log(2, {"train/loss": math.nan})
        with pytest.raises(ReplayError):
            log.log(2, {"train/loss": 1.0})
    assert path.read_bytes() == first


# ------------------------------------------------------------------------------------------------------- broadcast


class Recorder:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def progress(self, progress: Progress) -> None:
        self.calls.append(("progress", progress))

    def log(self, step: int, metrics: Any) -> None:
        self.calls.append(("log", step, dict(metrics)))

    def log_line(self, message: str) -> None:
        self.calls.append(("log_line", message))

    def flush(self) -> None:
        self.calls.append(("flush",))


def test_a_broadcast_passes_every_call_to_every_tracker_in_order(path: Path) -> None:
    first, second = Recorder(), Recorder()
    speed = {"tokens_per_second": 5.0, "steps_per_second": 1.0}
    progress = Progress(step=1, total_steps=9, loss=2.0, learning_rate=0.1, **speed, next_restart=None)
    with MetricsLog.opened(path, exact=True) as log:
        everyone = Broadcast([first, log, second])
        everyone.progress(progress)
        everyone.log(1, {"train/loss": 2.0})
        everyone.log_line("half way")
        everyone.flush()
    expected = [("progress", progress), ("log", 1, {"train/loss": 2.0}), ("log_line", "half way"), ("flush",)]
    assert first.calls == second.calls == expected
    assert timeless(path) == [{"step": 1, "train/loss": 2.0}]


def test_the_metrics_file_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    assert RunDir(tmp_path).metrics_file == tmp_path / "metrics.jsonl"
