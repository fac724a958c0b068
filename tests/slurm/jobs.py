"""Helpers of the SLURM tests: launch runs as a user does, ask SLURM for jobs, and train undisturbed runs to compare."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import trained
from small import REPOSITORY, eventually

from relora.config.compose import compose
from relora.launching import manage as control
from relora.runs.rundir import RunDir, read_json
from relora.runs.state import observe

CLUSTER = Path(__file__).with_name("cluster.sh")

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Sums, and so weights, are equal to the bit only with the same number of threads."""

SLOW_STEPS = 800
SLOW = (
    *(f"trainer.total_steps={SLOW_STEPS}", "trainer.validation_interval_steps=400", "method.reset_interval_steps=150"),
    "trainer.checkpoint_interval_steps=50",
)
"""A run of some seconds, which is long enough to disturb."""


def relora(*arguments: str, code: int = 0) -> str:
    """Return what a verb prints."""
    command = [sys.executable, "-m", "relora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_py(*arguments: str, code: int = 0, cwd: Path = REPOSITORY) -> str:
    """Return what `python run.py` prints."""
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def status_rows(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    """Return what `relora status --json` prints. A new process for each call would take a core from the jobs."""
    return control.status_json(runs_dir, name)


def ended(runs_dir: Path, name: str, seconds: float = 900.0) -> list[dict[str, Any]]:
    """Wait until no run is queued or running, and return the status rows."""

    runs = [item.run for item in control.runs_of(runs_dir, name)]
    eventually(lambda: not any(state.is_under_way for state in observe(runs)), f"{name} has ended", seconds)
    return status_rows(runs_dir, name)


def folder(overrides: list[str]) -> RunDir:
    """Return the run that the overrides describe."""
    return RunDir(compose(overrides).run_dir)


def job_of(run: RunDir) -> str:
    """Return the SLURM job of a run."""
    return read_json(run.submission_file)["job"]


def accounted(job: str, field: str = "State") -> list[str]:
    """Return a field of a job from sacct, one entry for each time that the job was in the queue."""
    command = ["sacct", "-n", "-P", "-X", "-D", "-j", job, "-o", field]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def states_of(job: str) -> list[str]:
    """Wait until the last attempt of a job has ended. Return the final state of each attempt."""

    def states() -> list[str] | None:
        found = accounted(job)
        return None if not found or found[-1] in ("PENDING", "RUNNING", "COMPLETING") else found

    return eventually(states, f"job {job} has left its node", 120)


def trains(run: RunDir, steps: int = 80) -> bool:
    """Return whether a run has logged more than `steps` rows, and so has a checkpoint."""
    rows = run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.exists() else 0
    return rows > steps


def weights(run: RunDir) -> bytes:
    """Return the weights of the finished model."""
    return (run.model / "model.safetensors").read_bytes()


_UNDISTURBED: dict[str, bytes] = {}


def undisturbed(overrides: list[str], tmp_path: Path) -> bytes:
    """Return the weights of the same run, trained without a stop in a process of this machine."""
    runs_dir = tmp_path / "undisturbed"
    plain = [text for text in overrides if not text.startswith(("cluster", "runs_dir=", "tracker", "study="))]
    local = [*plain, f"runs_dir={runs_dir}", "tracker=jsonl"]
    key = compose(local).config_hash
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = weights(trained(1, local))
    return _UNDISTURBED[key]


def steps_logged(run: RunDir) -> list[int]:
    """Return the steps of all rows with a training loss, in the order of the file."""
    rows = map(json.loads, run.metrics_file.read_text().splitlines())
    return [row["step"] for row in rows if "train/loss" in row]


def queued_names() -> list[str]:
    """Return the names of the jobs in the queue, with one entry for each task of an array."""
    return subprocess.run(["squeue", "-h", "-r", "-o", "%j"], capture_output=True, text=True, check=True).stdout.split()


def occupy(nodes: int = 2) -> str:
    """Submit a job of a higher partition that takes whole nodes. Return its number."""
    command = ["sbatch", "--parsable", "-p", "high", "--exclusive", "-N", str(nodes), "-o", "/dev/null"]
    done = subprocess.run([*command, "--wrap", "sleep 600"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def release(job: str) -> None:
    subprocess.run(["scancel", job], check=True)


def wait_for_finish(runs_dir: Path, name: str) -> None:
    rows = ended(runs_dir, name)
    assert {row["state"] for row in rows} == {"finished"}, rows
