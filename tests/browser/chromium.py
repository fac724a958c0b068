"""Helpers of the browser tests: `relora ui` as a process, and what a page shows."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from small import eventually, skip_or_fail

START_SECONDS = 180.0
PAGE_SECONDS = 120.0


SCREEN = (1600, 1400)
ALL_IN_VIEW = (1600, 5000)
"""Tall enough for every chart of a run. MLflow draws only charts that are in view."""


SETTING = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.layers=2",
    "model.heads=2",
    "method.rank=4",
    "method.warm_start_steps=8",
    "method.reset_interval_steps=8",
    "schedule.warmup_steps=4",
    "schedule.restart_warmup_steps=2",
    "trainer.total_steps=40",
    "trainer.sequences_per_step=4",
    "trainer.validation_interval_steps=10",
    "trainer.device=cpu",
    "data=text",
    "data.vocab_size=300",
    "data.sequence_length_tokens=32",
)


def setting(folder: Path) -> list[str]:
    """Write a text into `folder`. Return the overrides of a run that trains on it for seconds."""
    text = "".join(f"line {number} says {number * number % 97} and {'ab' * (number % 7)}\n" for number in range(3000))
    (folder / "text.txt").write_text(text)
    return [*SETTING, f"data.path={folder / 'text.txt'}", f"runs_dir={folder / 'runs'}"]


def required(name: str, found: str | None) -> str:
    """Return what a browser test needs. If it is missing, skip the test, or fail if RELORA_REQUIRE names browser."""
    if found is None:
        skip_or_fail("browser", f"{name} is missing; on Debian: apt-get install chromium chromium-driver")
    return found


class Ui:
    """`relora ui` of a runs folder. All its processes are killed at the end of the block."""

    def __init__(self, runs_dir: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("relora"), "ui", "--json", *arguments, f"runs_dir={runs_dir}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.family: set[int] = {self.process.pid}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.grown_family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def links(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        line = eventually(self.process.stdout.readline, "relora ui prints its link", START_SECONDS)
        return json.loads(line)

    def grown_family(self) -> list[int]:
        """Return the living processes among this one and all that it has started."""
        parents = living()
        while more := {pid for pid, parent in parents.items() if parent in self.family} - self.family:
            self.family |= more
        return sorted(self.family & parents.keys())

    def stop(self, number: signal.Signals) -> int:
        """Send a signal to this process only, and return its exit code.

        Ctrl-C does not reach a server in a separate session.
        """
        self.grown_family()
        self.process.send_signal(number)
        return self.process.wait(20)

    def left_behind(self) -> list[int]:
        """Return the processes that are alive 3 seconds after the stop."""
        deadline = time.monotonic() + 3
        while (left := self.grown_family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def living() -> dict[int, int]:
    """Return the parent of every process that is not a zombie."""
    found: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.split("/")[2].partition(":")[2]))) == 0


PLOTS = """
return [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    card: plot.closest('[data-testid="experiment-view-compare-runs-card"]')?.textContent ?? '',
    points: [...(plot.data[0].x ?? [])].map((x, i) => [x, plot.data[0].y[i]]),
    curves: plot.data.map(trace => [...(trace.x ?? [])].map((x, i) => [x, trace.y?.[i]])),
    axis: plot.layout?.xaxis?.title?.text ?? '',
    lines: [...plot.querySelectorAll('path.js-line')].map(line => {
        const box = line.getBoundingClientRect();
        return [box.width, box.height];
    }),
}))
"""
SETTLED = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.workflowType_v1": '"machine_learning"',
}


def plots(page: Any) -> list[dict[str, Any]]:
    """Return every chart that is drawn."""
    return page.execute_script(PLOTS)


def plot_of(page: Any, metric: str) -> dict[str, Any] | None:
    """Return the chart of a metric, or None if it is not drawn yet."""
    drawn = [plot for plot in plots(page) if f"({metric})" in plot["card"] and plot["lines"]]
    return drawn[0] if drawn else None
