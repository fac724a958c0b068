"""What a run loses against full rank at equal tokens, FLOPs and wall-clock, and which full-rank run that is.

Baselines are chosen on `validation`, results are read on `test`.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from relora.config import RunConfig
from relora.results import Run, mean

SAME_BUDGET = 0.01
"""Budgets within this share of each other count as equal."""


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


class FullRank:
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


def compared(run: Run, label: str, full: FullRank) -> Compared:
    """Measure a run against what `full` has for it."""
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
