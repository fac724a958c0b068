"""Launch a run, or the runs of a study with their baselines, on this machine or on SLURM."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from relora.common import signals
from relora.common.errors import RunError, printable
from relora.config.cluster import ClusterConfig, SlurmConfig
from relora.config.run import RunConfig
from relora.launching.gpus import gpu_for, hold_gpu
from relora.runs.rundir import read_json
from relora.runs.spent import other_switches
from relora.runs.state import ObservedState, observe
from relora.studies.baselines import launch_notes
from relora.studies.manifest import cancellations, study_dir
from relora.studies.publish import join_study, publish_report
from relora.studies.status import render_plain, show_progress, status_rows
from relora.studies.study import Planned, planned_runs, prepare, write_manifest
from relora.studies.sweeps import Sweep
from relora.training.job import job

POLL_SECONDS = 1.0
SLURM_POLL_SECONDS = 10.0
WAIT_FOR_STOP_SECONDS = 120.0
"""How long an interrupted launch waits for its runs to write their checkpoints."""


def launch_study(sweep: Sweep, overrides: Sequence[str]) -> bool:
    """Train or submit those runs of the study that are missing, failed or stopped.

    Ctrl-C and SIGTERM stop every run on this machine with a checkpoint. The same launch then continues the runs.

    Args:
        sweep: The study's runs.
        overrides: The arguments of run.py without -m, for the study's manifest.

    Returns:
        Whether all runs are finished. With SLURM, and without `cluster.wait`, whether all are submitted.

    Raises:
        ConfigError: SLURM would refuse the jobs, or a full-rank baseline cannot be made.
    """
    planned = planned_runs(sweep)
    baselines = [item.config for item in planned if item.role == "baseline"]
    for remark in (*sweep.remarks, *launch_notes(baselines, [item.config for item in planned])):
        print(f"note: {remark}", flush=True)
    check_cluster(planned[0].config.cluster)
    write_manifest(Path(planned[0].config.runs_dir), sweep, planned, overrides)
    return launch_planned(sweep.study, planned, ["-m", *overrides])


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise ConfigError if SLURM would refuse the jobs, before anything is written."""
    if isinstance(cluster, SlurmConfig):
        from relora.launching.submit import check

        check(cluster)


def launch_planned(study: str, planned: Sequence[Planned], command: Sequence[str]) -> bool:
    """Launch those runs of a study, already in its manifest, that are neither finished nor queued nor running.

    Args:
        study: The study's name.
        planned: All runs of the study. The first one's `cluster` says where they run.
        command: The arguments of run.py, with which a run can be resumed.

    Returns:
        As `launch_study`.
    """
    config = planned[0].config
    if isinstance(config.cluster, SlurmConfig):
        return _submit_study(study, planned, command, config.cluster)
    states = observe([item.run for item in planned])
    pending = _to_launch(planned, states, command, study)
    names, baselines = [state.name for state in states], sum(item.role == "baseline" for item in planned)
    print(
        f"study {study}: {len(planned)} runs, {baselines} of them baselines that were added; "
        f"{names.count('finished')} finished already, {names.count('running') + names.count('queued')} running",
        flush=True,
    )
    if config.cluster.name == "debug":
        _one_after_the_other(pending)
    else:
        _Processes(study, planned, pending, config.cluster.max_parallel).run()
    return _conclude(study, planned)


def _to_launch(
    planned: Sequence[Planned], states: Sequence[ObservedState], command: Sequence[str], study: str
) -> list[Planned]:
    """Prepare and return the runs that need a launch. The other runs become members of the study in MLflow."""
    pending = [item for item, state in zip(planned, states, strict=True) if state.needs_launch]
    for line in _other_switches(planned, states):
        print(f"note: {line}", flush=True)
    prepare(pending, command)
    join_study([item for item in planned if item not in pending], study)
    return pending


def _other_switches(planned: Sequence[Planned], states: Sequence[ObservedState]) -> list[str]:
    """Notes on finished runs that the study uses although this launch asks for other switches."""
    runs: dict[str, list[str]] = {}
    for item, state in zip(planned, states, strict=True):
        status = item.run.known_status
        if state.name == "finished" and status and (switches := other_switches(item.config, status.spent)):
            runs.setdefault(switches, []).append(item.config.name)
    return [
        f"this study uses finished runs with {switches}, with the speed and memory measured then: {', '.join(names)}"
        for switches, names in runs.items()
    ]


def _conclude(study: str, planned: Sequence[Planned]) -> bool:
    """Print the table and write the report of a study whose runs have ended. Return whether all runs are finished."""
    rows = status_rows(planned)
    print(render_plain(rows), flush=True)
    publish_report(Path(planned[0].config.runs_dir), study)
    unfinished = sum(row.state.name != "finished" for row in rows)
    if unfinished:
        print(f"{unfinished} runs are not finished; the same command continues them", flush=True)
    return not unfinished


