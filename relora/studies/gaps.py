"""Gaps of a run to full rank at equal tokens, FLOPs and wall-clock, and the choice of the full-rank run.

Baselines are chosen on the validation split. Results are read on the test split. `FullRank` is the only rule for
baselines: status, report and MLflow all use it.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from relora.common.errors import ConfigError, DamagedFile
from relora.config import frozen
from relora.config.run import RunConfig
from relora.methods.registry import METHODS
from relora.runs.results import Run, best_on_validation, mean
from relora.runs.rundir import RunDir
from relora.runs.spent import differences

OTHER_RATE = "baseline, other rate"
FEWEST_EVALUATIONS = 4
"""A run with fewer evaluations after the start cannot show when it reached a loss."""
SAME_BUDGET = 0.01
"""Budgets within this share of each other count as equal."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The loss difference to full rank, in nats. The relative difference of perplexities is exp(loss) - 1."""

    loss: float | None
    note: str
    """How the gap was measured, or why there is none."""
    kind: str = "measured"
    """"measured" on runs that end at that budget, "interpolated" between runs, or read from a validation "curve"."""

    @property
    def relative(self) -> float | None:
        """The perplexity divided by the perplexity of the baseline, minus 1."""
        return None if self.loss is None else relative(self.loss)


def relative(loss_difference: float) -> float:
    """Return the ratio of perplexities minus 1 for a difference of losses in nats. Infinite if it overflows."""
    return math.expm1(loss_difference) if loss_difference < 700 else math.inf


@dataclass(kw_only=True)
class Compared:
    """A run of the study and its gaps."""

    run: Run
    label: str
    choice: "Baseline | None" = None
    """The full-rank variant that is the baseline for the setting and budget of the run."""
    baseline: Run | None = None
    """The run of that variant with the same seed."""
    tokens: Gap = field(default_factory=lambda: Gap(loss=None, note="no results"))
    flops: Gap = field(default_factory=lambda: Gap(loss=None, note="no results"))
    seconds: Gap = field(default_factory=lambda: Gap(loss=None, note="no results"))
    speed_note: str = ""
    """Why tokens/s cannot be compared with the baseline. Empty if they can, or if there is no baseline."""
    memory_note: str = ""
    """Why the peak memory cannot be compared with the baseline. Empty as above."""
    tokens_to_baseline: int | None = None
    """Tokens at the first evaluation that reached the baseline's last validation loss. None: never, or unknown."""
    evaluated_too_rarely: bool = False
    """Whether the run reached that loss, but has too few evaluations to show when."""

    @property
    def role(self) -> str:
        """The displayed role: "arm", "baseline", or "baseline, other rate" for a baseline that was not chosen."""
        return role_against(self.run.role, self.run, self.baseline)


def role_against(role: str, run: Run, baseline: Run | None) -> str:
    """Return the displayed role of a run.

    Args:
        role: Its role in the study.
        run: The run.
        baseline: The full-rank run that it is compared with.
    """
    return OTHER_RATE if role == "baseline" and baseline is not None and baseline.name != run.name else role


def _gap_at_equal_tokens(run: Run, baseline: Run | None, missing: str) -> Gap:
    if baseline is None:
        return Gap(loss=None, note=missing)
    return Gap(loss=run.summary["test_loss"] - baseline.summary["test_loss"], note=f"against {baseline.name}")


def _gap_at_equal(axis: str, run: Run, baseline: Run | None, ended: Sequence[Run], missing: str) -> Gap:
    """Return the gap at an equal budget of FLOPs or seconds.

    The reference is a run of `ended` whose schedule ends at that budget. Without one, the loss is interpolated between
    two such runs. Otherwise the loss is read from the validation curve of the baseline. There the learning rate has
    not decayed yet, which favours `run`. The note says so.
    """
    budget, unit = run.budget(axis), {"flops": "FLOPs", "seconds": "seconds"}[axis]
    if axis == "seconds":
        if baseline is not None and (reason := differences(run.spent, baseline.spent)):
            return Gap(loss=None, note=f"wall-clock: {reason}")
        ended = [other for other in ended if not differences(run.spent, other.spent)]
    if run is baseline:
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
        return Gap(loss=None, note=missing)
    curve = [point for point in baseline.curve(axis) if point[0] > 0]
    at = bisect.bisect([point[0] for point in curve], budget)
    if at == 0:
        return Gap(loss=None, note="the first evaluation of the full-rank run is after that budget")
    if at == len(curve):
        return Gap(loss=None, note=f"no full-rank run of this setting used that many {unit}")
    loss = _between(curve[at - 1], curve[at], budget)
    note = f"read from the validation curve of {baseline.name} before its learning rate has decayed: favours this arm"
    return Gap(loss=run.summary["eval_loss"] - loss, note=note, kind="curve")


def _between(low: tuple[float, float], high: tuple[float, float], x: float) -> float:
    """Interpolate linearly in log x."""
    share = math.log(x / low[0]) / math.log(high[0] / low[0])
    return low[1] + share * (high[1] - low[1])


