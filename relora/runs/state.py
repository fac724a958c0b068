"""The states of runs, from their own files and, for submitted runs, from SLURM's reports of their jobs."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relora.common.errors import DamagedFile, RunError
from relora.runs import slurm
from relora.runs.rundir import RunDir, Status, read_json

ACCOUNTING_SECONDS = 60
"""For this time after the submission, a job may be unknown to both squeue and sacct."""


@dataclass(frozen=True, kw_only=True)
class ObservedState:
    """The observed state of one run."""

    name: str
    """missing (never started), queued, running, finished, failed, interrupted, cancelled, or unreadable (a file of the
    run is damaged)."""
    message: str = ""
    """Why the run is in this state; empty if there is nothing to add."""
    requeues: int = 0
    """How often SLURM has requeued the run's job."""

    @property
    def is_under_way(self) -> bool:
        """Whether the state may change without an action of the user."""
        return self.name in ("queued", "running")

    @property
    def needs_launch(self) -> bool:
        """Whether the run is not finished and will not finish unless it is launched."""
        return not self.is_under_way and self.name != "finished"


def observe(runs: Sequence[RunDir]) -> list[ObservedState]:
    """Return the current state of each run.

    If the process of a run died without recording its end, this writes how the run ended into its status. So no dead
    run stays "running".

    Raises:
        RunError: SLURM must be asked, and does not answer.
    """
    submissions = [_submission(run) for run in runs]
    asked = [
        submission["job"]
        for run, submission in zip(runs, submissions, strict=True)
        if submission and ((known := run.known_status) is None or known.state != "finished")
    ]
    # Ask SLURM first. If a job has ended by then, its last writes are complete when its files are read after this.
    answer = slurm.ask(asked if slurm.is_here() else [])
    return [_of_readable(run, submission, answer) for run, submission in zip(runs, submissions, strict=True)]


def _submission(run: RunDir) -> dict[str, Any]:
    """Return the record of the run's SLURM job; empty if it was not submitted, or if the record is damaged."""
    try:
        values = read_json(run.submission_file)
    except DamagedFile:
        return {}
    kinds = {"job": str, "log": str, "needs": dict, "submitted_ms": int}
    return values if all(isinstance(values.get(name), kind) for name, kind in kinds.items()) else {}


def _of_readable(run: RunDir, submission: dict[str, Any], answer: slurm.Answer) -> ObservedState:
    """Like `_of`, but report a status that cannot be read as a state, so that the other runs can still be observed."""
    try:
        return _of(run, submission, answer)
    except DamagedFile as error:
        job = answer.of(submission["job"]) if submission else None
        if (job is not None and job.alive) or (run.path.is_dir() and run.is_locked):
            return ObservedState(name="running", message=str(error))
        return ObservedState(name="unreadable", message=str(error))


def _of(run: RunDir, submission: dict[str, Any], answer: slurm.Answer) -> ObservedState:
    status = run.status
    if status is not None and status.state == "finished":
        return ObservedState(name="finished", requeues=status.requeues)
    if not submission:
        return _of_local(run, status)
    if not slurm.is_here():
        message = f"read from its files: its SLURM job {submission['job']} cannot be checked from this machine"
        return ObservedState(name=status.state if status else "queued", message=message)
    job = answer.of(submission["job"])
    if job is not None and job.waits:
        return ObservedState(name="queued", message=job.reason, requeues=job.requeues)
    if job is not None and job.alive:
        message = "being cancelled" if submission.get("cancelled") else f"on {job.node}" if job.node else ""
        return ObservedState(name="running", message=message, requeues=job.requeues)
    ended_by_itself = status is not None and status.slurm_job_id == submission["job"] and status.state != "running"
    if ended_by_itself and status is not None and (job is None or job.state in ("COMPLETED", "FAILED")):
        return ObservedState(name=status.state, message=status.message, requeues=job.requeues if job else 0)
    if job is None:
        if submission.get("cancelled"):
            return _settled(run, status, "cancelled", submission.get("why", "cancelled"))
        if time.time() * 1000 - submission["submitted_ms"] < 1000 * ACCOUNTING_SECONDS:
            return ObservedState(name="queued", message="submitted")
        message = f"SLURM no longer knows its job {submission['job']}, so how it ended is unknown"
        return _settled(run, status, "failed", message)
    if submission.get("cancelled") and job.state == "CANCELLED":
        why = submission.get("why", "cancelled")
        message = job.end_reason if why == "cancelled" else why
        return _settled(run, status, "cancelled", message, job.requeues)
    name = "cancelled" if job.state == "CANCELLED" else "failed"
    message = _with_ranks(run, _end_reason(job, Path(submission["log"])))
    return _settled(run, status, name, message, job.requeues)


def log_of(folder: Path, job: str) -> Path:
    """Return the file into which submitit writes the output of a job."""
    return folder / f"{job}_0_log.out"


def _end_reason(job: slurm.Job, log: Path) -> str:
    """Return how SLURM says that the job ended. Some configurations report "out of memory" only in the job's log."""
    if log.is_file() and job.state != "COMPLETED":
        last_attempt = log.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
        if re.search(r"slurmstepd.*(exceeded memory limit|oom.kill)", last_attempt, re.IGNORECASE):
            return slurm.REASON_BY_STATE["OUT_OF_MEMORY"]
    return job.end_reason


def _of_local(run: RunDir, status: Status | None) -> ObservedState:
    if status is None:
        return ObservedState(name="missing")
    if status.state == "running" and not run.is_locked:
        message = _with_ranks(run, "its process died; the newest checkpoint is kept")
        return _settled(run, status, "interrupted", message)
    return ObservedState(name=status.state, message=status.message)


def _with_ranks(run: RunDir, message: str) -> str:
    """Add the errors of the other processes to a message, because rank 0 could not report them."""
    return "; ".join([*run.rank_messages, message])


def _settled(run: RunDir, seen: Status | None, name: str, message: str, requeues: int = 0) -> ObservedState:
    """Record the end of a run that could not record it itself. Change nothing if the run has recorded it meanwhile."""
    try:
        with run.locked(wait_seconds=0):
            status = run.status
            if status is not None and seen is not None and status.state != seen.state:
                return ObservedState(name=status.state, message=status.message, requeues=requeues)
            status = status or Status(state=name, attempt=0, host="", pid=0)
            if (status.state, status.message) != (name, message):
                status.state, status.message = name, message
                status.ended_ms = time.time_ns() // 1_000_000
                run.status = status
    except RunError:
        return ObservedState(name="running", requeues=requeues)
    except OSError:
        pass  # the folder may belong to another user; the answer is still right
    return ObservedState(name=name, message=message, requeues=requeues)
