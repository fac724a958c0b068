"""Stop runs that are queued or running, on SLURM or on this machine."""

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

from relora.common.errors import RunError
from relora.runs import slurm
from relora.runs.rundir import RunDir, read_json, write_json
from relora.runs.state import observe
from relora.studies.study import Planned


def stop(planned: Sequence[Planned], *, beside: Sequence[str] = (), why: str = "cancelled") -> list[str]:
    """Stop the runs that are queued or running, with a checkpoint. They can be launched again. Return their names.

    Args:
        planned: Any runs.
        beside: SLURM jobs that are not runs. Those that are queued or running are cancelled too.
        why: The reason that the user sees for a SLURM job that never began.

    Raises:
        RunError: This machine cannot stop one of the runs, or SLURM does not answer.
    """
    states = observe([item.run for item in planned])
    active = [item for item, state in zip(planned, states, strict=True) if state.is_under_way]
    submissions = [read_json(item.run.submission_file) for item in active]
    answer = slurm.ask(beside if slurm.is_here() else [])
    jobs = [submission["job"] for submission in submissions if submission]
    jobs += [job for job in beside if (known := answer.of(job)) is not None and known.alive]
    if jobs:
        slurm.cancel(jobs)
    problems: list[str] = []
    for item, submission in zip(active, submissions, strict=True):
        if submission:
            # SLURM keeps no record of a task that was cancelled before it began.
            write_json(item.run.submission_file, {**submission, "cancelled": True, "why": why})
        else:
            problems += _terminate(item.run)
    if problems:
        raise RunError("; ".join(problems))
    return [item.config.name for item in active]


def _terminate(run: RunDir) -> list[str]:
    """Ask the run's process on this machine to stop with a checkpoint. Return why that is not possible, [] if it is."""
    status = run.known_status
    if status is None or status.host != socket.gethostname():
        return [f"{run.path.name} is being trained on {status.host if status else 'another machine'}; cancel it there"]
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(status.pid, signal.SIGTERM)
    return []
