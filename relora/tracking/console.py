"""The console output of a run: a live progress bar on a terminal, plain lines elsewhere.

This is the only module that imports rich.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from relora.runs.metrics import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar
    from rich.progress import TaskID

PLAIN_INTERVAL_SECONDS = 10.0


def is_terminal() -> bool:
    """Return whether the output goes to a terminal."""
    return sys.stdout.isatty()


def duration(seconds: float) -> str:
    """Format a duration as m:ss, or as h:mm:ss from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(progress: Progress) -> str:
    """Format the progress as one line: loss, learning rate, tokens/s, time left, next restart."""
    left = (progress.total_steps - progress.step) / progress.steps_per_second
    restart = f"  next restart {progress.next_restart}" if progress.next_restart is not None else ""
    return (
        f"loss {progress.loss:.3f}  lr {progress.learning_rate:.2e}  "
        f"{progress.tokens_per_second:,.0f} tokens/s  {duration(left)} left{restart}"
    )


class Console:
    """A tracker that shows the progress on the console."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._live = is_terminal()

    def progress(self, progress: Progress) -> None:
        """Move the bar. Without a terminal, print a line every ten seconds."""
        line = describe(progress)
        if self._live:
            if self._bar is None:
                self._open(progress)
            assert self._bar is not None
            assert self._task is not None
            self._bar.update(self._task, completed=progress.step, status=line)
        elif progress.step == progress.total_steps or time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            print(f"step {progress.step}/{progress.total_steps}  {line}", flush=True)

    def _open(self, progress: Progress) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as ProgressBar

        self._bar = ProgressBar(BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._task = self._bar.add_task("", total=progress.total_steps, completed=progress.step, status="")
        self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing: metrics are not shown."""

    def log_line(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, flush=True)

    def flush(self) -> None:
        """Do nothing: no output is buffered."""

    def close(self) -> None:
        """Stop the bar, and leave it on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LiveTable:
    """A table on the terminal that is redrawn in place, and removed at the end."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(auto_refresh=False, transient=True)
        self._live.start()

    def draw(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw the table in place of the previous one."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(*headings, box=None)
        for row in rows:
            table.add_row(*map(escape, row))
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Remove the table from the terminal."""
        self._live.stop()
