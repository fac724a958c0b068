"""The picture of training and validation curves: for each arm the mean over its seeds, with a band."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from relora.runs.results import Run, mean
from relora.studies.compare import Arm, Study
from relora.studies.drawing import MARKERS, line_styles, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED_SHARE = 0.05
"""Each drawn point of a training curve is the mean over this share of the curve."""
START_SHARE = 0.05
"""The share of a curve at its start that does not set the limits of the losses. The loss falls fastest there."""
MOST_POINTS = 500
"""The most drawn points of one training curve."""

Curve = dict[int, tuple[float, float]]
"""Step -> (tokens or FLOPs, value)."""


def draw_curves(study: Study) -> "Figure | None":
    """Draw training loss and validation perplexity, over tokens and over FLOPs."""
    drawn = [(arm, runs) for arm in study.arms if (runs := _runs(arm))]
    if not drawn:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, axis in enumerate(("tokens", "flops")):
        trained: list[Curve] = []
        evaluated: list[Curve] = []
        for place, ((arm, runs), style) in enumerate(zip(drawn, line_styles(len(drawn)), strict=True)):
            losses = [_training_losses(run, axis) for run in runs]
            perplexities = [_perplexities(run, axis) for run in runs]
            _draw(axes[0, column], losses, {**style, "label": arm.label, "lw": 1.3})
            marks = {"marker": MARKERS[place % len(MARKERS)], "ms": 4}
            _draw(axes[1, column], perplexities, {**style, **marks, "label": arm.label, "lw": 1.2})
            trained += losses
            evaluated += perplexities
        _limit(axes[0, column], trained)
        _limit(axes[1, column], evaluated)
        log_scale(axes[1, column])
        axes[0, column].set_ylabel("training loss (nats)")
        axes[1, column].set_ylabel("validation perplexity")
        for row in (0, 1):
            axes[row, column].set_xlabel("training FLOPs" if axis == "flops" else "tokens")
            axes[row, column].xaxis.set_major_formatter(EngFormatter(sep=""))
            axes[row, column].grid(alpha=0.25)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def over_seeds(curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """Return (x, mean, lowest, highest) at each step that all curves have."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    rows: list[tuple[float, float, float, float]] = []
    for step in shared:
        values = [curve[step][1] for curve in curves]
        rows.append((mean([curve[step][0] for curve in curves]), mean(values), min(values), max(values)))
    return rows


def smoothed(curve: Curve) -> Curve:
    """Return the moving mean over SMOOTHED_SHARE of the points, at most about MOST_POINTS of them."""
    steps = list(curve)
    width = max(1, round(SMOOTHED_SHARE * len(steps)))
    starts = range(0, len(steps) - width + 1, max(1, len(steps) // MOST_POINTS))
    found: Curve = {}
    for start in starts:
        part = [curve[step] for step in steps[start : start + width]]
        found[steps[start + width // 2]] = (mean([x for x, _ in part]), mean([y for _, y in part]))
    return found


def _runs(arm: Arm) -> list[Run]:
    """Return the runs of an arm that have a curve: the finished runs, or all if none is finished."""
    runs = [member.run for member in arm.finished or arm.members]
    return [run for run in runs if len(run.rows) > 1]


def _draw(axes: "Axes", curves: Sequence[Curve], style: dict[str, object]) -> None:
    rows = over_seeds(curves)
    x, middle, low, high = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    axes.plot(x, middle, **style)  # type: ignore[arg-type]
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=str(style["color"]), alpha=0.18, lw=0)


def _limit(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Limit the y axis to the values after the start."""
    values: list[float] = []
    for curve in curves:
        end = max((x for x, _ in curve.values()), default=0.0)
        values += [y for x, y in curve.values() if x > START_SHARE * end]
    if values and max(values) > min(values):
        margin = 0.03 * (max(values) - min(values))
        axes.set_ylim(max(min(values) - margin, min(values) / 1.03), max(values) + margin)


def _training_losses(run: Run, axis: str) -> Curve:
    name = f"progress/{axis}"
    points = {
        row["step"]: (row[name], row["train/loss"])
        for row in run.rows
        if name in row and math.isfinite(row.get("train/loss", math.nan))
    }
    return smoothed(points)


def _perplexities(run: Run, axis: str) -> Curve:
    evaluations = run.evaluations(axis)
    return {step: (x, math.exp(loss)) for step, (x, loss) in evaluations.items() if x > 0 and loss < 20}
