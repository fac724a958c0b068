"""The FLOPs per second of earlier runs of a folder, from which the hours of a new run are estimated."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from relora.common.errors import ConfigError, DamagedFile
from relora.common.tables import some_of
from relora.config.frozen import thaw
from relora.config.plan import Plan, run_plan
from relora.config.run import RunConfig
from relora.runs.rundir import RunDir, Status

MOST_READ = 12
"""The finished runs that are read for an estimate: those whose names are most alike, the newest first."""
MOST_TRIED = 200
"""The folders that are looked at to find them."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected time of a run."""

    training_seconds: float
    """Seconds of optimizer steps and restarts."""
    seconds: float
    """With the start of the process, validations and the export, as far as they are known."""
    flops_per_second: float
    basis: str
    """Where the FLOPs per second come from, for the user."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run whose speed is known."""

    config: RunConfig
    status: Status

    @cached_property
    def plan(self) -> Plan:
        """The run's own plan."""
        return run_plan(self.config)

    @property
    def training_seconds(self) -> float:
        """Seconds of optimizer steps and restarts."""
        return float(self.status.summary["training_seconds"])

    @property
    def flops_per_second(self) -> float:
        """The FLOPs of the run by the plan's arithmetic, per training second."""
        return self.plan.total_flops / self.training_seconds

    @property
    def overhead_seconds(self) -> float | None:
        """Seconds outside training. They are not known if the run had several attempts."""
        if len(self.status.attempts) > 1:
            return None
        return max(0.0, float(self.status.summary["wall_clock_seconds"]) - self.training_seconds)

    def likeness(self, config: RunConfig) -> tuple[bool, ...]:
        """Return what this run shares with another one that its speed depends on, the most important first."""
        own, other = self.config, config
        return (
            own.model.shape(1) == other.model.shape(1) and _sequence(own) == _sequence(other),
            own.method.name == other.method.name,
            own.tokens_per_step == other.tokens_per_step,
            own.rank == other.rank,
            self.status.ranks == other.world_size,
        )


def _sequence(config: RunConfig) -> tuple[int, str, bool]:
    data = config.data
    return data.sequence_length_tokens, data.packing, data.attend_across_documents


class Throughput:
    """The speeds of the finished runs in a folder."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._read: dict[Path, Finished | None] = {}

    def estimate(self, config: RunConfig, made: Plan, *, on_gpu: bool) -> Estimate | None:
        """Return the expected time of a run; None if nothing is known about such a device.

        Args:
            config: The run.
            made: Its plan.
            on_gpu: Whether it trains on GPUs. Only runs on the same kind of device are used.
        """
        given = config.plan.flops_per_second
        if given is not None:
            seconds = made.total_flops / given
            return Estimate(
                training_seconds=seconds, seconds=seconds, flops_per_second=given, basis="plan.flops_per_second"
            )
        precision = config.trainer.precision
        found = [
            run
            for run in self._alike(config)
            if (run.status.device != "cpu") == on_gpu and run.config.trainer.precision == precision
        ]
        if not found:
            return None
        best = max(run.likeness(config) for run in found)
        chosen = [run for run in found if run.likeness(config) == best]
        speed = statistics.median(run.flops_per_second for run in chosen)
        training_seconds, is_near = made.total_flops / speed, best[0] and best[1]
        known = [run.overhead_seconds for run in chosen if run.overhead_seconds is not None] if best[0] else []
        return Estimate(
            training_seconds=training_seconds,
            seconds=training_seconds + (statistics.median(known) if known else 0.0),
            flops_per_second=speed,
            basis=_basis(chosen, is_near=is_near),
        )

    def _alike(self, config: RunConfig) -> list[Finished]:
        """Return finished runs with known speeds: first those whose names begin like that of `config`."""
        label, model = config.name.rpartition("-")[0], f"{config.model.name}-"
        files = [(file, file.stat().st_mtime) for file in self.runs_dir.glob("*/status.json")]
        order = sorted(
            files,
            key=lambda each: (
                each[0].parent.name.rpartition("-")[0] != label,
                not each[0].parent.name.startswith(model),
                -each[1],
            ),
        )
        found: list[Finished] = []
        for file, _ in order[:MOST_TRIED]:
            run = self._finished(file.parent)
            found += [] if run is None else [run]
            if len(found) == MOST_READ:
                break
        return found

    def _finished(self, path: Path) -> Finished | None:
        if path not in self._read:
            self._read[path] = _finished_run(RunDir(path))
        return self._read[path]


def _finished_run(run: RunDir) -> Finished | None:
    status = run.known_status
    if status is None or status.state != "finished" or not status.summary.get("training_seconds"):
        return None
    try:
        return Finished(config=thaw(run.config_file), status=status)
    except (ConfigError, DamagedFile):
        return None


def _basis(chosen: Sequence[Finished], *, is_near: bool) -> str:
    """Return the runs that a speed comes from."""
    names = f"{some_of([run.config.name for run in chosen])} on {chosen[0].status.device}"
    return names if is_near else f"{names}, which is another kind of run: a rough estimate"
