"""A study's runs beside the full-rank runs they are measured against: gaps, means over seeds, intervals.

Nothing is dropped: a run that failed or has no baseline is a row that says so. Baselines are chosen on `validation`,
results are read on `test`.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from relora import compose
from relora.config import RunConfig
from relora.errors import ConfigError
from relora.metrics import read_rows
from relora.rundir import RunDir, Status, read_json
from relora.state import State, observe

CONFIDENCE = 0.95
SEEDS_FOR_AN_INTERVAL = 3
SAME_BUDGET = 0.01
"""Budgets within this share of each other count as equal."""


def study_dir(runs_dir: Path, study: str) -> Path:
    """The folder of a study."""
    return runs_dir / "studies" / study


def studies(runs_dir: Path) -> list[str]:
    """The studies of a runs_dir, by name."""
    return sorted(path.parent.name for path in runs_dir.glob("studies/*/study.json"))


# ----------------------------------------------------------------------------------------------------------- a run


@dataclass(kw_only=True)
class Run:
    """One run as its folder tells it."""

    name: str
    role: str
    """"arm", "baseline", or "other": a full-rank run of the same runs_dir that is in no manifest of this study."""
    path: Path
    config: RunConfig | None
    status: Status | None
    state: str

    @classmethod
    def of(cls, path: Path, role: str, state: State) -> "Run":
        """The run in `path`, "missing" where there is none."""
        folder = RunDir(path)
        try:
            config, status = compose.thaw(folder.config_file), folder.status
        except ConfigError:
            return cls(name=path.name, role=role, path=path, config=None, status=None, state="missing")
        return cls(name=path.name, role=role, path=path, config=config, status=status, state=state.name)

    @property
    def folder(self) -> RunDir:
        """Its files."""
        return RunDir(self.path)

    @property
    def finished(self) -> bool:
        """Whether it has results."""
        return self.state == "finished" and self.config is not None

    @property
    def summary(self) -> dict[str, Any]:
        """Results of a finished run."""
        assert self.status is not None
        return self.status.summary

    @property
    def message(self) -> str:
        """Why it has no results."""
        return self.status.message if self.status else "it was never begun"

    @property
    def machine(self) -> tuple[str, str]:
        """What its seconds depend on: host and device."""
        return (self.status.host, self.status.device) if self.status else ("", "")

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
        for row in read_rows(self.path / "metrics.jsonl"):
            by_step[row["step"]] |= row
        return [by_step[step] for step in sorted(by_step)]

    def curve(self, axis: str) -> list[tuple[float, float]]:
        """(value of `axis`, validation loss) at each evaluation."""
        name = "perf/training_seconds" if axis == "seconds" else f"progress/{axis}"
        return [(row.get(name, 0.0), row["eval/loss"]) for row in self.rows if "eval/loss" in row]

    def budget(self, axis: str) -> float:
        """What the whole run took of `axis`."""
        return self.summary["training_seconds" if axis == "seconds" else axis]


# ------------------------------------------------------------------------------------------------------------ gaps


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Loss difference to full rank, in nats; a relative difference of perplexities is exp(it) - 1."""

    loss: float | None
    note: str
    """How it was read, or why there is none."""
    kind: str = "measured"
    """"measured" on runs that end there, "interpolated" between them, or read off a "curve"."""

    @property
    def relative(self) -> float | None:
        """Perplexity over the baseline's, less 1."""
        return None if self.loss is None else relative(self.loss)


def relative(loss_difference: float) -> float:
    """Perplexity over another, less 1, of a difference of losses; infinite where that overflows."""
    return math.expm1(loss_difference) if loss_difference < 700 else math.inf


@dataclass(kw_only=True)
class Compared:
    """A run of the study with its gaps."""

    run: Run
    label: str
    baseline: Run | None = None
    tokens: Gap = field(default_factory=lambda: Gap(loss=None, note="no results"))
    flops: Gap = field(default_factory=lambda: Gap(loss=None, note="no results"))
    seconds: Gap = field(default_factory=lambda: Gap(loss=None, note="no results"))
    tokens_to_baseline: int | None = None
    """Tokens at the first evaluation that reached the baseline's last validation loss; None: never."""


def _gap_at_equal_tokens(run: Run, baseline: Run | None) -> Gap:
    if baseline is None:
        return Gap(loss=None, note="no finished full-rank run of the same setting, budget and seed")
    return Gap(loss=run.summary["test_loss"] - baseline.summary["test_loss"], note=f"against {baseline.name}")