def _tokens_to_reach(run: Run, baseline: Run) -> tuple[int | None, bool]:
    """Return the tokens at the first evaluation that reached the last validation loss of the baseline.

    Returns:
        The tokens, and whether the run has too few evaluations to show when it reached the loss. The tokens are None in
        that case, and if the loss was not reached.
    """
    goal, curve = baseline.summary["eval_loss"], run.curve("tokens")
    reached = next((int(tokens) for tokens, loss in curve if loss <= goal), None)
    too_few = reached is not None and sum(tokens > 0 for tokens, _ in curve) < FEWEST_EVALUATIONS
    return None if too_few else reached, too_few


# ------------------------------------------------------------------------------------------------------- baselines


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """The full-rank variant that is the reference of all runs of one setting and budget."""

    runs: dict[int, Run]
    """seed -> run. Runs that diverged are left out."""
    rivals: dict[str, dict[int, Run]]
    """variant -> seed -> run, for all candidates, including the chosen one."""
    needed: frozenset[int]
    """The seeds for which the variant was chosen. Empty if the study needs no baseline here."""

    @property
    def variant(self) -> str:
        """The variant, which all its runs share."""
        return _variant(next(iter(self.runs.values())))

    @property
    def is_of_the_study(self) -> bool:
        """Whether one of its runs is an arm or a baseline of the study."""
        return any(run.role != "other" for run in self.runs.values())

    def compared_with(self, variant: str) -> tuple[list[int], float, float] | None:
        """Compare the baseline with another candidate over the seeds that both have.

        Returns:
            The shared seeds, the mean validation loss of the candidate over them, and the mean of the baseline. None if
            there is no shared seed, or if the candidate diverged for one of them.
        """
        runs = self.rivals[variant]
        seeds = sorted(seed for seed in runs.keys() & self.runs.keys() if seed in self.needed or not self.needed)
        if not seeds or any(runs[seed].diverged for seed in seeds):
            return None
        theirs, ours = (mean([each[seed].validation_loss for seed in seeds]) for each in (runs, self.runs))
        return seeds, theirs, ours


class FullRank:
    """The finished full-rank runs of a runs_dir without a warm start, and the choice of baselines among them.

    All such runs are candidates, also runs of other studies. One variant (one set of rates) is the baseline of all runs
    of a setting and budget. It has the lowest mean validation loss over the seeds of the study's other arms. A variant
    with more of those seeds is preferred to a better variant with fewer. A variant that diverged is never chosen.
    """

    def __init__(self, runs_dir: Path, own: Sequence[Run]) -> None:
        """Read the candidates.

        Args:
            runs_dir: The folder of all runs.
            own: The runs of the study, in any state.
        """
        names = {run.name for run in own}
        others = [run for run in finished_full_rank(runs_dir) if run.name not in names]
        self._found: dict[tuple[Any, ...], dict[int, dict[str, dict[int, Run]]]] = {}
        for run in [*(run for run in own if run.finished and is_full_rank(run.config)), *others]:
            by_length = self._found.setdefault(run.setting, defaultdict(lambda: defaultdict(dict)))
            by_length[_steps(run)][_variant(run)][run.seed] = run
        self._needed: dict[tuple[str, int | None], set[int]] = defaultdict(set)
        for run in own:
            if run.config is not None and not is_full_rank(run.config):
                for steps in (run.config.total_steps, None):
                    self._needed[run.config.setting_key, steps].add(run.seed)
        self._chosen: dict[tuple[tuple[Any, ...], int], Baseline | None] = {}

    def baseline(self, setting: tuple[Any, ...], total_steps: int) -> Baseline | None:
        """Return the baseline of a setting (Run.setting) and budget. None if no run is finished, or all diverged."""
        key = (setting, total_steps)
        if key not in self._chosen:
            rivals = {variant: dict(runs) for variant, runs in self._rivals(setting, total_steps).items()}
            # No run of the study has this budget: use the seeds that it needs in this setting at any budget.
            needed = self._needed.get((setting[0], total_steps)) or self._needed.get((setting[0], None)) or set()
            losses = {
                variant: {seed: run.validation_loss for seed, run in runs.items()} for variant, runs in rivals.items()
            }
            best = best_on_validation(losses, needed)
            if best is None:
                self._chosen[key] = None
            else:
                usable = {seed: run for seed, run in rivals[best].items() if not run.diverged}
                self._chosen[key] = Baseline(runs=usable, rivals=rivals, needed=frozenset(needed))
        return self._chosen[key]

    def configs_for(self, run: Run) -> list[RunConfig]:
        """Return one config of each variant that is a candidate for the baseline of a finished run."""
        rivals = self._rivals(run.setting, _steps(run)).values()
        return [config for runs in rivals if (config := next(iter(runs.values())).config) is not None]

    def of_any_length(self, setting: tuple[Any, ...], seed: int) -> list[Run]:
        """Return the baseline runs with `seed` at all budgets of a setting (Run.setting)."""
        chosen = (self.baseline(setting, steps) for steps in self._found.get(setting, {}))
        return [baseline.runs[seed] for baseline in chosen if baseline is not None and seed in baseline.runs]

    def why_none(self, run: Run) -> str:
        """Return the reason why a finished run has no baseline."""
        chosen = self.baseline(run.setting, _steps(run))
        if chosen is not None:
            seeds = ", ".join(map(str, sorted(chosen.runs)))
            return f"no finished full-rank run of its seed: the baseline, {chosen.variant}, has only seeds {seeds}"
        if self._rivals(run.setting, _steps(run)):
            return "no finished full-rank run of the same setting and budget has a finite loss: all diverged"
        return "no finished full-rank run of the same setting, budget and seed"

    def _rivals(self, setting: tuple[Any, ...], total_steps: int) -> dict[str, dict[int, Run]]:
        return self._found.get(setting, {}).get(total_steps, {})


