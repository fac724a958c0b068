"""What the pictures of a study share: colours, line styles, the ticks of log axes, and files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c00")
"""The colours of Okabe and Ito, which people with any colour vision can distinguish. Olive replaces their yellow, which
is too light for a line."""
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"
DECADE = 10.0


def line_styles(count: int) -> list[dict[str, Any]]:
    """Return a style for each line. The line style changes after all colours are used."""
    rounds = [divmod(number, len(COLOURS)) for number in range(count)]
    return [{"color": COLOURS[colour], "ls": STYLES[turn % len(STYLES)]} for turn, colour in rounds]


def log_scale(axes: "Axes", which: str = "y") -> None:
    """Give an axis a log scale whose ticks are plain numbers. Call this after the limits are known.

    A log locator has one or two ticks, or none, on less than a decade. There the ticks are those of a linear scale.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axis.get_view_interval()
    if high / low < DECADE:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def save(figure: "Figure", path: Path) -> None:
    """Save a picture as PATH.png and PATH.svg. The same picture gives the same bytes."""
    import matplotlib

    figure.savefig(path.with_suffix(".png"), dpi=110)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
