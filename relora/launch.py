"""A study on this machine: its runs and their baselines, each in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from relora import compose
from relora.compare import Study, load_study, study_dir
from relora.compose import Sweep
from relora.config import RunConfig
from relora.errors import RunError
from relora.job import job
from relora.metrics import read_rows
from relora.rundir import RunDir, Status, read_json, write_json

POLL_SECONDS = 1.0
WAIT_FOR_STOP_SECONDS = 120.0
"""How long an interrupted sweep waits for its runs to write their checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of a study: an arm that was asked for, or a baseline that came by itself."""

    config: RunConfig
    role: str

    @property
    def run(self) -> RunDir:
        """Its folder."""
        return RunDir(self.config.run_dir)

    @property
    def state(self) -> str:
        """Its status, where a "running" one that nobody trains is interrupted and one never begun is missing."""
        status = self.run.status
        if status is None:
            return "missing"
        if status.state == "running" and not self.run.is_locked:
            return "interrupted"
        return status.state


def plan(sweep: Sweep) -> list[Planned]:
    """The sweep's runs, and before them the full-rank run of every comparison key and seed that has none among them."""
    have = {
        (run.comparison_key, run.trainer.seed)
        for run in sweep.runs
        if run.method.name == "full" and not run.method.warm_start_steps
    }
    baselines: list[Planned] = []
    for config in sweep.runs:
        key = (config.comparison_key, config.trainer.seed)
        if key not in have:
            have.add(key)
            arguments = sweep.arguments.get(config.config_hash, [])
            baselines.append(Planned(config=compose.baseline(config, arguments), role="baseline"))
    return [*baselines, *(Planned(config=config, role="arm") for config in sweep.runs)]


def launch_study(sweep: Sweep, overrides: Sequence[str]) -> bool:
    """Train what is missing, failed or interrupted of the study, and nothing else; whether all of it is finished.

    Ctrl-C and SIGTERM stop every run with a checkpoint; the same launch again goes on.
    """
    planned = plan(sweep)
    runs_dir, cluster = Path(planned[0].config.runs_dir), planned[0].config.cluster
    write_manifest(runs_dir, sweep, planned, overrides)
    pending = [item for item in planned if item.state not in ("finished", "running")]
    states, baselines = [item.state for item in planned], sum(item.role == "baseline" for item in planned)
    print(
        f"study {sweep.study}: {len(planned)} runs, {baselines} of them baselines that came by themselves; "
        f"{states.count('finished')} finished already, {states.count('running')} running",
        flush=True,
    )
    prepare(pending, overrides)
    _join_study([item for item in planned if item not in pending], sweep.study)
    if cluster.name == "debug":
        _one_after_the_other(pending)
    else:
        _Processes(planned, pending, cluster.max_parallel).run()
    print(render_plain(planned), flush=True)
    publish_report(runs_dir, sweep.study)
    unfinished = [item for item in planned if item.state != "finished"]
    if unfinished:
        print(f"{len(unfinished)} runs are not finished; the same command goes on with them", flush=True)
    return not unfinished


def prepare(pending: Sequence[Planned], overrides: Sequence[str]) -> None:
    """Freeze each config into its run's folder, unless another launcher has begun it meanwhile."""
    for item in pending:
        item.run.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(RunError), item.run.locked():
            compose.freeze(item.config, item.run.config_file)
            write_json(item.run.launch_file, {"overrides": ["-m", *overrides]})


def _one_after_the_other(pending: Sequence[Planned]) -> None:
    """In this process, until one is interrupted."""
    for item in pending:
        try:
            if job(item.run.path).state == "interrupted":
                return
        except RunError as error:
            print(f"{item.config.name}: {error}", flush=True)


def publish_report(runs_dir: Path, name: str) -> Study:
    """Write the study's report, attach it in MLflow, and tell where it is and what came out."""
    from relora.report import answer, write_report

    study = load_study(runs_dir, name)
    folder = write_report(study, runs_dir)
    mirrored = [m for m in study.members if m.run.config and m.run.config.tracker.name == "mlflow" and m.run.finished]
    if mirrored:
        from relora.tracking import attach_report

        config = mirrored[-1].run.config
        assert config is not None
        gaps = {m.run.path: m.tokens.relative for m in mirrored}
        try:
            attach_report(config, name, folder, gaps)
        except Exception as error:  # whatever MLflow raises
            print(f"the report could not be attached in MLflow at {config.mlflow_uri}: {error}", flush=True)
    print("\n".join(["", *answer(study), f"report: {folder / 'report.html'}"]), flush=True)
    return study


def write_manifest(runs_dir: Path, sweep: Sweep, planned: Sequence[Planned], overrides: Sequence[str]) -> None:
    """Add the runs to study.json; a study that is launched again with more arms grows."""
    folder = study_dir(runs_dir, sweep.study)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        manifest = read_json(folder / "study.json")
        runs: dict[str, Any] = manifest.get("runs", {})
        for item in planned:
            known = runs.get(item.config.name, {})
            role = "arm" if "arm" in (item.role, known.get("role")) else "baseline"
            runs[item.config.name] = {
                "role": role,
                "config_hash": item.config.config_hash,
                "comparison_key": item.config.comparison_key,
                "variant": item.config.variant,
                "seed": item.config.trainer.seed,
            }
        launches = [*manifest.get("launches", []), list(overrides)]
        unique = [launch for number, launch in enumerate(launches) if launch not in launches[:number]]
        question = sweep.question or manifest.get("question", "")
        values = {"study": sweep.study, "question": question, "launches": unique, "runs": runs}
        write_json(folder / "study.json", values)


