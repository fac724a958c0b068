"""The files of a run's folder, and the run's state as status.json records it."""

import json
import os
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora.common.errors import DamagedFile, RunError
from relora.common.files import overwrite, read_json, reason, write_json

STATES = ("running", "finished", "failed", "interrupted", "cancelled")
KINDS = {
    **dict.fromkeys(("host", "device", "slurm_job_id", "stopped_by", "message"), str),
    **dict.fromkeys(("attempt", "pid", "requeues", "ranks", "started_ms"), int),
    **dict.fromkeys(("corpus", "summary"), dict),
    "attempts": list,
}
"""The types of the status fields that readers rely on."""

REPAIRED_BY_LAUNCH = "the run's launch command repairs it"

PROBE_SECONDS = 1.0
"""Another process that checks whether a run is locked holds the lock for less than this time."""

LEFTOVER_SECONDS = 60.0
"""The write of a small file takes less than this time."""


@dataclass(kw_only=True)
class Attempt:
    """One attempt at a run: where it ran, and from which step on. Unknown fields are empty."""

    host: str = field(default_factory=socket.gethostname)
    device: str = ""
    """"cpu", or the name of the GPU."""
    cpu: str = ""
    """The model of the CPU, and the instruction set that torch uses on it."""
    torch: str = ""
    """The version of torch."""
    threads: int | None = None
    """The threads that torch uses within an operation."""
    ranks: int = 1
    code: str = ""
    """The hash of the code that it ran (relora.runs.code)."""
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    ended_ms: int | None = None
    """None while the attempt runs, and if it was killed."""
    first_step: int | None = None
    """The step of the checkpoint that it resumed from, 0 without a checkpoint; None before it began to train."""
    seconds_before: float | None = None
    """Training seconds of the run at `first_step`: those of earlier attempts whose steps were kept."""

    @property
    def has_trained(self) -> bool:
        """Whether the attempt began to train."""
        return self.first_step is not None

    @property
    def machine(self) -> str:
        """The parts of the machine that the bits of the results depend on, as text for the user."""
        cpu = f"{self.cpu}, {self.threads} threads" if self.device == "cpu" else self.device
        ranks = f"{self.ranks} ranks on " if self.ranks > 1 else ""
        return f"{ranks}{cpu}, torch {self.torch}"

    def differs_from(self, other: "Attempt") -> bool:
        """Return whether the two attempts' results may differ in their last bits. Unknown fields are not compared."""
        names = ("device", "cpu", "torch", "threads", "ranks")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return any(own != others and own not in ("", None) and others not in ("", None) for own, others in pairs)


