"""One run, read from its folder: its config, state, results and curves."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from relora.common.errors import ConfigError, DamagedFile
from relora.common.files import reason
from relora.config import frozen
from relora.config.run import RunConfig
from relora.runs.metrics import read_rows, recorded
from relora.runs.rundir import RunDir, Status
from relora.runs.state import ObservedState

T = TypeVar("T")

RESULTS = ("eval_loss", "eval_perplexity", "test_loss", "test_perplexity", "tokens", "flops", "training_seconds")
RESULTS += ("peak_memory_bytes", "parameters", "trainable_parameters", "restarts", "skipped_updates")
"""The results that the summary of every finished run has."""


@dataclass(kw_only=True)
class Run:
    """One run, read from its folder."""

    name: str
    role: str
    """"arm", "baseline", or "other": a full-rank run of the same runs_dir that is not in this study."""
    path: Path
    config: RunConfig | None
    status: Status | None
    state: str
    problem: str = ""
    """Which file of the run cannot be read, and why."""

    @classmethod
    def of(cls, path: Path, role: str, state: ObservedState) -> "Run":
        """Read the run in `path`; its state is "missing" if `path` has no config.

        Args:
            path: The folder of the run.
            role: The run's role in the study, as in `role`.
            state: The observed state. It is replaced by "unreadable" if a file of the run is damaged.
        """
        folder = RunDir(path)
        nothing = cls(name=path.name, role=role, path=path, config=None, status=None, state="missing")
        if not folder.config_file.exists():
            return nothing
        try:
            config = frozen.read_frozen(folder.config_file)
        except (ConfigError, DamagedFile) as error:
            return replace(nothing, state="unreadable", problem=reason(error))
        return cls.read(path, role, config, state)

    @classmethod
    def read(cls, path: Path, role: str, config: RunConfig, state: ObservedState) -> "Run":
        """Read the run of a config that is known already.

        The state is "unreadable", and `problem` says why, if the run's results cannot be read.
        """
        run = cls(name=path.name, role=role, path=path, config=config, status=None, state=state.name)
        if state.name == "unreadable":
            return replace(run, problem=state.message)
        try:
            run.status = run.folder.status
            lacking = [name for name in RESULTS if not isinstance(run.summary.get(name), (int, float))]
            if run.finished and lacking:
                raise DamagedFile(run.folder.status_file, f"its results have no {lacking[0]}")
            if run.folder.metrics_file.is_dir():
                raise DamagedFile(run.folder.metrics_file, "it is a folder")
        except DamagedFile as error:
            return replace(run, state="unreadable", problem=str(error))
        return run

    @property
    def folder(self) -> RunDir:
        """The files of the run."""
        return RunDir(self.path)

    @property
    def finished(self) -> bool:
        """Whether the run has results."""
        return self.state == "finished" and self.config is not None

    @property
    def diverged(self) -> bool:
        """Whether the run finished with a loss that is not finite."""
        return self.finished and not all(math.isfinite(self.summary[name]) for name in ("eval_loss", "test_loss"))

    @property
    def validation_loss(self) -> float:
        """The loss of a finished run by which the best run is chosen, in nats; infinite if the run diverged."""
        return math.inf if self.diverged else self.summary["eval_loss"]

    @property
    def summary(self) -> dict[str, Any]:
        """The results of a finished run."""
        return self.status.summary if self.status else {}

    @property
    def message(self) -> str:
        """Why the run has no results."""
        return self.problem or (self.status.message if self.status else "it was never started")

    @property
    def remarks(self) -> list[str]:
        """Notes for a reader of the results: changes of the machine, and lost rows."""
        changes = self.status.machine_changes if self.status else []
        notes = [f"from step {step} on, it was trained on another machine ({machine})" for step, machine in changes]
        lost = [] if self.problem else recorded(self.folder.metrics_file).lost
        return [*notes, *(f"{rows}: lost" for rows in lost if not rows.recomputed)]

    @property
    def spent(self) -> list[dict[str, Any]]:
        """The training seconds by machine and switches (relora.runs.spent).

        An old run has no such record. All its seconds count for its last machine.
        """
        assert self.status is not None
        last = {"host": self.status.host, "device": self.status.device, "seconds": self.summary["training_seconds"]}
        return self.status.spent or [last]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What runs of any length and seed must share to be compared: the setting_key and the digests of the corpus."""
        assert self.config is not None
        assert self.status is not None
        return (self.config.setting_key, *sorted(self.status.corpus.items()))

    @property
    def seed(self) -> int:
        """The run's seed."""
        assert self.config is not None
        return self.config.trainer.seed

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics, one record per step."""
        by_step: dict[int, dict[str, Any]] = defaultdict(dict)
        for row in [] if self.problem else read_rows(self.folder.metrics_file):
            by_step[row["step"]] |= row
        return [by_step[step] for step in sorted(by_step)]

    def evaluations(self, axis: str) -> dict[int, tuple[float, float]]:
        """Return step -> (value of `axis`, validation loss). `axis` is "seconds", "tokens" or "flops"."""
        name = "perf/training_seconds" if axis == "seconds" else f"progress/{axis}"
        known = [(row["step"], row[name]) for row in self.rows if name in row]
        rows = [row for row in self.rows if "eval/loss" in row]
        points = {row["step"]: (row.get(name, _at(known, row["step"])), row["eval/loss"]) for row in rows}
        return {step: (value, loss) for step, (value, loss) in points.items() if value is not None}

    def curve(self, axis: str) -> list[tuple[float, float]]:
        """Return (value of `axis`, validation loss) at each evaluation, as in `evaluations`."""
        return list(self.evaluations(axis).values())

    def budget(self, axis: str) -> float:
        """Return the total of the whole run on `axis`."""
        return self.summary["training_seconds" if axis == "seconds" else axis]


def _at(known: Sequence[tuple[int, float]], step: int) -> float | None:
    """Interpolate an axis at `step` for a run that did not record the axis with its evaluations.

    `known` has (step, value), ordered by step. The value at step 0 is 0. The result is None after the last known step.
    """
    low = max(((at, value) for at, value in known if at <= step), default=(0, 0.0))
    high = min(((at, value) for at, value in known if at > step), default=None)
    if low[0] == step:
        return low[1]
    if high is None:
        return None
    return low[1] + (high[1] - low[1]) * (step - low[0]) / (high[0] - low[0])


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def best_on_validation(losses: Mapping[T, Mapping[int, float]], needed: AbstractSet[int] = frozenset()) -> T | None:
    """Choose the key with the lowest mean validation loss.

    Only the keys that have the most of the needed seeds compete, because means over different seeds cannot be compared.
    Each mean is over the seeds that these keys share. A loss that is not finite excludes its key.

    Args:
        losses: Key -> seed -> validation loss.
        needed: The needed seeds; all seeds if it is empty.

    Returns:
        The key, or None if no key is left.
    """
    wanted = needed or {seed for by_seed in losses.values() for seed in by_seed}
    relevant = {
        key: {seed: loss for seed, loss in by_seed.items() if seed in wanted} or by_seed
        for key, by_seed in losses.items()
        if by_seed
    }
    usable = {key: by_seed for key, by_seed in relevant.items() if all(map(math.isfinite, by_seed.values()))}
    most = max((len(by_seed.keys() & wanted) for by_seed in usable.values()), default=0)
    rivals = {key: by_seed for key, by_seed in usable.items() if len(by_seed.keys() & wanted) == most}
    shared = set.intersection(*(set(by_seed) for by_seed in rivals.values())) if rivals else set()

    def validation(key: T) -> tuple[float, str]:
        return mean([loss for seed, loss in rivals[key].items() if seed in shared or not shared]), str(key)

    return min(rivals, key=validation, default=None)