def _join_study(planned: Sequence[Planned], study: str) -> None:
    """Tag the runs that an earlier launch, or another study, has recorded in MLflow already."""
    recorded = [item for item in planned if item.run.mirror_file.exists()]
    if not recorded:
        return
    from relora.tracking import tag_study

    for item in recorded:
        try:
            tag_study(item.run, item.config, study)
        except Exception as error:  # whatever MLflow raises
            print(f"{item.config.name} could not be tagged study.{study} in MLflow: {error}", flush=True)


# ------------------------------------------------------------------------------------------------------- processes


class _Processes:
    """Runs the pending ones, a few at a time, and shows how all of them stand."""

    def __init__(self, planned: Sequence[Planned], pending: Sequence[Planned], max_parallel: int) -> None:
        self.planned, self.waiting, self.max_parallel = planned, list(pending), max_parallel
        self.running: list[tuple[Planned, subprocess.Popen[bytes]]] = []

    def run(self) -> None:
        show = _live_table(self.planned) if sys.stdout.isatty() else _plain_lines(self.planned)
        try:
            with stoppable():
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.max_parallel:
                        item = self.waiting.pop(0)
                        self.running.append((item, start_process(item, self.max_parallel)))
                    time.sleep(POLL_SECONDS)
                    self.running = [(item, process) for item, process in self.running if process.poll() is None]
                    show(False)
        except KeyboardInterrupt:
            print("stopping the runs, each with a checkpoint", flush=True)
            for _, process in self.running:
                process.terminate()
            for item, process in self.running:
                wait_for_stop(item, process)
        finally:
            show(True)


def start_process(item: Planned, max_parallel: int) -> subprocess.Popen[bytes]:
    """Train a prepared run, in a session of its own: a terminal's Ctrl-C reaches the launcher alone, which tells it."""
    threads = max(1, (os.cpu_count() or 1) // max_parallel)
    with (item.run.path / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "relora.job", str(item.run.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
        )


def wait_for_stop(item: Planned, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process that was asked to stop has."""
    try:
        process.wait(WAIT_FOR_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"{item.config.name} (process {process.pid}) has not stopped yet", flush=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt, as Ctrl-C is."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ----------------------------------------------------------------------------------------------------------- tables

COLUMNS = ("run", "role", "state", "step", "validation", "test", "gap to full", "tokens/s", "memory")


def rows(planned: Sequence[Planned]) -> list[tuple[str, ...]]:
    """How each run stands, as text under COLUMNS."""
    statuses = [item.run.status for item in planned]
    finished: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for item, status in zip(planned, statuses, strict=True):
        method = item.config.method
        if method.name == "full" and not method.warm_start_steps and status is not None and status.state == "finished":
            key = (item.config.comparison_key, item.config.trainer.seed)
            finished.setdefault(key, []).append(status.summary)
    full = {key: min(found, key=lambda run: run["eval_loss"])["test_perplexity"] for key, found in finished.items()}
    return [
        (item.config.name, item.role, item.state, *_figures(item, status, full))
        for item, status in zip(planned, statuses, strict=True)
    ]


def _figures(item: Planned, status: Status | None, full: dict[tuple[str, int], float]) -> tuple[str, ...]:
    total = item.config.total_steps
    if status is None or status.state != "finished":
        recorded = read_rows(item.run.metrics_file)
        step = max((row["step"] for row in recorded), default=0)
        perplexities = [row["eval/perplexity"] for row in recorded if "eval/perplexity" in row]
        rates = [row["perf/tokens_per_second"] for row in recorded[-5:] if "perf/tokens_per_second" in row]
        return (
            f"{step}/{total}",
            f"{perplexities[-1]:.2f}" if perplexities else "",
            "",
            "",
            f"{rates[-1]:,.0f}" if rates else "",
            "",
        )
    found = status.summary
    baseline = full.get((item.config.comparison_key, item.config.trainer.seed))
    return (
        f"{total}/{total}",
        f"{found['eval_perplexity']:.2f}",
        f"{found['test_perplexity']:.2f}",
        "" if baseline is None else f"{found['test_perplexity'] / baseline - 1:+.1%}",
        f"{found['tokens'] / found['training_seconds']:,.0f}",
        f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB",
    )


def render_plain(planned: Sequence[Planned]) -> str:
    """The table as aligned text."""
    table = [COLUMNS, *rows(planned)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def _plain_lines(planned: Sequence[Planned]) -> Callable[[bool], None]:
    """A line whenever a run's state changes."""
    told: dict[str, str] = {}

    def show(last: bool) -> None:
        for item in planned:
            state = item.state
            if told.get(item.config.name, "missing") != state:
                print(f"{item.config.name}: {state}", flush=True)
            told[item.config.name] = state

    return show


def _live_table(planned: Sequence[Planned]) -> Callable[[bool], None]:
    """The table, redrawn in place."""
    from relora.console import live_table

    return live_table(COLUMNS, lambda: rows(planned))
