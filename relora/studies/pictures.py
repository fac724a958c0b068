"""The pictures of a study: learning rates, gaps, and the heat map of rank and interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.config.run import RunConfig
from relora.runs.results import Run, mean
from relora.studies.compare import Study
from relora.studies.drawing import line_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_schedule(study: Study) -> "Figure | None":
    """Draw the learning rate over the steps, with one run for each shape of schedule. Marks are restarts."""
    shapes: dict[tuple[Any, ...], tuple[str, Run]] = {}
    for arm in study.arms:
        for member in arm.members[:1]:
            if member.run.config is not None and any("train/lr" in row for row in member.run.rows):
                shapes.setdefault(_shape(member.run), (arm.label, member.run))
    if not shapes:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots()
    for (label, run), style in zip(shapes.values(), line_styles(len(shapes)), strict=True):
        rates = {row["step"]: row["train/lr"] for row in run.rows if "train/lr" in row}
        axes.plot(list(rates), list(rates.values()), label=label, lw=1.2, **style)
        restarts = [row["step"] for row in run.rows if "restart/number" in row]
        axes.plot(restarts, [0.0] * len(restarts), "|", color=style["color"], ms=12)
    axes.set_xlabel("step (marks: restarts)")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_gaps(study: Study) -> "Figure | None":
    """Draw the gap of every arm, the gap of each seed, and the interval."""
    found = [(arm, arm.gap("tokens")) for arm in study.arms if not arm.is_full_rank]
    rows = [(arm, gap) for arm, gap in found if gap is not None and math.isfinite(gap.relative)]
    if not rows:
        return None
    from matplotlib.figure import Figure

    rows.sort(key=lambda row: row[1].relative, reverse=True)
    figure = Figure(figsize=(12, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (arm, gap) in enumerate(rows):
        axes.barh(y, 100 * gap.relative, color="#9ab8d4")
        if gap.low is not None and gap.high is not None:
            axes.plot([100 * gap.low, 100 * gap.high], [y, y], color="#1f3b57", lw=2)
        seeds = [100 * gap for member in arm.finished if (gap := member.tokens.relative) is not None]
        axes.plot(seeds, [y] * len(seeds), "o", color="#1f3b57", ms=4)
    axes.set_yticks(range(len(rows)), [arm.label for arm, _ in rows], fontsize=8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("test perplexity over full rank's, at equal tokens (%)")
    return figure


def draw_heat_map(study: Study) -> "Figure | None":
    """Draw the gap by rank and reset interval, if at least one is swept. Without a baseline, draw test perplexity."""
    cells = heat_map(study)
    if cells is None:
        return None
    from matplotlib.figure import Figure

    ranks = sorted({rank for rank, _ in cells.values})
    intervals = sorted(
        {interval for _, interval in cells.values}, key=lambda value: math.inf if value is None else value
    )
    grid = [[cells.values.get((rank, interval), math.nan) for interval in intervals] for rank in ranks]
    figure = Figure(figsize=(2.5 + 1.2 * len(intervals), 1.8 + 0.7 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis_r", aspect="auto")
    axes.set_xticks(range(len(intervals)), ["never" if value is None else str(value) for value in intervals])
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlabel("reset interval (steps)")
    axes.set_ylabel("rank")
    finite = [value for row in grid for value in row if not math.isnan(value)]
    middle = (min(finite) + max(finite)) / 2
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            text = "-" if math.isnan(value) else cells.text(value)
            axes.text(x, y, text, ha="center", va="center", color="white" if value > middle else "black")
    figure.colorbar(image, label=cells.caption)
    return figure


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The values of a heat map: (rank, reset interval) -> value, the caption, and the format of a value."""

    values: dict[tuple[int, int | None], float]
    caption: str
    text: Callable[[float], str]


def heat_map(study: Study) -> HeatMap | None:
    """Return the values of the arms whose method has a rank and restarts.

    None if neither the rank nor the interval is swept, or if another setting is swept too.
    """
    arms = [arm for arm in study.arms if arm.finished and arm.config is not None and restarts(arm.config)]
    places = [(arm.config.rank, arm.config.reset_interval_steps) for arm in arms if arm.config is not None]
    if len(set(places)) < max(len(arms), 2):
        return None
    gaps = [arm.gap("tokens") for arm in arms]
    if all(gap is not None for gap in gaps):
        values = {place: 100 * gap.relative for place, gap in zip(places, gaps, strict=True) if gap is not None}
        return HeatMap(values=_with_rank(values), caption="gap to full rank (%)", text=lambda value: f"{value:+.1f}%")
    values = {place: mean(arm.values("test_perplexity")) for place, arm in zip(places, arms, strict=True)}
    return HeatMap(values=_with_rank(values), caption="test perplexity", text=lambda value: f"{value:.2f}")


def restarts(config: RunConfig) -> bool:
    """Return whether the method of a run has a rank and a reset interval."""
    return config.rank is not None and config.method.restarts


def _with_rank(values: dict[tuple[int | None, int | None], float]) -> dict[tuple[int, int | None], float]:
    return {(rank or 0, interval): value for (rank, interval), value in values.items()}


def _shape(run: Run) -> tuple[Any, ...]:
    config = run.config
    assert config is not None
    steps = (config.total_steps, config.method.warm_start_steps, config.reset_interval_steps)
    return (*steps, config.optimizer.learning_rate, config.schedule.warmup_steps, config.schedule.restart_warmup_steps)
