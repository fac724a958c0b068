"""What a run's folder holds, and the state that its status.json tells."""

import json
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora.errors import ConfigError, RunError

PROBE_SECONDS = 1.0
"""Longer than another process asks whether a run is locked, which takes the lock for a moment."""


@dataclass(kw_only=True)
class Status:
    """How a run stands. A "running" one whose lock is free was killed."""

    state: str
    """running, finished, failed, interrupted (it goes on when it is launched again) or cancelled."""
    attempt: int = 1
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    device: str = ""
    slurm_job_id: str = ""
    requeues: int = 0
    """How often SLURM had put that job back into the queue before this attempt."""
    git_commit: str | None = None
    ranks: int = 1
    """Processes that train it together; 0 once attempts differed in that, and with it steps that are replayed."""
    corpus: dict[str, str] = field(default_factory=dict)
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """Of the first attempt."""
    ended_ms: int | None = None
    stopped_by: str = ""
    """The signal that interrupted it, as in STOP_SIGNALS."""
    message: str = ""
    """Why a run failed or was interrupted."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Results, once finished."""


class RunDir:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config_file(self) -> Path:
        """The frozen config."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """The metrics, the truth."""
        return self.path / "metrics.jsonl"

    @property
    def mirror_file(self) -> Path:
        """What MLflow has of them."""
        return self.path / "mlflow.json"

    @property
    def submission_file(self) -> Path:
        """The SLURM job that the run was submitted as, {"job": id, "log": path, "submitted_ms": time}."""
        return self.path / "submission.json"

    @property
    def launch_file(self) -> Path:
        """The overrides that the run was launched with."""
        return self.path / "launch.json"

    @property
    def checkpoints(self) -> Path:
        """State to resume from."""
        return self.path / "checkpoints"

    def error_file(self, rank: int) -> Path:
        """What ended a rank other than the first in this attempt: a line for people, and the traceback."""
        return self.path / f"rank-{rank}.error"

    @property
    def rank_errors(self) -> dict[int, str]:
        """The line for people of every rank that left one."""
        files = sorted((int(file.stem.removeprefix("rank-")), file) for file in self.path.glob("rank-*.error"))
        return {rank: file.read_text().partition("\n")[0] for rank, file in files}

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.path / "model"

    @property
    def status(self) -> Status | None:
        """The last state written, None before the first attempt."""
        values = read_json(self.path / "status.json")
        known = {item.name for item in fields(Status)}
        return Status(**{name: value for name, value in values.items() if name in known}) if values else None

    @status.setter
    def status(self, status: Status) -> None:
        write_json(self.path / "status.json", asdict(status))

    @contextmanager
    def locked(self, wait_seconds: float = PROBE_SECONDS):
        """Hold the run for this process. Raises RunError when another one trains it for longer than `wait_seconds`."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=wait_seconds)
        except Timeout:
            status = self.status
            who = f"process {status.pid} on {status.host}" if status else "another process"
            raise RunError(f"{self.path} is being trained by {who}; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.release()

    @property
    def is_locked(self) -> bool:
        """Whether some process trains this run now."""
        lock = FileLock(self.path / ".lock")
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none. Raises ConfigError for a file that holds none."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be read: it holds no object")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object; the file is whole at any time."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that holds its old text or the new one at any time, a power cut included."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