def finished_full_rank(runs_dir: Path) -> list[Run]:
    """Return the finished full-rank runs without a warm start of a runs_dir. Unreadable runs are left out."""
    found: list[Run] = []
    # The name of a run's folder contains its method (RunConfig.name), so few of many runs have to be read.
    files = {file for name in _full_rank_methods() for file in runs_dir.glob(f"*-{name}-*/status.json")}
    for file in sorted(files):
        try:
            about = file.stat()
        except OSError:
            continue
        run = _finished_full_rank(file.parent, about.st_mtime_ns, about.st_size)
        if run is not None:
            found.append(run)
    return found


def _full_rank_methods() -> list[str]:
    """Return the names of the methods that may be baselines. A package that cannot be loaded has none."""
    found: list[str] = []
    for name in METHODS.names():
        with suppress(ConfigError):
            found += [name] if METHODS.find(name).is_full_rank else []
    return found


@lru_cache(maxsize=10_000)
def _finished_full_rank(path: Path, _changed_ns: int, _size_bytes: int) -> Run | None:
    """Return the run in `path` if it belongs in `finished_full_rank`.

    The result is cached until the status file changes, because `--watch` calls this often.
    """
    folder = RunDir(path)
    try:
        status = folder.status
        if status is None or status.state != "finished":
            return None
        config = frozen.read_frozen(folder.config_file)
    except (ConfigError, DamagedFile):
        return None
    run = Run(name=path.name, role="other", path=path, config=config, status=status, state=status.state)
    return run if is_full_rank(config) else None


def is_full_rank(config: RunConfig | None) -> bool:
    """Return whether a run of `config` may be a baseline: full rank from the first step, without a warm start."""
    return config is not None and config.method.may_be_baseline


def _steps(run: Run) -> int:
    assert run.config is not None
    return run.config.total_steps


def _variant(run: Run) -> str:
    assert run.config is not None
    return run.config.variant


# ---------------------------------------------------------------------------------------------------------- a run


def gap_at_equal_tokens(run: Run, full: FullRank) -> tuple[Gap, Run | None]:
    """Return the gap of a finished run to the full-rank run of its seed, and that full-rank run."""
    if run.diverged:
        return Gap(loss=None, note=_diverged(run)), None
    chosen = full.baseline(run.setting, _steps(run))
    baseline = None if chosen is None else chosen.runs.get(run.seed)
    return _gap_at_equal_tokens(run, baseline, "" if baseline is not None else full.why_none(run)), baseline


def _diverged(run: Run) -> str:
    return f"diverged: validation loss {run.summary['eval_loss']:.3g}, test loss {run.summary['test_loss']:.3g}"


def compared(run: Run, label: str, full: FullRank) -> Compared:
    """Return all gaps of a run.

    Args:
        run: The run, in any state.
        label: Its short name in tables.
        full: The full-rank runs.
    """
    found = Compared(run=run, label=label)
    if not run.finished:
        found.tokens = found.flops = found.seconds = Gap(loss=None, note=f"{run.state}: {run.message}")
        return found
    found.choice = full.baseline(run.setting, _steps(run))
    found.tokens, found.baseline = gap_at_equal_tokens(run, full)
    if run.diverged:
        found.flops = found.seconds = found.tokens
        return found
    baseline = found.baseline
    missing = "" if baseline is not None else full.why_none(run)
    ended = full.of_any_length(run.setting, run.seed)
    found.flops = _gap_at_equal("flops", run, baseline, ended, missing)
    found.seconds = _gap_at_equal("seconds", run, baseline, ended, missing)
    if baseline is not None:
        found.tokens_to_baseline, found.evaluated_too_rarely = _tokens_to_reach(run, baseline)
        if speed := differences(run.spent, baseline.spent):
            found.speed_note = f"tokens/s: {speed}, than {baseline.name}"
        if memory := differences(run.spent, baseline.spent, memory=True):
            found.memory_note = f"peak memory: {memory}, than {baseline.name}"
    return found