def _one_after_the_other(pending: Sequence[Planned]) -> None:
    """Train the runs in this process, one after the other, until one is interrupted."""
    for item in pending:
        try:
            if _claim(item) and job(item.run.path).state == "interrupted":
                signals.forget()  # the run has stopped because of it
                return
        except (RunError, OSError) as error:
            print(f"{item.config.name}: {error}", flush=True)


def _claim(item: Planned) -> bool:
    """Claim a run for this machine. Return False if another launch has it. Raises RunError if SLURM does not answer."""
    with _only_launcher(Path(item.config.runs_dir)):
        (state,) = observe([item.run])
        if state.needs_launch:
            item.run.submission_file.unlink(missing_ok=True)
    if not state.needs_launch:
        print(f"{item.config.name} is {state.name} already, by another launch", flush=True)
    return state.needs_launch


# ------------------------------------------------------------------------------------------------------------ SLURM


def _submit_study(study: str, planned: Sequence[Planned], command: Sequence[str], cluster: SlurmConfig) -> bool:
    from relora.launching.submit import submit

    check_cluster(cluster)
    runs_dir = Path(planned[0].config.runs_dir)
    with _only_launcher(runs_dir):
        states = observe([item.run for item in planned])
        if all(state.name == "finished" for state in states):
            return _conclude(study, planned)
        pending = _to_launch(planned, states, command, study)
        under_way = {
            read_json(item.run.submission_file)["job"].partition("_")[0]
            for item, state in zip(planned, states, strict=True)
            if state.is_under_way and item.run.submission_file.exists()
        }
        outcome = "submitted nothing"
        if pending:
            made = submit(pending, study_dir(runs_dir, study) / "jobs", study=study, after=sorted(under_way))
            outcome = f"submitted {len(pending)} runs as {made.describe()}"
    done = ", ".join(
        f"{count} {word}"
        for word, name in (("already done", "finished"), ("running", "running"), ("queued", "queued"))
        if (count := sum(state.name == name for state in states))
    )
    where = f" runs_dir={runs_dir}" if runs_dir != Path("runs").absolute() else ""
    print(f"{outcome}{f' ({done})' if done else ''}; relora status {study}{where}", flush=True)
    if not cluster.wait:
        return True
    _wait(planned)
    return _conclude(study, planned)


@contextmanager
def _only_launcher(runs_dir: Path) -> Iterator[None]:
    """Let one launcher at a time submit runs of a folder. Two at a time would submit the same runs twice."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(runs_dir / ".launch.lock"):
        yield


def _wait(planned: Sequence[Planned]) -> None:
    """Show the runs until none is queued or running. Ctrl-C ends the display, and the SLURM jobs continue."""
    show = show_progress(planned)
    try:
        while True:
            with suppress(RunError):  # SLURM may be busy for a moment
                if not any(state.is_under_way for state in show(False)):
                    break
            time.sleep(SLURM_POLL_SECONDS)
    finally:
        show(True)


def submit_run(config: RunConfig, overrides: Sequence[str]) -> bool:
    """Submit a single run as a SLURM job, unless it needs no launch.

    Args:
        config: The run. Its `cluster` is a SlurmConfig.
        overrides: The arguments of run.py, with which the run can be resumed.

    Returns:
        True. With `cluster.wait`, whether the run is finished after the wait.
    """
    from relora.launching.submit import submit

    assert isinstance(config.cluster, SlurmConfig)
    check_cluster(config.cluster)
    item = Planned(config=config, role="arm")
    with _only_launcher(Path(config.runs_dir)):
        (state,) = observe([item.run])
        if state.needs_launch:
            prepare([item], overrides)
            made = submit([item], item.run.path / "jobs", study=None)
            print(f"submitted {config.name} as job {made.arrays[0]}; relora logs {config.name}", flush=True)
        else:
            print(f"{item.run.path} is {state.name} already; relora logs {config.name}", flush=True)
    if not config.cluster.wait:
        return True
    _wait([item])
    return item.state == "finished"


# ------------------------------------------------------------------------------------------------------- processes


class _Processes:
    """Train the pending runs, at most `max_parallel` at a time, and show the state of all runs of the study."""

    def __init__(self, study: str, planned: Sequence[Planned], pending: Sequence[Planned], max_parallel: int) -> None:
        self.study, self.planned, self.waiting, self.max_parallel = study, planned, list(pending), max_parallel
        self.running: list[tuple[Planned, subprocess.Popen[bytes]]] = []

    def run(self) -> None:
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
                    for item, process in self.running:
                        if process.poll() and (problem := silent_end(item, process)):
                            print(problem, flush=True)
                    self.running = [(item, process) for item, process in self.running if process.returncode is None]
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
        """Start waiting runs until `max_parallel` runs are running."""
        while self.waiting and len(self.running) < self.max_parallel:
            item = self.waiting.pop(0)
            try:
                if _claim(item):
                    self.running.append((item, start_process(item, self.max_parallel)))
            except (RunError, OSError) as error:
                print(f"{item.config.name}: {error}", flush=True)


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
