"""Manage a launched study: show its status, find its logs, cancel it, launch its failed runs again."""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from relora.common.errors import ConfigError, RunError, shown
from relora.config import compose
from relora.config.frozen import read_frozen
from relora.launching.launch import launch_planned
from relora.launching.stop import stop
from relora.launching.submit import EXTRA_JOBS
from relora.runs.rundir import read_json
from relora.runs.state import log_of, observe
from relora.studies.manifest import manifest_of, note_cancellation, studies, study_dir
from relora.studies.publish import mirror_runs
from relora.studies.status import StatusRow, render_plain, status_rows, unreadable
from relora.studies.study import Planned, of_manifest
from relora.tracking.console import is_terminal
from relora.training.summary import relaunch_command

WATCH_SECONDS = 5.0
NAMES_LISTED = 20


def runs_of(runs_dir: Path, name: str) -> list[Planned]:
    """The runs of the study `name`, or the single run `name`. Raises ConfigError if there is neither."""
    if name in studies(runs_dir):
        return of_manifest(runs_dir, name)
    return [find_run(runs_dir, name)]


def find_run(runs_dir: Path, name: str) -> Planned:
    """Find one run.

    Args:
        runs_dir: The folder of all runs.
        name: RUN or STUDY/RUN. RUN may be a part of the run's name if only one run has it.

    Raises:
        ConfigError: There is no such run, or several, or `name` is a study.
    """
    study, _, part = name.rpartition("/")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", part):
        raise ConfigError(
            f"'{shown(name)}' is not a valid name; give STUDY, RUN or STUDY/RUN, where a name has only letters, "
            "digits, '_', '.' and '-'"
        )
    if study:
        roles = {run: entry["role"] for run, entry in manifest_of(runs_dir, study)["runs"].items()}
    elif part in studies(runs_dir):
        made = _made(runs_dir, manifest_of(runs_dir, part)["runs"])
        raise ConfigError(f"{part} is a study; give one of its runs: {_listed([f'{part}/{run}' for run in made])}")
    else:
        roles = dict.fromkeys((file.parent.name for file in sorted(runs_dir.glob(f"*{part}*/config.yaml"))), "arm")
    # Search by folder name and read no config: the config of another run may be damaged.
    made = _made(runs_dir, roles)
    found = [part] if part in made else [run for run in made if part in run]
    if len(found) == 1:
        return Planned(config=read_frozen(runs_dir / found[0] / "config.yaml"), role=roles[found[0]])
    if found:
        raise ConfigError(f"{name} may be {_listed(found)}; write more of the name")
    if study:
        raise ConfigError(f"study {study} has no run {part}; it has {_listed(made)}")
    names = [*studies(runs_dir), *sorted(file.parent.name for file in runs_dir.glob("*/config.yaml"))]
    known = f"there are {_listed(names)}" if names else "the folder has none; give runs_dir=... for another folder"
    raise ConfigError(f"there is no study or run {name} in {runs_dir}; {known}")


def _made(runs_dir: Path, names: Iterable[str]) -> list[str]:
    """The names of the runs whose folder and config exist."""
    return [name for name in names if (runs_dir / name / "config.yaml").is_file()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return ", ".join(names[:NAMES_LISTED]) + more


def show_status(runs_dir: Path, name: str, *, watch: bool) -> bool:
    """Print the state of the runs.

    Args:
        runs_dir: The folder of all runs.
        name: A study or a run.
        watch: Print again every few seconds until all runs have ended.

    Returns:
        Whether no run is failed, cancelled or unreadable.
    """
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
    """The state of each run of the study or run `name`, as JSON objects."""
    planned = runs_of(runs_dir, name)
    rows = [row.as_json() for row in [*status_rows(planned), *_unreadable(runs_dir, name)]]
    mirror_runs(planned)
    return rows


def log_file(runs_dir: Path, name: str) -> Path:
    """The file that holds the output of a run, or of the job before it that made its corpus or warm start.

    Raises ConfigError if there is no output yet.
    """
    run = find_run(runs_dir, name).run
    submission = read_json(run.submission_file)
    file = Path(submission["log"]) if submission else run.path / "log.txt"
    if file.is_file():
        return file
    for needed in submission.get("needs", {}):  # a job that ended before the run's own job could begin
        if (log := log_of(file.parent, needed)).is_file():
            return log
    (state,) = observe([run])
    why = f"{state.name}{f' ({state.message})' if state.message else ''}"
    raise ConfigError(f"{run.path.name} has no log: it is {why}; a run in the foreground prints to the terminal")


def cancel(runs_dir: Path, name: str) -> list[str]:
    """Stop the queued and running runs and return their names. Raises RunError if this machine cannot stop a run."""
    planned = runs_of(runs_dir, name)
    if name in studies(runs_dir):
        note_cancellation(runs_dir, name)
    folder = study_dir(runs_dir, name) if name in studies(runs_dir) else planned[0].run.path
    return stop(planned, beside=read_json(folder / EXTRA_JOBS).get("jobs", []))


def retry(runs_dir: Path, name: str, overrides: Sequence[str]) -> bool:
    """Launch again, from their frozen configs, the runs of a study that are not finished, queued or running.

    Args:
        runs_dir: The folder of all runs.
        name: The study.
        overrides: Changes of the cluster settings of the study's last launch, and runs_dir=....

    Returns:
        As `launch_study`.

    Raises:
        ConfigError: `name` is a single run, or an override is not a cluster setting. A run with another setting would
            be another run.
    """
    changes = [text for text in overrides if not text.startswith("runs_dir=")]
    others = [text for text in changes if not text.lstrip("+").startswith(("cluster=", "cluster."))]
    if others:
        raise ConfigError(f"{others[0]} would change the runs; retry accepts only cluster settings")
    if name not in studies(runs_dir):
        run = find_run(runs_dir, name).run
        raise ConfigError(f"{name} is a single run, and retry needs a study; continue it with: {relaunch_command(run)}")
    planned = of_manifest(runs_dir, name)
    manifest = manifest_of(runs_dir, name)
    cluster = compose.cluster_with(manifest["cluster"], changes)
    planned = [replace(item, config=replace(item.config, cluster=cluster)) for item in planned]
    return launch_planned(name, planned, ["-m", *manifest["launches"][-1]])
