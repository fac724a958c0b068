"""The expected time of runs: from finished runs, or measured here."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from relora.common.errors import print_note
from relora.config.plan import Plan
from relora.config.run import RunConfig
from relora.runs.throughput import Estimate, Throughput

if TYPE_CHECKING:
    from relora.training.measure import Measured


class Speeds(Protocol):
    """Estimates the time of runs."""

    def estimate(self, config: RunConfig, made: Plan, *, on_gpu: bool) -> Estimate | None:
        """Return the expected time of a run; None if it is not known."""
        ...


class MeasuredHere:
    """Trains a few steps of each kind of run on this machine."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[object, ...], Measured] = {}

    def estimate(self, config: RunConfig, made: Plan, *, on_gpu: bool) -> Estimate:
        """Return the expected time of a run. Runs that differ only in rates, schedule or seed are measured once."""
        from relora.training.measure import measure

        key = (made.flops_per_update, made.peak_bytes, config.method.name, config.trainer.precision)
        if key not in self._seconds:
            print_note(f"measuring some steps of {config.name}")
            self._seconds[key] = measure(config)
        found = self._seconds[key]
        seconds = found.training_seconds(config)
        return Estimate(
            training_seconds=seconds,
            seconds=seconds,
            flops_per_second=made.total_flops / seconds,
            basis=f"some steps on {found.device} here, {found.step_seconds:.3g} s each",
        )


def speeds_of(config: RunConfig, *, measure: bool) -> Speeds:
    """Return the speeds that are measured here, or else those of the finished runs beside a run."""
    return MeasuredHere() if measure else Throughput(Path(config.runs_dir))
