"""The text of table cells and sentences: perplexities, gaps, memory, and the letters of notes."""

import math
from collections.abc import Callable, Sequence

from relora.runs.results import deviation, mean
from relora.studies.compare import Estimate

GIB, MIB = 2**30, 2**20


class Notes:
    """Notes on the values of tables. Each note is printed once. Table cells refer to it by a letter."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return the letter of a note."""
        if text not in self.texts:
            self.texts.append(text)
        number = self.texts.index(text)
        return chr(ord("a") + number % 26) * (1 + number // 26)

    def marks(self, texts: Sequence[str]) -> str:
        """Return the letters of several notes in brackets, each once, after a space. Empty texts are left out."""
        marks = [self.mark(text) for text in dict.fromkeys(filter(None, texts))]
        return f" ({', '.join(marks)})" if marks else ""


def percent(estimate: Estimate | None, seeds: int | None = None) -> str:
    """Format a gap: the mean, ± the deviation over seeds, and the interval if there is one.

    Args:
        estimate: The gap. None is shown as "-".
        seeds: The number of finished runs of the arm. If the gap has fewer seeds, their number is added.
    """
    if estimate is None:
        return "-"
    text = f"{estimate.relative:+.1%}"
    if estimate.deviation is not None:
        text += f" ± {estimate.deviation:.1%}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:+.1%}, {estimate.high:+.1%}]"
    return text if seeds in (None, estimate.seeds) else f"{text} of {estimate.seeds} seeds"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the values of several seeds: the mean, ± the deviation, and how many diverged. "-" without values."""
    finite = [value for value in values if math.isfinite(value)]
    deviations = f" ± {deviation(finite):.{digits}f}" if len(finite) > 1 else ""
    parts = [f"{mean(finite):.{digits}f}{deviations}"] if finite else []
    if len(finite) < len(values):
        parts.append("diverged" if not finite else f"{len(values) - len(finite)} diverged")
    return ", ".join(parts) or "-"


def mean_figure(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Format the mean of values with `text`. "-" without values."""
    return text(mean(values)) if values else "-"


def memory_text(value: float) -> str:
    """Format bytes of memory."""
    return f"{value / GIB:.2f} GiB" if value >= 10 * GIB else f"{value / MIB:,.0f} MiB"


def one_line(text: str) -> str:
    """Return the text on one line, so that no message becomes a heading."""
    return " ".join(text.split())
