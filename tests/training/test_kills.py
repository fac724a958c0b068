"""The short form of benchmarks/kills.py, and tests that the benchmark detects faults."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small import REPOSITORY

KILLS = 6


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kills", REPOSITORY / "benchmarks" / "kills.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_runs_end_like_an_undisturbed_one() -> None:
    command = [sys.executable, "benchmarks/kills.py", "--kills", str(KILLS), "--jobs", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} signals to" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("number", "code", "state", "output", "fault"),
    [
        (signal.SIGTERM, -signal.SIGTERM, "interrupted", "", "exit code -15"),
        (signal.SIGINT, 130, "running", "", "says that the run is running"),
        (signal.SIGUSR2, 0, "interrupted", "", "exit code 0"),
        (signal.SIGTERM, 130, "interrupted", "Traceback (most recent call last)", "traceback"),
        (signal.SIGKILL, 0, "finished", "", "after SIGKILL"),
    ],
)
def test_a_process_that_ends_in_a_wrong_way_is_a_fault(
    kills: ModuleType, tmp_path: Path, number: signal.Signals, code: int, state: str, output: str, fault: str
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state}))
    kill = kills.Kill("merge", number, False)
    (found,) = kills.check_end(kill, code, output, 1, tmp_path)
    assert fault in found
    right = -signal.SIGKILL if number == signal.SIGKILL else 130
    (tmp_path / "status.json").write_text(json.dumps({"state": "interrupted"}))
    assert kills.check_end(kill, right, "", 1, tmp_path) == []


def test_any_difference_in_what_a_run_leaves_is_a_fault(kills: ModuleType) -> None:
    expected = {"weights": "ab", "eval/loss at step 5": 3.0, "temporary files": []}
    assert kills.differences(expected, dict(expected)) == []
    for key, value in [("weights", "cd"), ("eval/loss at step 5", 3.0000001), ("temporary files", ["a.tmp"])]:
        (fault,) = kills.differences(expected, {**expected, key: value})
        assert key in fault
    assert kills.differences(expected, {"weights": "ab", "temporary files": []})


def test_every_named_moment_is_reached_and_every_signal_is_used(kills: ModuleType) -> None:
    """A long form of the benchmark tries every signal at every moment, and as many random moments."""
    made = kills.planned(8 * len(kills.MOMENTS), seed=0, seconds=10.0)
    named = {(kill.moment, kill.number) for kill in made if kill.moment != kills.RANDOM}
    assert named == {(moment, number) for moment in kills.MOMENTS for number in kills.SIGNALS}
    assert len([kill for kill in made if kill.moment == kills.RANDOM]) == len(named)
