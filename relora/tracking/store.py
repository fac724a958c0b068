"""The MLflow store: created whole, opened, mended; the one importer of mlflow."""

import logging
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from relora.common.errors import RunError, first_line
from relora.common.files import sync_folder
from relora.config import credentials
from relora.config.run import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
LOCK_SECONDS = 120.0
"""How long one process waits for another that opens the same store; creating one takes MLflow 5 s."""
SIGN_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give USER:PASSWORD@ in MLFLOW_TRACKING_URI"
PARAMS_PER_CALL = 100
VALUE_LENGTH = 6000


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    time_ms: int
    step: int


def print_note(message: str) -> None:
    """A line for people, beside what the command itself prints."""
    print(f"relora: {message}", file=sys.stderr, flush=True)


def quiet_mlflow() -> None:
    """Set what MLflow reads when it is imported: no telemetry, no long retries, no output of its own.

    Each use of a SQLite store opens the file again, so that a store that was removed or replaced is noticed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    for name, level in (("alembic", logging.WARNING), ("mlflow", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)


def open_store(uri: str, runs_dir: Path) -> "MlflowClient":
    """A client of `uri`, which was asked once and has answered.

    A SQLite store that is missing is created under another name, then renamed: a kill or a full disk leaves no store
    that is half made. One that is half made, and holds no run, is set aside, which is told. Raises what MLflow raises,
    and RunError for a store that is damaged.
    """
    quiet_mlflow()
    file = sqlite_file(uri)
    with store_lock(uri, runs_dir):
        if file is not None and not (file.exists() and file.stat().st_size):
            _create(file)
        try:
            return _answering(credentials.whole(uri, runs_dir))
        except Exception as error:  # whatever MLflow raises
            if file is None:
                raise
            _refuse_damaged(file, error)
            if not _is_half_made(file):
                raise
            aside = _set_aside(file)
            print_note(f"{file} is half made and holds no run ({brief(error)}); renamed {aside.name}, and made anew")
            _create(file)
            return _answering(uri)


def _answering(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


@contextmanager
def store_lock(uri: str, runs_dir: Path) -> Iterator[None]:
    """Hold a store's lock. That of a SQLite file is beside it, so that all runs_dirs that share the file agree.

    Raises RunError where another process holds it for longer than LOCK_SECONDS.
    """
    file = (sqlite_file(uri) or runs_dir / "mlflow").with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        message = f"another process has held {file} for {LOCK_SECONDS:.0f} s; stop it, or try again later"
        raise RunError(message) from None
    try:
        yield
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------------ SQLite files


def _create(file: Path) -> None:
    """Create a store beside `file` and rename it. The caller holds the store's lock."""
    for leftover in file.parent.glob(f"{_escaped(file.name)}.*.new*"):  # of a process that was killed here
        leftover.unlink()
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.new")  # MLflow remembers each name as an open store
    try:
        _answering(f"{SQLITE}{new}")
        with new.open("rb") as made:
            os.fsync(made.fileno())
        for stale in _with_journals(file)[1:]:  # SQLite would roll it back into the new store
            stale.unlink(missing_ok=True)
        new.replace(file)
    finally:
        for path in _with_journals(new):
            path.unlink(missing_ok=True)
    sync_folder(file.parent)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _with_journals(file: Path) -> list[Path]:
    """A SQLite file, and the files that SQLite keeps beside it."""
    return [file.with_name(file.name + ending) for ending in ("", "-journal", "-wal", "-shm")]


def _is_half_made(file: Path) -> bool:
    """Whether the creation of this MLflow store was cut off: it has MLflow's first tables, and no run."""
    try:
        with closing(sqlite3.connect(file, timeout=1.0)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "experiments" not in tables:
                return False
            return "runs" not in tables or database.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    except sqlite3.Error:  # locked, or no database
        return False


def _set_aside(file: Path) -> Path:
    """Rename a store, and return its new path."""
    aside = file.with_name(f"{file.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    for source, target in zip(_with_journals(file), _with_journals(aside), strict=True):
        if source.exists():
            source.rename(target)
    return aside


def _refuse_damaged(file: Path, error: Exception) -> None:
    """Raise RunError where SQLite says that the file is damaged."""
    if any(words in str(error) for words in ("is not a database", "is malformed")):
        raise RunError(
            f"{file} is damaged ({brief(error)}); move it away, then relora sync RUN_FOLDERS fills a new store from "
            "the runs' own files"
        ) from error


# ------------------------------------------------------------------------------------------------------------- calls


def brief(error: BaseException) -> str:
    """What was raised, in one line, without passwords; with its class where it is a library's."""
    if isinstance(error, RunError):
        return credentials.redacted(str(error))
    kind, line = type(error).__name__, credentials.redacted(first_line(error))
    remedy = f"; {SIGN_IN}" if "error code 401" in line else ""
    return kind if line == kind else f"{kind}: {line[:200]}{remedy}"


@contextmanager
def mlflow_errors(config: RunConfig) -> Iterator[None]:
    """Turn whatever MLflow raises inside into a RunError that names the store."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"MLflow at {config.mlflow_uri} fails: {brief(error)}") from error


def experiment_id(client: "MlflowClient", config: RunConfig) -> str:
    """The configured experiment, created where it is missing. Raises RunError where it was deleted."""
    runs_dir, name, uri = Path(config.runs_dir), config.tracker.experiment, config.mlflow_uri
    with store_lock(uri, runs_dir):
        found = client.get_experiment_by_name(name)
        if found is None:
            local = (runs_dir / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return client.create_experiment(name, artifact_location=local)
    if found.lifecycle_stage == "deleted":
        raise RunError(
            f"the MLflow experiment {name} at {uri} was deleted; restore it with: MLFLOW_TRACKING_URI={uri} mlflow "
            f"experiments restore --experiment-id {found.experiment_id}, or name another with tracker.experiment=NAME"
        )
    return found.experiment_id


def recorded_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run of that id, None where the store has none; `is_deleted` tells of one that was deleted in the UI."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def is_deleted(run: "Run") -> bool:
    """Whether a run was deleted in the UI: it can be restored, and takes nothing until then."""
    return run.info.lifecycle_stage == "deleted"


def runs_of_config(client: "MlflowClient", experiment: str, config_hash: str) -> "Sequence[Run]":
    """The runs of a config, those that were deleted in the UI included."""
    from mlflow.entities import ViewType

    return client.search_runs([experiment], f"tags.config_hash = '{config_hash}'", run_view_type=ViewType.ALL)


def send_params(client: "MlflowClient", run_id: str, values: Mapping[str, object]) -> None:
    """Set parameters, in calls of as many as MLflow takes."""
    from mlflow.entities import Param

    params = [Param(name, str(value)[:VALUE_LENGTH]) for name, value in values.items()]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])


def send_points(client: "MlflowClient", run_id: str, points: Sequence[Point]) -> None:
    """Add points in one call; MLflow keeps a point that it has already once."""
    from mlflow.entities import Metric

    if points:
        client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def values_held(client: "MlflowClient", run_id: str) -> dict[tuple[str, int], float]:
    """The newest value of each (metric, step) that MLflow holds of a run."""
    names = client.get_run(run_id).data.metrics
    points = [point for name in names for point in client.get_metric_history(run_id, name)]
    return {(point.key, point.step): point.value for point in sorted(points, key=lambda point: point.timestamp)}
