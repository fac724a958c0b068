"""What the SLURM tests share: runs as a user launches them, what SLURM says of them, and undisturbed runs beside."""

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
"""Sums, and so weights, are the same to the bit only for the same number of threads."""

SLOW_STEPS = 800
SLOW = (
    *(f"trainer.total_steps={SLOW_STEPS}", "trainer.validation_interval_steps=400", "method.reset_interval_steps=150"),
    "trainer.checkpoint_interval_steps=50",
)
"""Long enough, some seconds, to be disturbed."""


def relora(*arguments: str, code: int = 0) -> str:
    """What a verb prints."""
    command = [sys.executable, "-m", "relora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_py(*arguments: str, code: int = 0, cwd: Path = REPOSITORY) -> str:
    """What `python run.py` prints."""
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def standing(runs_dir: Path, name: str) -> list[dict[str, Any]]:
    """What `relora status --json` prints, from this process: a new one each time would take a core from the jobs."""
    return control.status_json(runs_dir, name)


def ended(runs_dir: Path, name: str, seconds: float = 900.0) -> list[dict[str, Any]]:
    """How the runs stand once none is queued or running."""

    runs = [item.run for item in control.runs_of(runs_dir, name)]
    eventually(lambda: not any(state.is_under_way for state in observe(runs)), f"{name} has ended", seconds)
    return standing(runs_dir, name)


def folder(overrides: list[str]) -> RunDir:
    """The run that the overrides describe."""
    return RunDir(compose(overrides).run_dir)


def job_of(run: RunDir) -> str:
    """Its SLURM job."""
    return read_json(run.submission_file)["job"]


def accounted(job: str, field: str = "State") -> list[str]:
    """What sacct keeps of a job, an entry for each time it was in the queue."""
    command = ["sacct", "-n", "-P", "-X", "-D", "-j", job, "-o", field]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def states_of(job: str) -> list[str]:
    """How each attempt of a job ended, once the last has."""

    def states() -> list[str] | None:
        found = accounted(job)
        return None if not found or found[-1] in ("PENDING", "RUNNING", "COMPLETING") else found

    return eventually(states, f"job {job} has left its node", 120)


def trains(run: RunDir, steps: int = 80) -> bool:
    """Whether it has come some way, past a checkpoint or two."""
    rows = run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.exists() else 0
    return rows > steps


def weights(run: RunDir) -> bytes:
    """Of the finished model."""
    return (run.model / "model.safetensors").read_bytes()


_UNDISTURBED: dict[str, bytes] = {}


def undisturbed(overrides: list[str], tmp_path: Path) -> bytes:
    """The weights of the same run, trained here from first to last in a process of its own."""
    runs_dir = tmp_path / "undisturbed"
    plain = [text for text in overrides if not text.startswith(("cluster", "runs_dir=", "tracker", "study="))]
    here = [*plain, f"runs_dir={runs_dir}", "tracker=jsonl"]
    key = compose(here).config_hash
    if key not in _UNDISTURBED:
        _UNDISTURBED[key] = weights(trained(1, here))
    return _UNDISTURBED[key]


def steps_logged(run: RunDir) -> list[int]:
    """Of every row with a training loss, in the order they were written."""
    rows = map(json.loads, run.metrics_file.read_text().splitlines())
    return [row["step"] for row in rows if "train/loss" in row]


def queued_names() -> list[str]:
    """Of the jobs in the queue, each task of an array by itself."""
    return subprocess.run(["squeue", "-h", "-r", "-o", "%j"], capture_output=True, text=True, check=True).stdout.split()


def occupy(nodes: int = 2) -> str:
    """A job of a higher partition on whole nodes; returns its number."""
    command = ["sbatch", "--parsable", "-p", "high", "--exclusive", "-N", str(nodes), "-o", "/dev/null"]
    done = subprocess.run([*command, "--wrap", "sleep 600"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def release(job: str) -> None:
    subprocess.run(["scancel", job], check=True)


def wait_for_finish(runs_dir: Path, name: str) -> None:
    rows = ended(runs_dir, name)
    assert {row["state"] for row in rows} == {"finished"}, rows
