"""When a launch stops because its runs fail."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.common.errors import printable
from relora.runs.rundir import RunDir

ALIKE = 2
"""If so many runs have failed with the same message and none has finished, the others would fail too."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run of a launch that has ended."""

    name: str
    state: str
    message: str

    @property
    def alike(self) -> str:
        """The message without the run's own name: two runs with equal texts have failed alike."""
        return self.message.replace(self.name, "RUN")


def ended(run: RunDir, *, otherwise: str = "") -> Ended | None:
    """Return how a run has ended; None if it runs or was never started.

    Args:
        run: The folder of the run.
        otherwise: How its process ended, if that could not write it into the status.
    """
    if otherwise:
        return Ended(name=run.path.name, state="failed", message=otherwise)
    status = run.known_status
    if status is None or status.state not in ("finished", "failed"):
        return None
    return Ended(name=run.path.name, state=status.state, message=status.message)


def reason_to_stop(runs: Sequence[Ended], max_failures: int | None) -> str | None:
    """Return why no more runs of a launch should be started, None if they should.

    Args:
        runs: The runs of the launch that have ended.
        max_failures: The most runs that may fail. None: any number, if they do not fail alike from the first on.
    """
    failed = [run for run in runs if run.state == "failed"]
    if not failed:
        return None
    last = printable(failed[-1].message.strip().partition("\n")[0])
    if max_failures is not None:
        if len(failed) < max_failures:
            return None
        count = f"{len(failed)} run{'s' if len(failed) > 1 else ''} failed"
        return f"{count} (max_failures={max_failures}), the last one with: {last}"
    if len(failed) < ALIKE or len(failed) < len(runs) or len({run.alike for run in failed}) > 1:
        return None
    return f"the first {len(failed)} runs failed alike: {last}"
