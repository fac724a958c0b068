"""What one does with a launched study: see how it stands, read its logs, cancel it, try again what failed."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from relora.common.errors import ConfigError, RunError, shown
from relora.config import compose
from relora.config.frozen import read_frozen
from relora.launching.launch import launch_again
from relora.launching.submit import BESIDE
from relora.runs import slurm
from relora.runs.rundir import RunDir, read_json, write_json
from relora.runs.state import log_of, observe
from relora.studies.manifest import manifest_of, note_cancellation, studies, study_dir
from relora.studies.publish import mirror_runs
from relora.studies.status import StatusRow, render_plain, status_rows, unreadable
from relora.studies.study import Planned, of_manifest
from relora.tracking.console import is_terminal
from relora.training.summary import relaunch_command

WATCH_SECONDS = 5.0
NAMES_TOLD = 20


def runs_of(runs_dir: Path, name: str) -> list[Planned]:
    """The runs of a study, or the one run of that name. Raises ConfigError where there is neither."""
    if name in studies(runs_dir):
        return of_manifest(runs_dir, name)
    return [find_run(runs_dir, name)]


def find_run(runs_dir: Path, name: str) -> Planned:
    """The run called `name` or STUDY/NAME, where NAME may be any part that only one run has. Raises ConfigError."""
    study, _, part = name.rpartition("/")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", part):
        raise ConfigError(
            f"'{shown(name)}' is no name of a study or run, nor STUDY/RUN: a name holds letters, "
            "digits, '_', '.' and '-'"
        )
    if study:
        roles = {run: entry["role"] for run, entry in manifest_of(runs_dir, study)["runs"].items()}
    elif part in studies(runs_dir):
        made = _made(runs_dir, manifest_of(runs_dir, part)["runs"])
        raise ConfigError(f"{part} is a study, and one run is wanted: {_listed([f'{part}/{run}' for run in made])}")
    else:
        roles = dict.fromkeys((file.parent.name for file in sorted(runs_dir.glob(f"*{part}*/config.yaml"))), "arm")
    # By the names of the folders: the config of a run that is not asked for may be damaged.
    made = _made(runs_dir, roles)
    found = [part] if part in made else [run for run in made if part in run]
    if len(found) == 1:
        return Planned(config=read_frozen(runs_dir / found[0] / "config.yaml"), role=roles[found[0]])
    if found:
        raise ConfigError(f"{name} may be {_listed(found)}; write more of the name")
    if study:
        raise ConfigError(f"study {study} has no run {part}; it has {_listed(made)}")
    names = [*studies(runs_dir), *sorted(file.parent.name for file in runs_dir.glob("*/config.yaml"))]
    known = f"there are {_listed(names)}" if names else "it holds none; runs_dir=... names another folder"
    raise ConfigError(f"there is no study or run {name} in {runs_dir}; {known}")


def _made(runs_dir: Path, names: Iterable[str]) -> list[str]:
    """Those whose folders are there."""
    return [name for name in names if (runs_dir / name / "config.yaml").is_file()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more


def show_status(runs_dir: Path, name: str, *, watch: bool) -> bool:
    """Print how the runs stand, with `watch` until all have ended; whether none failed."""
    planned = runs_of(runs_dir, name)
    while True:
        try:
            rows = [*status_rows(planned), *_unreadable(runs_dir, name)]
        except RunError as error:
            if not watch:
                raise
            print(error, flush=True)  # SLURM may be busy for a moment
            time.sleep(WATCH_SECONDS)
            continue
        if watch and is_terminal():
            print("\x1b[2J\x1b[H", end="")
        print(render_plain(rows), flush=True)
        mirror_runs(planned)
        if not watch or not any(row.state.is_under_way for row in rows):
            return not any(row.state.name in ("failed", "cancelled", "unreadable") for row in rows)
        time.sleep(WATCH_SECONDS)


def _unreadable(runs_dir: Path, name: str) -> list[StatusRow]:
    return unreadable(runs_dir, name) if name in studies(runs_dir) else []


def status_json(runs_dir: Path, name: str) -> list[dict[str, object]]:
    """How the runs stand, as records."""
    planned = runs_of(runs_dir, name)
    rows = [row.as_json() for row in [*status_rows(planned), *_unreadable(runs_dir, name)]]
    mirror_runs(planned)
    return rows


def log_file(runs_dir: Path, name: str) -> Path:
    """Where a run's output goes. Raises ConfigError for one that has none yet."""
    run = find_run(runs_dir, name).run
    submission = read_json(run.submission_file)
    file = Path(submission["log"]) if submission else run.path / "log.txt"
    if file.is_file():
        return file
    for needed in submission.get("needs", {}):  # what ended before the run's own job could begin
        if (log := log_of(file.parent, needed)).is_file():
            return log
    (state,) = observe([run])
    why = f"{state.name}{f' ({state.message})' if state.message else ''}"
    raise ConfigError(f"{run.path.name} has written no log: it is {why}; a run in the foreground prints it")


