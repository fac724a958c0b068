"""One run as its folder tells it: its config, how it stands, its results and its curves."""

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
"""What the summary of a finished run has at least."""


@dataclass(kw_only=True)
class Run:
    """One run as its folder tells it."""

    name: str
    role: str
    """"arm", "baseline", or "other": a full-rank run of the same runs_dir that is not in this study."""
    path: Path
    config: RunConfig | None
    status: Status | None
    state: str
    problem: str = ""
    """Which of its files cannot be read, and why."""

    @classmethod
    def of(cls, path: Path, role: str, state: ObservedState) -> "Run":
        """The run in `path`, "missing" where there is none."""
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
        """The run of that config; "unreadable", with what is wrong, where its results cannot be read."""
        run = cls(name=path.name, role=role, path=path, config=config, status=None, state=state.name)
        if state.name == "unreadable":
            return replace(run, problem=state.message)
        try:
            run.status = run.folder.status
            lacking = [name for name in RESULTS if not isinstance(run.summary.get(name), (int, float))]
            if run.finished and lacking:
                raise DamagedFile(run.folder.status_file, f"its results lack {lacking[0]}")
            if run.folder.metrics_file.is_dir():
                raise DamagedFile(run.folder.metrics_file, "it is a folder")
        except DamagedFile as error:
            return replace(run, state="unreadable", problem=str(error))
        return run

    @property
    def folder(self) -> RunDir:
        """Its files."""
        return RunDir(self.path)

    @property
    def finished(self) -> bool:
        """Whether it has results."""
        return self.state == "finished" and self.config is not None

    @property
    def diverged(self) -> bool:
        """Whether it is finished with a loss that is not finite."""
        return self.finished and not all(math.isfinite(self.summary[name]) for name in ("eval_loss", "test_loss"))

    @property
    def validation_loss(self) -> float:
        """Of a finished run, what it is chosen by: nats, infinite where it diverged."""
        return math.inf if self.diverged else self.summary["eval_loss"]

    @property
    def summary(self) -> dict[str, Any]:
        """Results of a finished run."""
        return self.status.summary if self.status else {}

    @property
    def message(self) -> str:
        """Why it has no results."""
        return self.problem or (self.status.message if self.status else "it was never begun")

    @property
    def remarks(self) -> list[str]:
        """What a reader of its results must know: a machine that changed, and rows that are lost."""
        changes = self.status.machine_changes if self.status else []
        notes = [f"from step {step} on it was trained on another machine ({machine})" for step, machine in changes]
        lost = [] if self.problem else recorded(self.folder.metrics_file).lost
        return [*notes, *(f"{rows}: lost" for rows in lost if not rows.recomputed)]

    @property
    def spent(self) -> list[dict[str, Any]]:
        """Its seconds by machine and switches (relora.runs.spent); of an old run, all on its last machine."""
        assert self.status is not None
        last = {"host": self.status.host, "device": self.status.device, "seconds": self.summary["training_seconds"]}
        return self.status.spent or [last]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What runs of any length and seed must share to be compared: setting_key and the text that was read."""
        assert self.config is not None
        assert self.status is not None
        return (self.config.setting_key, *sorted(self.status.corpus.items()))

    @property
    def seed(self) -> int:
        """Its seed."""
        assert self.config is not None
        return self.config.trainer.seed

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Its metrics, one record a step."""
        by_step: dict[int, dict[str, Any]] = defaultdict(dict)
        for row in [] if self.problem else read_rows(self.folder.metrics_file):
            by_step[row["step"]] |= row
        return [by_step[step] for step in sorted(by_step)]

    def curve(self, axis: str) -> list[tuple[float, float]]:
        """(value of `axis`, validation loss) at each evaluation."""
        name = "perf/training_seconds" if axis == "seconds" else f"progress/{axis}"
        known = [(row["step"], row[name]) for row in self.rows if name in row]
        points = [(row.get(name, _at(known, row["step"])), row["eval/loss"]) for row in self.rows if "eval/loss" in row]
        return [(value, loss) for value, loss in points if value is not None]

    def budget(self, axis: str) -> float:
        """What the whole run took of `axis`."""
        return self.summary["training_seconds" if axis == "seconds" else axis]


def _at(known: Sequence[tuple[int, float]], step: int) -> float | None:
    """What runs that did not record it with their evaluations had of an axis at `step`: between the rows beside it.

    `known`: (step, value), by step; 0 at step 0. None beyond the last.
    """
    low = max(((at, value) for at, value in known if at <= step), default=(0, 0.0))
    high = min(((at, value) for at, value in known if at > step), default=None)
    if low[0] == step:
        return low[1]
    if high is None:
        return None
    return low[1] + (high[1] - low[1]) * (step - low[0]) / (high[0] - low[0])


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for one value."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def best_on_validation(losses: Mapping[T, Mapping[int, float]], needed: AbstractSet[int] = frozenset()) -> T | None:
    """The key of `losses` (key -> seed -> validation loss) with the lowest mean; None where no mean is finite.

    Keys that have the most of the `needed` seeds (of all seeds where none are named) stand before the others: a mean
    over other seeds is another figure. Their means are over the seeds that they share. A loss that is not finite
    excludes its key.
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
