"""Train the runs of a study on this machine: one after the other in this process, or each in its own process."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from relora.common import signals
from relora.common.errors import DamagedFile, RunError, printable
from relora.launching.gpus import gpu_for, hold_gpu
from relora.runs.state import observe
from relora.studies.failures import Ended, ended, reason_to_stop
from relora.studies.manifest import cancellations, manifest_of
from relora.studies.status import show_progress
from relora.studies.study import Planned
from relora.training.job import job

POLL_SECONDS = 1.0
WAIT_FOR_STOP_SECONDS = 120.0
"""How long an interrupted launch waits for its runs to write their checkpoints."""


@contextmanager
def only_launcher(runs_dir: Path) -> Iterator[None]:
    """Let one launcher at a time submit runs of a folder. Two at a time would submit the same runs twice."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir / ".launch.lock"):
        yield


def _claim(item: Planned) -> bool:
    """Claim a run for this machine. Return False if another launch has it. Raises RunError if SLURM does not answer."""
    with only_launcher(Path(item.config.runs_dir)):
        (state,) = observe([item.run])
        if state.needs_launch:
            item.run.submission_file.unlink(missing_ok=True)
    if not state.needs_launch:
        print(f"{item.config.name} is {state.name} already, by another launch", flush=True)
    return state.needs_launch


def _stops(over: Sequence[Ended], max_failures: int | None, waiting: int) -> bool:
    """Whether a launch starts no more of its waiting runs, because of how its runs have ended. Prints the reason."""
    reason = reason_to_stop(over, max_failures) if waiting else None
    if reason is not None:
        print(f"{reason}; {waiting} runs are not started (max_failures=N lets N runs fail first)", flush=True)
    return reason is not None


def one_after_the_other(pending: Sequence[Planned], max_failures: int | None) -> None:
    """Train the runs in this process, one after the other, until one is interrupted or too many fail."""
    over: list[Ended] = []
    for number, item in enumerate(pending):
        if _stops(over, max_failures, len(pending) - number):
            return
        try:
            if _claim(item):
                if job(item.run.path).state == "interrupted":
                    signals.forget()  # the run has stopped because of it
                    return
                if (run := ended(item.run)) is not None:
                    over.append(run)
        except (RunError, OSError) as error:
            print(f"{item.config.name}: {error}", flush=True)


class Processes:
    """Train the pending runs, at most `max_parallel` at a time, and show the state of all runs of the study."""

    def __init__(
        self,
        study: str,
        planned: Sequence[Planned],
        pending: Sequence[Planned],
        max_parallel: int,
        max_failures: int | None,
    ) -> None:
        self.study, self.planned, self.waiting, self.max_parallel = study, planned, list(pending), max_parallel
        self.max_failures = max_failures
        self.running: list[tuple[Planned, subprocess.Popen[bytes]]] = []
        self.over: list[Ended] = []

    def run(self) -> None:
        """Train the runs. Ctrl-C and SIGTERM stop each with a checkpoint."""
        show = show_progress(self.planned)
        runs_dir = Path(self.planned[0].config.runs_dir)
        cancelled_before = cancellations(runs_dir, self.study)
        try:
            with signals.raising():
                while self.waiting or self.running:
                    if cancellations(runs_dir, self.study) != cancelled_before:
                        self.waiting.clear()
                    self._start()
                    time.sleep(POLL_SECONDS)
                    self._collect()
                    with suppress(RunError):  # some of the runs may be SLURM jobs, and SLURM may be busy for a moment
                        show(False)
        except KeyboardInterrupt:
            signals.forget()  # a second Ctrl-C ends the wait below
            print("stopping the runs, each with a checkpoint", flush=True)
            for _, process in self.running:
                process.terminate()
            for item, process in self.running:
                wait_for_stop(item, process)
        finally:
            show(True)

    def _start(self) -> None:
        """Start waiting runs until `max_parallel` runs are running. A run that was taken out of the study is left."""
        while self.waiting and len(self.running) < self.max_parallel:
            item = self.waiting.pop(0)
            try:
                if self._is_wanted(item) and _claim(item):
                    self.running.append((item, start_process(item, self.max_parallel)))
            except (RunError, OSError) as error:
                print(f"{item.config.name}: {error}", flush=True)

    def _collect(self) -> None:
        """Take note of the processes that have ended. Start no more runs if too many have failed."""
        for item, process in self.running:
            if process.poll() is not None:
                problem = silent_end(item, process) if process.returncode else ""
                if problem:
                    print(problem, flush=True)
                if (run := ended(item.run, otherwise=problem)) is not None:
                    self.over.append(run)
        before, self.running = self.running, [each for each in self.running if each[1].returncode is None]
        if len(self.running) < len(before) and _stops(self.over, self.max_failures, len(self.waiting)):
            self.waiting.clear()

    def _is_wanted(self, item: Planned) -> bool:
        """Whether the study still has the run. Another launch of it may have pruned the run."""
        try:
            if item.config.name in manifest_of(Path(item.config.runs_dir), self.study)["runs"]:
                return True
        except DamagedFile:
            return True
        print(f"{item.config.name} was taken out of study {self.study} by another launch", flush=True)
        return False


def start_process(item: Planned, max_parallel: int) -> subprocess.Popen[bytes]:
    """Start the process that trains a prepared run.

    The process has its own session. So a terminal's Ctrl-C reaches only the launcher, which then stops the process.
    """
    threads = max(1, (os.cpu_count() or 1) // max_parallel)
    gpu = gpu_for(item.config.trainer.device, max_parallel)
    chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    # Block signals until the new process can handle them.
    with (item.run.path / "log.txt").open("ab") as log, signals.blocked():
        process = subprocess.Popen(
            [sys.executable, "-m", "relora.common.signals", "-m", "relora.training.job", str(item.run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"OMP_NUM_THREADS": str(threads), **os.environ, **chosen},
        )
    hold_gpu(process, gpu)
    return process


def silent_end(item: Planned, process: subprocess.Popen[bytes]) -> str:
    """Describe in one line how a process ended that could not write this into the run's status.

    Returns "" if the process has written the status.
    """
    status = item.run.known_status
    if status is not None and status.pid == process.pid and status.state != "running":
        return ""
    log = item.run.path / "log.txt"
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((printable(line) for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"{item.config.name}: its process ended with exit code {process.returncode}; {log} ends with: {last}"


def wait_for_stop(item: Planned, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process that was asked to stop has stopped. Print a note if it takes longer than the limit."""
    try:
        process.wait(WAIT_FOR_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{item.config.name} (process {process.pid}) has not stopped yet", flush=True)