@dataclass(kw_only=True)
class Status:
    """The status of a run. If the state is "running" but the run's lock is free, the run was killed."""

    state: str
    """running, finished, failed, interrupted (the run continues when it is launched again) or cancelled."""
    attempt: int = 1
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    device: str = ""
    slurm_job_id: str = ""
    requeues: int = 0
    """How often SLURM requeued that job before this attempt."""
    git_commit: str | None = None
    ranks: int = 1
    """The world size: the processes that train the run together."""
    corpus: dict[str, str] = field(default_factory=dict)
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """The start of the first attempt."""
    ended_ms: int | None = None
    stopped_by: str = ""
    """The signal that interrupted the run, as in relora.common.signals."""
    message: str = ""
    """Why the run failed or was interrupted."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The results of a finished run."""
    attempts: list[Attempt] = field(default_factory=list)
    """Every known attempt, in order. The newest is the last."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """The training seconds of a finished run by machine and switches (relora.runs.spent); empty in old runs.

    They include the seconds of a warm start that another run trained.
    """

    @property
    def machine_changes(self) -> list[tuple[int, str]]:
        """(first step, machine) of every attempt that trained on a different machine than the attempt before it."""
        trained = [attempt for attempt in self.attempts if attempt.has_trained]
        return [(now.first_step or 0, now.machine) for before, now in pairwise(trained) if now.differs_from(before)]


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
        """The metrics: the original record."""
        return self.path / "metrics.jsonl"

    @property
    def mirror_file(self) -> Path:
        """The record of the metrics that MLflow has."""
        return self.path / "mlflow.json"

    @property
    def submission_file(self) -> Path:
        """The SLURM job that the run was submitted as, {"job": id, "log": path, "code": hash, ...}."""
        return self.path / "submission.json"

    @property
    def launch_file(self) -> Path:
        """The overrides that the run was launched with."""
        return self.path / "launch.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints that the run resumes from."""
        return self.path / "checkpoints"

    def changes_file(self, code: str) -> Path:
        """Return the file with what the code with that hash changed since its commit. It is missing without changes."""
        return self.path / "code" / f"{code}.diff"

    def error_file(self, rank: int) -> Path:
        """Return the file of the error that ended process `rank` (not 0): one line for the user, and the traceback."""
        return self.path / f"rank-{rank}.error"

    @property
    def rank_errors(self) -> dict[int, str]:
        """The line for the user in each error file, by rank."""
        files = sorted((int(file.stem.removeprefix("rank-")), file) for file in self.path.glob("rank-*.error"))
        return {rank: file.read_text(errors="replace").partition("\n")[0] for rank, file in files}

    @property
    def rank_messages(self) -> list[str]:
        """The errors that ended processes other than rank 0, as text for the user."""
        return [f"rank {rank} failed: {message}" for rank, message in self.rank_errors.items()]

    @property
    def model(self) -> Path:
        """The folder of the trained model, in Hugging Face format."""
        return self.path / "model"

    @property
    def status(self) -> Status | None:
        """The last status written; None before the first attempt. Raises DamagedFile if it cannot be read."""
        values = read_json(self.status_file)
        try:
            return status_of(values) if values else None
        except (TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(self.status_file, reason(error), REPAIRED_BY_LAUNCH) from error

    @status.setter
    def status(self, status: Status) -> None:
        write_json(self.status_file, asdict(status))

    def end_with(self, status: Status) -> None:
        """Write the last status of an attempt. On a full disk, the file is overwritten in place.

        Raises OSError if that fails too.
        """
        try:
            self.status = status
        except OSError:
            overwrite(self.status_file, json.dumps(asdict(status)))

    @property
    def status_file(self) -> Path:
        """The file of the status."""
        return self.path / "status.json"

    @property
    def known_status(self) -> Status | None:
        """The last status written; None also if it cannot be read. This is for callers that do not need the status."""
        try:
            return self.status
        except DamagedFile:
            return None

    def remove_leftovers(self) -> None:
        """Remove the *.tmp files that a killed process left. The caller must hold the run's lock.

        The submission and MLflow's state are written without that lock, so their *.tmp files are removed only when
        they are old.
        """
        for file in self.path.rglob("*.tmp"):
            others = file.name.startswith((self.submission_file.name, self.mirror_file.name))
            with suppress(FileNotFoundError):
                if not others or time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()

    @contextmanager
    def locked(self, wait_seconds: float = PROBE_SECONDS):
        """Hold the run's lock. Raises RunError if another process still holds it after `wait_seconds`."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=wait_seconds)
        except Timeout:
            status = self.known_status
            who = f"process {status.pid} on {status.host}" if status else "another process"
            raise RunError(f"{self.path} is being trained by {who}; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.release()

    @property
    def is_locked(self) -> bool:
        """Whether a process trains this run now."""
        lock = FileLock(self.path / ".lock")
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True


def status_of(values: dict[str, Any]) -> Status:
    """Build the status from the values in status.json.

    An old status without a list of attempts gets one attempt, its last.

    Raises ValueError or TypeError if the values describe no valid status.
    """
    if values.get("state") not in STATES:
        raise ValueError(f"its state is {values.get('state')!r}, which is not one of {', '.join(STATES)}")
    for name, kind in KINDS.items():
        if not isinstance(values.get(name, kind()), kind):
            raise ValueError(f"its {name} is {values[name]!r}, which is not of type {kind.__name__}")
    known, of_attempt = ({item.name for item in fields(kind)} for kind in (Status, Attempt))
    status = Status(**{name: value for name, value in values.items() if name in known})
    if "attempts" in values:
        status.attempts = [
            Attempt(**{name: value for name, value in attempt.items() if name in of_attempt})
            for attempt in values["attempts"]
        ]
    elif status.attempt:
        status.attempts = [
            Attempt(
                host=status.host,
                device=status.device,
                ranks=status.ranks,
                started_ms=status.started_ms,
                ended_ms=status.ended_ms,
                first_step=0,
            )
        ]
    return status