def _gap_at_equal(axis: str, run: Run, baseline: Run | None, ended: Sequence[Run]) -> Gap:
    """Against the full-rank runs `ended` whose schedules end at that budget, or else between, or else on a curve.

    A curve that is read before its learning rate has decayed flatters the other arm, and the note says so.
    """
    budget, unit = run.budget(axis), {"flops": "FLOPs", "seconds": "seconds"}[axis]
    if axis == "seconds":
        ended = [other for other in ended if other.machine == run.machine]
        if baseline is not None and baseline not in ended and run is not baseline:
            return Gap(loss=None, note="the full-rank runs were trained on another machine or device")
    if run.config is not None and run.config.method.name == "full" and run is baseline:
        return Gap(loss=0.0, note="itself")
    points = sorted((other.budget(axis), other.summary["test_loss"], other.name) for other in ended)
    near = [point for point in points if abs(point[0] / budget - 1) <= SAME_BUDGET]
    if near:
        _, loss, name = min(near, key=lambda point: abs(point[0] / budget - 1))
        return Gap(loss=run.summary["test_loss"] - loss, note=f"against {name}, whose schedule ends there")
    at = bisect.bisect([point[0] for point in points], budget)
    if 0 < at < len(points):
        low, high = points[at - 1], points[at]
        loss = _between(low[:2], high[:2], budget)
        note = f"interpolated between full-rank runs that end at {low[0]:.3g} and {high[0]:.3g} {unit}"
        return Gap(loss=run.summary["test_loss"] - loss, note=note, kind="interpolated")
    if baseline is None:
        return Gap(loss=None, note="no finished full-rank run of the same setting and seed")
    curve = [point for point in baseline.curve(axis) if point[0] > 0]
    at = bisect.bisect([point[0] for point in curve], budget)
    if at == 0:
        return Gap(loss=None, note="the full-rank run was not evaluated as early as that")
    if at == len(curve):
        return Gap(loss=None, note=f"no full-rank run of this setting took that many {unit}")
    loss = _between(curve[at - 1], curve[at], budget)
    note = f"read off the validation curve of {baseline.name} before its learning rate has decayed: flatters this arm"
    return Gap(loss=run.summary["eval_loss"] - loss, note=note, kind="curve")


def _between(low: tuple[float, float], high: tuple[float, float], x: float) -> float:
    """Linear in log x."""
    share = math.log(x / low[0]) / math.log(high[0] / low[0])
    return low[1] + share * (high[1] - low[1])


def _tokens_to_reach(run: Run, baseline: Run) -> int | None:
    goal = baseline.summary["eval_loss"]
    return next((int(tokens) for tokens, loss in run.curve("tokens") if loss <= goal), None)


# ------------------------------------------------------------------------------------------------------- baselines


