"""The torchrun command of the README, as a user types it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port
from small import REPOSITORY

from relora.config.compose import compose
from relora.runs.checkpoint import latest_step
from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir

pytestmark = pytest.mark.slow


LONG = ["trainer.total_steps=2003", "method.reset_interval_steps=1000", "trainer.validation_interval_steps=1000"]


def torchrun(overrides: list[str]) -> subprocess.Popen[str]:
    """Start a run with two ranks."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "run.py"]
    return subprocess.Popen(
        [sys.executable, *command, *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_step(process: subprocess.Popen[str], run: RunDir, step: int) -> None:
    while not any(row["step"] >= step for row in read_rows(run.metrics_file)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_run_under_torchrun_ends_as_one_run(tiny: list[str]) -> None:
    from mlflow import MlflowClient

    overrides = [*tiny, "tracker=mlflow"]
    process = torchrun(overrides)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert shown.count("the model writes:") == 1
    config = compose(overrides)
    client = MlflowClient(config.mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    recorded = list(client.search_runs(experiments))
    assert [run.info.status for run in recorded] == ["FINISHED"]
    steps = [point.step for point in client.get_metric_history(recorded[0].info.run_id, "train/loss")]
    assert steps == list(range(1, 15))


def test_torchrun_stops_with_a_checkpoint_and_ends_when_a_rank_dies(tiny: list[str]) -> None:
    overrides = [*tiny, *LONG, "trainer.checkpoint_interval_steps=1000"]
    run = RunDir(compose(overrides).run_dir)
    process = torchrun(overrides)
    until_step(process, run, 20)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=600)
    status = run.status
    assert status is not None
    stopped = latest_step(run.checkpoints)
    assert status.state == "interrupted"
    assert re.fullmatch(rf"SIGTERM after step {stopped}; .*checkpoint is written", status.message)
    assert shown.count("go on with: ") == 1

    assert stopped is not None
    process = torchrun(overrides)
    until_step(process, run, stopped + 20)
    os.kill(rank_1(process.pid), signal.SIGKILL)
    began = time.monotonic()
    shown, _ = process.communicate(timeout=600)
    assert time.monotonic() - began < 120, "much sooner than the time-out"
    assert process.returncode == 1
    status = run.status
    assert status is not None
    assert status.state == "failed"
    assert re.search(r"another rank ended .*\(killed", status.message)
    assert not run.is_locked


def rank_1(torchrun_pid: int) -> int:
    """Return the process id of rank 1."""
    children = Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children")
    if not children.exists():
        pytest.skip("needs /proc with children")
    for pid in map(int, children.read_text().split()):
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError("torchrun has no rank 1")
