"""Ask SLURM for the state of jobs and control them: squeue, sacct, scontrol, scancel, sbatch --test-only."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from relora.common.errors import ConfigError, RunError

COMMAND_SECONDS = 60
IDS_PER_COMMAND = 500
DEFAULT_MAX_ARRAY_SIZE = 1001
"""SLURM's own default."""

WAITING = ("PENDING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
REASON_BY_STATE = {
    "OUT_OF_MEMORY": "out of memory: SLURM killed it; raise cluster.mem_gb or lower trainer.sequences_per_micro_step",
    "TIMEOUT": "timed out: it was killed at the end of its walltime; raise cluster.timeout_minutes",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "it missed its deadline",
    "PREEMPTED": "preempted and not requeued",
    "REVOKED": "its cluster revoked it",
}
ENDED_STATES = ("COMPLETED", "FAILED", "CANCELLED", *REASON_BY_STATE)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as SLURM reports it."""

    state: str
    """SLURM's name of the state: PENDING, RUNNING, COMPLETED, FAILED, ..."""
    reason: str = ""
    """Why the job waits, or who cancelled it."""
    exit_code: str = ""
    """CODE:SIGNAL."""
    node: str = ""
    requeues: int = 0

    @property
    def waits(self) -> bool:
        """Whether the job is in the queue."""
        return self.state in WAITING

    @property
    def alive(self) -> bool:
        """Whether the job may still write files."""
        return self.state not in ENDED_STATES

    @property
    def end_reason(self) -> str:
        """How the job ended, as text for the user. This is for a job that did not record its end itself."""
        if self.state == "CANCELLED":
            return f"cancelled {self.reason}".strip()
        if self.state in REASON_BY_STATE:
            return REASON_BY_STATE[self.state]
        code, _, number = self.exit_code.partition(":")
        # srun reports a signal that killed a task as its exit code. The codes of relora itself are 0, 1, 2 and 130.
        if number in ("", "0") and code.isdigit() and (2 < int(code) < 32 or (128 < int(code) < 160 and code != "130")):
            number = str(int(code) % 128)
        if number not in ("", "0"):
            return f"killed by signal {number}{f' on {self.node}' if self.node else ''}"
        return f"its process ended with exit code {code or 'unknown'} and said nothing"


def is_here() -> bool:
    """Return whether SLURM can be asked from this machine."""
    return shutil.which("squeue") is not None


def own_job() -> str:
    """Return the SLURM job of this process; empty outside a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def own_requeues() -> int:
    """Return how often SLURM has requeued the job of this process."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The jobs that SLURM knows."""

    jobs: dict[str, Job]
    """Jobs by id ("4711", or "4711_3" in an array). Tasks cancelled in the queue are listed under their array's id."""

    def of(self, job: str) -> Job | None:
        """Return the job, or the array that it was cancelled with; None if SLURM knows neither."""
        return self.jobs.get(job) or self.jobs.get(job.partition("_")[0])


def ask(ids: Sequence[str]) -> Answer:
    """Ask SLURM about jobs. squeue knows queued and recently ended jobs, and sacct knows older ones.

    If a job is missing in the answer, it has ended and SLURM does not know how. Without accounting, this happens soon
    after the end of a job.

    Raises:
        RunError: SLURM does not answer.
    """
    found: dict[str, Job] = {}
    pools: dict[str, Job] = {}
    masters = sorted({job.partition("_")[0] for job in ids}, key=int)
    for start in range(0, len(masters), IDS_PER_COMMAND):
        chosen = ",".join(masters[start : start + IDS_PER_COMMAND])
        fields = "JobID,State,ExitCode,NodeList"
        for line in _lines("sacct", "-n", "-P", "-X", "-D", "-o", fields, "-j", chosen, may_fail=True) or []:
            shown, state, exit_code, node = line.split("|")
            word, _, by = state.partition(" ")
            # The remaining tasks of an array share one row, which may be older than the rows of single tasks.
            into = pools if "[" in shown else found
            for job in _expanded(shown):
                requeues = found[job].requeues + 1 if job in found and into is found else 0
                into[job] = Job(state=word, reason=by, exit_code=exit_code, node=node, requeues=requeues)
    known = {**pools, **found}
    # Ask for all jobs of the user, because squeue refuses a list with an id that left the queue long ago.
    fields = "JobArrayID:|,State:|,Reason:|,NodeList:|,RestartCnt:|"
    in_queue: set[str] = set()
    for line in _lines("squeue", "-h", "-r", "--me", "-t", "all", "-O", fields) if ids else []:
        job, state, reason, node, requeues = line.split("|")[:5]
        in_queue.add(job)
        if job.partition("_")[0] in masters and (state not in ENDED_STATES or job not in found):
            reason = "" if reason == "None" else reason
            known[job] = Job(state=state, reason=reason, node=node, requeues=int(requeues))
    # The row of an array in sacct may still count a task that was cancelled in the queue.
    return Answer(jobs={job: found for job, found in known.items() if job in in_queue or not found.waits})


def _expanded(shown: str) -> list[str]:
    """Expand 4711_[2-4,7%16] into the ids of its tasks."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", shown)
    if match is None:
        return [shown]
    tasks: list[str] = []
    for part in match[2].split(","):
        low, _, high = part.partition("-")
        tasks += [f"{match[1]}_{task}" for task in range(int(low), int(high or low) + 1)]
    return tasks


@overload
def _lines(*command: str, may_fail: Literal[False] = False) -> list[str]: ...
@overload
def _lines(*command: str, may_fail: Literal[True]) -> list[str] | None: ...
def _lines(*command: str, may_fail: bool = False) -> list[str] | None:
    """Return the lines that a command prints. If it fails, return None with `may_fail`, and raise RunError without."""
    if may_fail and shutil.which(command[0]) is None:
        return None
    done = _run(*command)
    if done.returncode and not may_fail:
        raise RunError(f"{command[0]} fails: {_last_line(done.stderr)}")
    return None if done.returncode else [line for line in done.stdout.splitlines() if line.strip()]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise RunError(f"{command[0]} is not installed here: this machine is no SLURM submit node; use cluster=local")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(f"{command[0]} does not answer within {COMMAND_SECONDS} s") from None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def check_script(text: str, folder: Path) -> None:
    """Let sbatch check a script without submitting it.

    Args:
        text: The script.
        folder: Where the script is written for the check.

    Raises:
        ConfigError: sbatch refuses the script. Its message names unknown partitions, accounts and options, and
            requests that no node can meet.
    """
    script = folder / "check.sh"
    script.write_text(text)
    done = _run("sbatch", "--test-only", os.fspath(script))
    if done.returncode:
        said = [re.sub(r"^(sbatch: )?(error: )?", "", line) for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"SLURM would refuse these jobs: {'; '.join(said)}; see the cluster.* settings")


def max_array_size() -> int:
    """Return how many tasks an array may have; 1 if the cluster accepts no arrays."""
    for line in _lines("scontrol", "show", "config"):
        match = re.match(r"MaxArraySize\s*=\s*(\d+)", line)
        if match:
            return max(1, int(match[1]))
    return DEFAULT_MAX_ARRAY_SIZE


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs. Raises RunError if scancel fails."""
    chosen = list(ids)
    for start in range(0, len(chosen), IDS_PER_COMMAND):
        done = _run("scancel", *chosen[start : start + IDS_PER_COMMAND])
        if done.returncode:
            raise RunError(f"scancel fails: {_last_line(done.stderr)}")


def requeue(job: str) -> None:
    """Requeue a running job; SLURM ends its processes. Raises RunError if scontrol fails."""
    done = _run("scontrol", "requeue", job)
    if done.returncode:
        raise RunError(f"scontrol requeue {job} fails: {_last_line(done.stderr)}")


def is_requeueing(job: str) -> bool:
    """Return whether SLURM itself is ending this running job: by preemption, node failure or at its walltime."""
    text = " ".join(_lines("scontrol", "show", "job", "-o", job, may_fail=True) or [])
    state, preempted = re.search(r"JobState=(\w+)", text), re.search(r"PreemptTime=(\S+)", text)
    if state is not None and state[1] in ("TIMEOUT", "PREEMPTED", "NODE_FAIL"):
        return True
    return preempted is not None and preempted[1] not in ("None", "Unknown")


def is_cancelled(job: str) -> bool:
    """Return whether a user has cancelled this running job."""
    text = " ".join(_lines("scontrol", "show", "job", "-o", job, may_fail=True) or [])
    return "JobState=CANCELLED" in text