class _FullRank:
    """Every finished full-rank run without a warm start that may serve as a baseline."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = [run for run in runs if run.finished and _is_baseline(run.config)]

    def tuned(self, setting: tuple[Any, ...], total_steps: int) -> dict[int, Run]:
        """By seed, the runs of the variant that is best on validation.

        The study's own variants come first, then those with the most seeds: a mean over fewer is another figure.
        """
        found = [run for run in self.runs if run.setting == setting and _steps(run) == total_steps]
        own = [run for run in found if run.role != "other"]
        by_variant: dict[str, list[Run]] = defaultdict(list)
        for run in own or found:
            by_variant[run.config.variant].append(run)  # type: ignore[union-attr]
        if not by_variant:
            return {}
        best = min(by_variant.values(), key=lambda runs: (-len(runs), mean([run.summary["eval_loss"] for run in runs])))
        return {run.seed: run for run in best}

    def of_any_length(self, setting: tuple[Any, ...], seed: int) -> list[Run]:
        """The tuned run of each budget."""
        lengths = {_steps(run) for run in self.runs if run.setting == setting}
        tuned = (self.tuned(setting, steps).get(seed) for steps in lengths)
        return [run for run in tuned if run is not None]


def _is_baseline(config: RunConfig | None) -> bool:
    return config is not None and config.method.name == "full" and not config.method.warm_start_steps


def _steps(run: Run) -> int:
    assert run.config is not None
    return run.config.total_steps


# ----------------------------------------------------------------------------------------------------------- a study


@dataclass(kw_only=True)
class Estimate:
    """Mean over seeds of a gap, and its interval where there are seeds enough. Relative differences of perplexity."""

    relative: float
    deviation: float | None
    """Over seeds; None for one."""
    low: float | None
    high: float | None
    seeds: int


@dataclass(kw_only=True)
class Arm:
    """Runs that differ in their seed alone."""

    label: str
    variant: str
    method: str
    members: list[Compared]

    @property
    def finished(self) -> list[Compared]:
        """Those with results."""
        return [member for member in self.members if member.run.finished]

    @property
    def config(self) -> RunConfig | None:
        """That of its first run that has one."""
        return next((member.run.config for member in self.members if member.run.config), None)

    def values(self, name: str) -> list[float]:
        """A figure of every finished run."""
        return [float(member.run.summary[name]) for member in self.finished]

    def gap(self, axis: str) -> Estimate | None:
        """Mean paired difference to full rank, with a t interval from three seeds on.

        Of several ways to read a gap, that of the most seeds is taken: they are not mixed in one mean.
        """
        found: list[Gap] = [getattr(member, axis) for member in self.finished]
        by_kind: dict[str, list[float]] = defaultdict(list)
        for gap in found:
            if gap.loss is not None:
                by_kind[gap.kind].append(gap.loss)
        if not by_kind:
            return None
        losses = max(by_kind.values(), key=len)
        low = high = None
        if len(losses) >= SEEDS_FOR_AN_INTERVAL:
            from scipy.stats import t

            half = float(t.ppf(0.5 + CONFIDENCE / 2, len(losses) - 1)) * deviation(losses) / math.sqrt(len(losses))
            low, high = relative(mean(losses) - half), relative(mean(losses) + half)
        spread = deviation([relative(loss) for loss in losses]) if len(losses) > 1 else None
        return Estimate(relative=relative(mean(losses)), deviation=spread, low=low, high=high, seeds=len(losses))

    def notes(self, axis: str) -> list[str]:
        """How its gaps were read, each once."""
        return list(dict.fromkeys(getattr(member, axis).note for member in self.finished))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, 0 for one value."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


@dataclass(kw_only=True)
class Study:
    """A question, its runs and what they are measured against."""

    name: str
    question: str
    launches: list[list[str]]
    arms: list[Arm]

    @property
    def members(self) -> list[Compared]:
        """Every run, arm by arm."""
        return [member for arm in self.arms for member in arm.members]

    @property
    def unfinished(self) -> list[Compared]:
        """The runs without results."""
        return [member for member in self.members if not member.run.finished]

    def settings(self) -> list["Study"]:
        """The study cut into parts whose runs can be compared: one for each comparison_key."""
        known = [arm.config.comparison_key for arm in self.arms if arm.config] or [""]
        keys = {arm.variant: arm.config.comparison_key if arm.config else known[0] for arm in self.arms}
        parts = [[arm for arm in self.arms if keys[arm.variant] == key] for key in dict.fromkeys(keys.values())]
        return [replace(self, arms=arms) for arms in parts]

    def best(self) -> Arm | None:
        """The arm that is not full rank with the lowest mean validation loss.

        The means are over the seeds that all of them have; arms with fewer seeds than others stand back.
        """
        arms = [arm for arm in self.arms if arm.method != "full" and arm.finished]
        seeds = [{member.run.seed for member in arm.finished} for arm in arms]
        most = max(map(len, seeds), default=0)
        rivals = [(arm, own) for arm, own in zip(arms, seeds, strict=True) if len(own) == most]
        common = set.intersection(*(own for _, own in rivals)) if rivals else set()

        def validation(arm: Arm) -> float:
            return mean([m.run.summary["eval_loss"] for m in arm.finished if m.run.seed in common])

        return min((arm for arm, _ in rivals), key=validation) if common else None

    def full_rank(self) -> Arm | None:
        """The full-rank arm that most runs are measured against."""
        serving = [member.baseline.name for member in self.members if member.baseline is not None]
        arms = [arm for arm in self.arms if any(member.run.name in serving for member in arm.members)]
        return max(arms, key=lambda arm: sum(serving.count(m.run.name) for m in arm.members), default=None)


def load_study(runs_dir: Path, name: str) -> Study:
    """Read a study's runs and measure each. Raises ConfigError for a study that was never launched here."""
    manifest = read_json(study_dir(runs_dir, name) / "study.json")
    if not manifest:
        known = ", ".join(studies(runs_dir)) or "none"
        raise ConfigError(f"no study {name} was launched in {runs_dir}; there are: {known}")
    roles = {runs_dir / run: entry["role"] for run, entry in manifest["runs"].items()}
    for file in sorted(runs_dir.glob("*/config.yaml")):
        roles.setdefault(file.parent, "other")
    states = observe([RunDir(path) for path in roles])
    runs = [Run.of(path, role, state) for (path, role), state in zip(roles.items(), states, strict=True)]
    own, others = [run for run in runs if run.role != "other"], [run for run in runs if run.role == "other"]
    full = _FullRank([*own, *others])
    labels = labels_of([run.config for run in own if run.config is not None])
    by_variant: dict[str, list[Compared]] = defaultdict(list)
    for run in own:
        variant = manifest["runs"][run.name]["variant"]
        by_variant[variant].append(_compared(run, labels.get(variant) or variant, full))
    arms = [
        Arm(
            label=members[0].label,
            variant=variant,
            method=next((member.run.config.method.name for member in members if member.run.config), "unknown"),
            members=members,
        )
        for variant, members in by_variant.items()
    ]
    return Study(name=name, question=manifest.get("question", ""), launches=manifest["launches"], arms=arms)