def cancel(runs_dir: Path, name: str) -> list[str]:
    """Stop what is queued or running; returns the runs' names. Raises RunError where that cannot be done from here."""
    planned = runs_of(runs_dir, name)
    if name in studies(runs_dir):
        note_cancellation(runs_dir, name)
    states = observe([item.run for item in planned])
    active = [item for item, state in zip(planned, states, strict=True) if state.is_under_way]
    submissions = [read_json(item.run.submission_file) for item in active]
    folder = study_dir(runs_dir, name) if name in studies(runs_dir) else planned[0].run.path
    beside = read_json(folder / BESIDE).get("jobs", [])
    answer = slurm.ask(beside if slurm.is_here() else [])
    jobs = [submission["job"] for submission in submissions if submission]
    jobs += [job for job in beside if (known := answer.of(job)) is not None and known.alive]
    if jobs:
        slurm.cancel(jobs)
    problems: list[str] = []
    for item, submission in zip(active, submissions, strict=True):
        if submission:
            # SLURM keeps no record of a task that was cancelled before it began.
            write_json(item.run.submission_file, {**submission, "cancelled": True})
        else:
            problems += _terminate(item.run)
    if problems:
        raise RunError("; ".join(problems))
    return [item.config.name for item in active]


def _terminate(run: RunDir) -> list[str]:
    """Ask a process of this machine to stop, with a checkpoint; returns what stands against it."""
    status = run.known_status
    if status is None or status.host != socket.gethostname():
        return [f"{run.path.name} is trained on {status.host if status else 'another machine'}; cancel it there"]
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(status.pid, signal.SIGTERM)
    return []


def retry(runs_dir: Path, name: str, overrides: Sequence[str]) -> bool:
    """Launch again, from their frozen configs, the runs that are neither finished nor under way.

    Where they run is what the study's last launch said, changed by the cluster settings among `overrides`. Raises
    ConfigError for other overrides: a run that is changed is another run.
    """
    changes = [text for text in overrides if not text.startswith("runs_dir=")]
    others = [text for text in changes if not text.lstrip("+").startswith(("cluster=", "cluster."))]
    if others:
        raise ConfigError(f"{others[0]} would make other runs of them; retry takes cluster settings alone")
    if name not in studies(runs_dir):
        run = find_run(runs_dir, name).run
        raise ConfigError(f"{name} is a single run, and retry takes a study; go on with: {relaunch_command(run)}")
    planned = of_manifest(runs_dir, name)
    manifest = manifest_of(runs_dir, name)
    cluster = compose.cluster_with(manifest["cluster"], changes)
    planned = [replace(item, config=replace(item.config, cluster=cluster)) for item in planned]
    return launch_again(name, planned, ["-m", *manifest["launches"][-1]])
