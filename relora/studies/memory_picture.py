"""The picture of test perplexity against memory: one point for each arm, seeds as bars, full rank as a line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relora.config.plan import run_plan
from relora.runs.results import Run, mean
from relora.studies.cells import GIB, MIB
from relora.studies.compare import Arm, Study
from relora.studies.drawing import MARKERS, line_styles, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_POINTS, HEIGHT_POINTS = 430.0, 290.0
"""The size of the axes, in points of 1/72 inch. Labels are placed for this size."""
FONT_POINTS = 9.0
LETTER_POINTS = 0.56 * FONT_POINTS
"""The mean width of a letter."""
GAP_POINTS = 7.0
"""The distance between a point and its label."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm of the picture."""

    label: str
    state_bytes: float
    perplexities: list[float]
    """The finite test perplexities of its seeds."""
    is_full_rank: bool
    has_warm_start: bool

    @property
    def perplexity(self) -> float:
        """The mean over the seeds."""
        return mean(self.perplexities)


def state_bytes(run: Run) -> float | None:
    """Return the bytes of weights, gradients and optimizer state of a finished run, from the cost arithmetic.

    None for a run of an earlier version whose tokenizer has another vocabulary than the config says.
    """
    if "state_bytes" in run.summary:
        return float(run.summary["state_bytes"])
    assert run.config is not None
    plan = run_plan(run.config)
    return float(plan.state_bytes) if plan.parameters == run.summary["parameters"] else None


def points(study: Study) -> list[Point]:
    """Return the points of one setting. Of the full-rank arms, only the baseline has a point. It is the first one."""
    baseline = study.full_rank()
    arms = ([] if baseline is None else [baseline]) + [arm for arm in study.arms if not arm.is_full_rank]
    return [point for arm in arms if (point := _point(arm)) is not None]


def draw_memory(study: Study) -> "Figure | None":
    """Draw one part for each setting. A part needs arms that differ in memory."""
    parts = [(part, points(part)) for part in study.settings()]
    parts = [(part, found) for part, found in parts if len({point.state_bytes for point in found}) > 1]
    if not parts:
        return None
    from matplotlib.figure import Figure

    size = (len(parts) * (WIDTH_POINTS + 90) / 72, (HEIGHT_POINTS + 70) / 72)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (part, found) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _draw(axes, found)
        config = next(arm.config for arm in part.arms if arm.config)
        axes.set_title(f"{config.model.name}, {config.total_steps:,} steps", fontsize=FONT_POINTS)
    return figure


def _point(arm: Arm) -> Point | None:
    sizes = [size for member in arm.finished if (size := state_bytes(member.run)) is not None]
    perplexities = [value for value in arm.values("test_perplexity") if math.isfinite(value)]
    if not sizes or not perplexities or arm.config is None:
        return None
    return Point(
        label=arm.label,
        state_bytes=mean(sizes),
        perplexities=perplexities,
        is_full_rank=arm.is_full_rank,
        has_warm_start=arm.config.method.warm_start_steps > 0,
    )


def _draw(axes: "Axes", found: Sequence[Point]) -> None:
    unit, name = (GIB, "GiB") if max(point.state_bytes for point in found) >= GIB else (MIB, "MiB")
    for number, (point, style) in enumerate(zip(found, line_styles(len(found)), strict=True)):
        low, high = min(point.perplexities), max(point.perplexities)
        axes.errorbar(
            point.state_bytes / unit,
            point.perplexity,
            yerr=[[point.perplexity - low], [high - point.perplexity]],
            fmt=MARKERS[number % len(MARKERS)],
            color=style["color"],
            mfc="white" if point.has_warm_start else style["color"],
            ms=6,
            capsize=2,
        )
        if point.is_full_rank:
            axes.axhline(point.perplexity, color="black", lw=0.9, ls="--", zorder=0)
    axes.margins(x=0.12, y=0.1)
    log_scale(axes, "y")
    log_scale(axes, "x")
    at = [(_place(axes.get_xlim(), p.state_bytes / unit), _place(axes.get_ylim(), p.perplexity)) for p in found]
    scaled = [(x * WIDTH_POINTS, y * HEIGHT_POINTS) for x, y in at]
    places = label_places(scaled, [LETTER_POINTS * len(p.label) for p in found], [p.is_full_rank for p in found])
    for point, anchor, corner in zip(found, scaled, places, strict=True):
        axes.annotate(
            point.label,
            (point.state_bytes / unit, point.perplexity),
            xytext=(corner[0] - anchor[0], corner[1] - anchor[1]),
            textcoords="offset points",
            fontsize=FONT_POINTS,
            va="bottom",
        )
    axes.set_xlabel(f"weights, gradients and optimizer state ({name})")
    axes.set_ylabel("test perplexity")
    axes.grid(alpha=0.25)


def label_places(
    at: Sequence[tuple[float, float]], widths: Sequence[float], above: Sequence[bool]
) -> list[tuple[float, float]]:
    """Return the lower left corner of each label, all in points from the lower left corner of the axes.

    Each label takes the first place beside its point that covers no point and no label. If there is none, it takes the
    place that covers the fewest.

    Args:
        at: The points (x, y) to label.
        widths: The widths of their labels.
        above: Whether a line goes through the point, so that its label cannot be at its height.
    """
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    places: list[tuple[float, float]] = []
    for (x, y), width, is_above in zip(at, widths, above, strict=True):
        beside = (
            [] if is_above else [(x + GAP_POINTS, y - FONT_POINTS / 2), (x - GAP_POINTS - width, y - FONT_POINTS / 2)]
        )
        rises = [GAP_POINTS, -FONT_POINTS - GAP_POINTS, FONT_POINTS + 1.5 * GAP_POINTS]
        corners = beside + [
            (x + start, y + rise) for rise in rises for start in (GAP_POINTS, -GAP_POINTS - width, -width / 2)
        ]
        allowed = [corner for corner in corners if 0 <= corner[0] <= WIDTH_POINTS - width]

        def covered(corner: tuple[float, float], width: float = width) -> int:
            left, low = corner
            right, high = left + width, low + FONT_POINTS
            outside = low < 0 or high > HEIGHT_POINTS
            return outside + sum(left < b[2] and b[0] < right and low < b[3] and b[1] < high for b in boxes)

        best = min(allowed or corners[:1], key=covered)
        places.append(best)
        boxes.append((best[0], best[1], best[0] + width, best[1] + FONT_POINTS))
    return places


def _place(limits: tuple[float, float], value: float) -> float:
    """Return where a value is on a log axis: 0 at its lower end, 1 at its upper end."""
    low, high = limits
    return math.log(value / low) / math.log(high / low)
