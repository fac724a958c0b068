"""A run records the machines that train it, and says if they differ."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import Case

from relora.runs.metrics import encoded, read_rows
from relora.runs.rundir import Attempt, Status, status_of

pytestmark = pytest.mark.slow


OTHER_MACHINES = [
    {"cpu": "Another CPU, AVX512"},
    {"torch": "1.0.0"},
    {"threads": 64},
    {"ranks": 3},
    {"device": "NVIDIA A100"},
]


def edited(case: Case, change: Callable[[dict[str, Any]], None]) -> None:
    file = case.run.path / "status.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def with_another_value(case: Case) -> None:
    """Alter the last digit of a loss that the next attempt computes again."""
    rows = read_rows(case.run.metrics_file)
    for row in rows:
        if row["step"] == 10 and "train/loss" in row:
            row["train/loss"] *= 1 + 1e-7
    case.run.metrics_file.write_bytes(b"".join(encoded(row, line) for line, row in enumerate(rows)))


def test_an_attempt_records_its_machine_and_where_it_began(finished_run: Case) -> None:
    status = finished_run.run.status
    assert status is not None
    (attempt,) = status.attempts
    assert (attempt.device, attempt.ranks, attempt.first_step, attempt.seconds_before) == ("cpu", 1, 0, 0.0)
    assert attempt.host == status.host
    assert attempt.threads
    assert len(attempt.cpu) > 5
    assert attempt.torch[0].isdigit()
    assert attempt.ended_ms is not None
    assert attempt.started_ms <= attempt.ended_ms
    assert status.machine_changes == []


def test_a_killed_run_has_both_attempts(killed: Case) -> None:
    status = killed.launch()
    first, second = status.attempts
    assert (first.first_step, first.ended_ms) == (0, None)
    assert second.first_step == 8
    assert second.seconds_before is not None
    assert 0 < second.seconds_before < status.summary["training_seconds"]
    assert status.machine_changes == []
    assert killed.run.status == status


@pytest.mark.parametrize("other", OTHER_MACHINES, ids=lambda other: next(iter(other)))
def test_on_another_machine_a_run_resumes_and_says_so_once(
    killed: Case, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with_another_value(killed)
    before = read_rows(killed.run.metrics_file)
    edited(killed, lambda values: values["attempts"][0].update(other))
    status = killed.launch()
    assert status.state == "finished", status.message
    output = capsys.readouterr().out
    assert output.count("note: this machine (") == 1
    assert re.search(r"note: this machine \(.*from step 8 .*can differ", output)
    ((step, machine),) = status.machine_changes
    assert step == 8
    assert machine == status.attempts[1].machine
    assert f"from step 8 on: {machine}" in output
    assert read_rows(killed.run.metrics_file)[: len(before)] == before, "the rows of the first attempt are kept"


def test_on_the_same_machine_another_value_is_an_error(killed: Case) -> None:
    with_another_value(killed)
    status = killed.launch()
    assert status.state == "failed"
    assert re.search(r"step 10 .*train/loss=.*start a new run", status.message)


def test_later_attempts_do_not_compare_rows_of_another_machine(killed: Case) -> None:
    with_another_value(killed)
    later = {"first_step": 8}
    edited(killed, lambda values: values["attempts"].append({**values["attempts"][0], **later}))
    edited(killed, lambda values: values["attempts"][0].update(cpu="Another CPU, AVX512"))
    assert killed.launch().state == "finished"


def test_an_attempt_that_never_trained_does_not_count_as_another_machine(killed: Case) -> None:
    with_another_value(killed)
    edited(killed, lambda values: values["attempts"].append({"cpu": "Another CPU", "first_step": None}))
    assert killed.launch().state == "failed"


def test_an_old_status_without_attempts_has_its_last_attempt() -> None:
    old = {"state": "interrupted", "attempt": 3, "host": "n1", "device": "cpu", "ranks": 2, "ended_ms": 7}
    (attempt,) = status_of(old).attempts
    assert (attempt.host, attempt.device, attempt.ranks, attempt.ended_ms, attempt.first_step) == ("n1", "cpu", 2, 7, 0)
    now = Attempt(device="cpu", cpu="x", torch="2", threads=4, ranks=2)
    assert not now.differs_from(attempt), "an unknown value does not count as a difference"
    assert Attempt(device="cpu", ranks=1).differs_from(attempt)


def test_a_status_is_read_back_unchanged(tmp_path: Path) -> None:
    from relora.runs.rundir import RunDir

    status = Status(state="running", attempts=[Attempt(cpu="x", first_step=4), Attempt()])
    RunDir(tmp_path).status = status
    assert RunDir(tmp_path).status == status
