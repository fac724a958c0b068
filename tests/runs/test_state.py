"""The states of runs without SLURM, and how the output of SLURM is read. tests/slurm has the tests with SLURM."""

import os
import re
from pathlib import Path

import pytest

from relora.runs import slurm
from relora.runs.rundir import RunDir, Status, write_json
from relora.runs.state import ObservedState, observe


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def test_a_run_that_was_never_started_is_missing(run: RunDir) -> None:
    assert observe([run]) == [ObservedState(name="missing")]
    assert observe([run])[0].needs_launch


def test_a_running_run_without_a_process_becomes_interrupted(run: RunDir) -> None:
    run.status = Status(state="running")
    with run.locked():
        assert observe([run])[0].name == "running"
    assert observe([run])[0].name == "interrupted"
    status = run.status
    assert status is not None
    assert (status.state, status.ended_ms is not None) == ("interrupted", True)


@pytest.mark.parametrize("state", ["finished", "failed", "cancelled", "interrupted"])
def test_an_ended_run_has_the_state_of_its_status(run: RunDir, state: str) -> None:
    run.status = Status(state=state, message="" if state == "finished" else "why")
    (found,) = observe([run])
    assert found.name == state
    assert found.message == ("" if state == "finished" else "why")
    assert found.needs_launch == (state != "finished")


def test_without_slurm_a_submitted_run_has_the_state_of_its_files(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(run.path))
    write_json(run.submission_file, {"job": "7_1", "log": str(run.path / "log"), "needs": {}, "submitted_ms": 0})
    assert observe([run])[0].name == "queued"
    run.status = Status(state="running")
    (found,) = observe([run])
    assert found.name == "running"
    assert "job 7_1 cannot be checked" in found.message
    status = run.status
    assert status is not None
    assert status.state == "running"


@pytest.mark.parametrize(
    ("shown", "tasks"),
    [
        ("4711", ["4711"]),
        ("4711_3", ["4711_3"]),
        ("4711_[2-4,7%16]", ["4711_2", "4711_3", "4711_4", "4711_7"]),
        ("4711_[0]", ["4711_0"]),
    ],
)
def test_the_tasks_of_an_array_are_listed(shown: str, tasks: list[str]) -> None:
    assert slurm._expanded(shown) == tasks


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (slurm.Job(state="CANCELLED", reason="by 1000"), "cancelled by 1000"),
        (slurm.Job(state="OUT_OF_MEMORY", exit_code="0:125"), "out of memory"),
        (slurm.Job(state="TIMEOUT", exit_code="0:0"), "timed out"),
        (slurm.Job(state="NODE_FAIL"), "its node failed"),
        (slurm.Job(state="FAILED", exit_code="9:0", node="n1"), "killed by signal 9 .*n1"),
        (slurm.Job(state="FAILED", exit_code="0:15"), "killed by signal 15"),
        (slurm.Job(state="FAILED", exit_code="137:0"), "killed by signal 9"),
        (slurm.Job(state="FAILED", exit_code="130:0"), "exit code 130"),
        (slurm.Job(state="FAILED", exit_code="1:0"), "exit code 1 .*said nothing"),
    ],
)
def test_the_reason_why_a_job_died_is_in_words(job: slurm.Job, why: str) -> None:
    assert re.search(why, job.end_reason)
    assert not job.alive


def test_a_machine_without_slurm_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert not slurm.is_here()
    with pytest.raises(slurm.RunError, match=r"no SLURM submit node; .*cluster=local"):
        slurm.ask(["1"])
