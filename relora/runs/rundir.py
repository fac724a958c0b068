"""What a run's folder holds, and the state that its status.json tells."""

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
"""The kind of each of a status's fields that a reader relies on."""

MENDED_BY_A_LAUNCH = "the run's launch command mends it"

PROBE_SECONDS = 1.0
"""Longer than another process asks whether a run is locked, which takes the lock for a moment."""

LEFTOVER_SECONDS = 60.0
"""Longer than a write of a small file takes."""


@dataclass(kw_only=True)
class Attempt:
    """One try at a run: where it ran, and from which step on. What is not known is empty."""

    host: str = field(default_factory=socket.gethostname)
    device: str = ""
    """"cpu", or the name of the GPU."""
    cpu: str = ""
    """The model of the CPU and the instruction set that torch takes of it."""
    torch: str = ""
    """Its version."""
    threads: int | None = None
    """Of torch, within an operation."""
    ranks: int = 1
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    ended_ms: int | None = None
    """None while it goes on, and where it was killed."""
    first_step: int | None = None
    """The step of the checkpoint that it went on from, 0 at the beginning; None before it began to train."""
    seconds_before: float | None = None
    """Training seconds of the run at `first_step`, those of earlier attempts that were kept."""

    @property
    def has_trained(self) -> bool:
        """Whether it came so far as to begin."""
        return self.first_step is not None

    @property
    def machine(self) -> str:
        """What the bits of its results depend on, for people."""
        cpu = f"{self.cpu}, {self.threads} threads" if self.device == "cpu" else self.device
        ranks = f"{self.ranks} ranks on " if self.ranks > 1 else ""
        return f"{ranks}{cpu}, torch {self.torch}"

    def differs_from(self, other: "Attempt") -> bool:
        """Whether its results may differ in their last bits; what is not known of an attempt differs from nothing."""
        names = ("device", "cpu", "torch", "threads", "ranks")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return any(own != others and own not in ("", None) and others not in ("", None) for own, others in pairs)


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
    """Processes that train it together."""
    corpus: dict[str, str] = field(default_factory=dict)
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """Of the first attempt."""
    ended_ms: int | None = None
    stopped_by: str = ""
    """The signal that interrupted it, as in relora.common.signals."""
    message: str = ""
    """Why a run failed or was interrupted."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Results, once finished."""
    attempts: list[Attempt] = field(default_factory=list)
    """Every attempt that is known, in order; the last one is the newest."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """Once finished, the training seconds by machine and switches, as relora.runs.spent has them; empty in old runs.

    Those of a warm start that another run trained are among them.
    """

    @property
    def machine_changes(self) -> list[tuple[int, str]]:
        """(first step, machine) of the attempts that trained on another machine than the attempt before them."""
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
        return {rank: file.read_text(errors="replace").partition("\n")[0] for rank, file in files}

    @property
    def told_by_ranks(self) -> list[str]:
        """What ended the ranks other than the first, in words."""
        return [f"rank {rank} failed: {message}" for rank, message in self.rank_errors.items()]

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.path / "model"

    @property
    def status(self) -> Status | None:
        """The last state written, None before the first attempt. Raises DamagedFile."""
        values = read_json(self.status_file)
        try:
            return status_of(values) if values else None
        except (TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(self.status_file, reason(error), MENDED_BY_A_LAUNCH) from error

    @status.setter
    def status(self, status: Status) -> None:
        write_json(self.status_file, asdict(status))

    def end_with(self, status: Status) -> None:
        """Write the last state of an attempt, on a full disk over the one that says running. Raises OSError."""
        try:
            self.status = status
        except OSError:
            overwrite(self.status_file, json.dumps(asdict(status)))

    @property
    def status_file(self) -> Path:
        """What holds it."""
        return self.path / "status.json"

    @property
    def known_status(self) -> Status | None:
        """The last state written, None too where it cannot be read: for whoever can do without."""
        try:
            return self.status
        except DamagedFile:
            return None

    def remove_leftovers(self) -> None:
        """Remove the *.tmp files of writes that a kill cut short. Called by the process that holds the run's lock.

        The submission and MLflow's state are written without that lock, so their files go when they are old.
        """
        for file in self.path.rglob("*.tmp"):
            others = file.name.startswith((self.submission_file.name, self.mirror_file.name))
            with suppress(FileNotFoundError):
                if not others or time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()

    @contextmanager
    def locked(self, wait_seconds: float = PROBE_SECONDS):
        """Hold the run for this process. Raises RunError when another one trains it for longer than `wait_seconds`."""
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
        """Whether some process trains this run now."""
        lock = FileLock(self.path / ".lock")
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True


def status_of(values: dict[str, Any]) -> Status:
    """The status that `values` describe; one from before attempts were recorded has one attempt, its last.

    Raises ValueError or TypeError where they describe none.
    """
    if values.get("state") not in STATES:
        raise ValueError(f"its state is {values.get('state')!r}, which is none of {', '.join(STATES)}")
    for name, kind in KINDS.items():
        if not isinstance(values.get(name, kind()), kind):
            raise ValueError(f"its {name} is {values[name]!r}, which is no {kind.__name__}")
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