def _compared(run: Run, label: str, full: _FullRank) -> Compared:
    found = Compared(run=run, label=label)
    if not run.finished:
        found.tokens = found.flops = found.seconds = Gap(loss=None, note=f"{run.state}: {run.message}")
        return found
    found.baseline = baseline = full.tuned(run.setting, _steps(run)).get(run.seed)
    ended = full.of_any_length(run.setting, run.seed)
    found.tokens = _gap_at_equal_tokens(run, baseline)
    found.flops = _gap_at_equal("flops", run, baseline, ended)
    found.seconds = _gap_at_equal("seconds", run, baseline, ended)
    if baseline is not None:
        found.tokens_to_baseline = _tokens_to_reach(run, baseline)
    return found


def labels_of(configs: Sequence[RunConfig]) -> dict[str, str]:
    """A short name for each variant: its method, and what tells it from others of its method."""
    labels: dict[str, str] = {}
    for method in dict.fromkeys(config.method.name for config in configs):
        own = [config for config in configs if config.method.name == method]
        fields = [{**config.parameters, "trainer.seed": None} for config in own]
        varied = sorted(
            name
            for name in {name for values in fields for name in values}
            if len({str(values.get(name)) for values in fields}) > 1
        )
        if all(config.rank is None or config.parameters.get("method.alpha") == 0.25 * config.rank for config in own):
            varied = [name for name in varied if name != "method.alpha"]
        for config, values in zip(own, fields, strict=True):
            parts = [f"{_short(name)}={_brief(values.get(name))}" for name in varied]
            labels[config.variant] = " ".join([method, *parts])
    return labels


def _short(name: str) -> str:
    known = {
        "method.reset_interval_steps": "interval",
        "method.warm_start_steps": "warm_start",
        "method.optimizer_reset.mode": "reset",
        "method.optimizer_reset.pruning_ratio": "ratio",
        "schedule.restart_warmup_steps": "rewarm",
        "optimizer.learning_rate": "lr",
        "optimizer.embedding_learning_rate": "embedding_lr",
        "trainer.total_steps": "steps",
    }
    return known.get(name, name.rpartition(".")[2])


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_row(member: Compared) -> dict[str, Any]:
    """A run as a flat record, for results.csv and JSON; what is not known is None."""
    run = member.run
    row: dict[str, Any] = {
        "run": run.name,
        "arm": member.label,
        "role": run.role,
        "state": run.state,
        "message": run.message if not run.finished else "",
        "seed": run.config.trainer.seed if run.config else None,
        "method": run.config.method.name if run.config else None,
        "rank": run.config.rank if run.config else None,
        "reset_interval_steps": run.config.reset_interval_steps if run.config else None,
    }
    names = ["test_perplexity", "eval_perplexity", "test_loss", "eval_loss", "tokens", "flops", "training_seconds"]
    names += ["peak_memory_bytes", "parameters", "trainable_parameters", "restarts", "skipped_updates"]
    row |= {name: run.summary.get(name) if run.finished else None for name in names}
    row["tokens_per_second"] = run.summary["tokens"] / run.summary["training_seconds"] if run.finished else None
    row["baseline"] = member.baseline.name if member.baseline else None
    for axis in ("tokens", "flops", "seconds"):
        gap: Gap = getattr(member, axis)
        row[f"gap_at_equal_{axis}"], row[f"gap_at_equal_{axis}_note"] = gap.relative, gap.note
    row["tokens_to_baseline"] = member.tokens_to_baseline
    return row
