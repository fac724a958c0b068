"""The MLflow store: create it atomically, open it and repair it. This is the only module that imports mlflow."""

import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from relora.common.errors import RunError, first_line, print_note
from relora.common.files import sync_folder
from relora.config import credentials
from relora.config.run import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
LOCK_SECONDS = 120.0
"""How long one process waits for another that opens the same store. MLflow needs 5 s to create a store."""
SIGN_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give USER:PASSWORD@ in MLFLOW_TRACKING_URI"
PARAMS_PER_CALL = 100
VALUE_LENGTH = 6000


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    time_ms: int
    step: int


def quiet_mlflow() -> None:
    """Set the environment variables that MLflow reads at import: no telemetry, no long retries, no output.

    Also make each use of a SQLite store open the file again, so that a removed or replaced store is noticed.
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
    """Open the store and check that it answers.

    A missing SQLite store is created under a temporary name and then renamed, so that a kill or a full disk leaves no
    incomplete store. An incomplete store without runs is renamed and created again, and the user sees a note.

    Args:
        uri: The address of the store, without a password.
        runs_dir: The folder of the runs. It holds the lock of a store that is not a SQLite file.

    Returns:
        A client of the store.

    Raises:
        RunError: The SQLite file is damaged, or another process holds the lock of the store for too long.
        Exception: MLflow failed. The type is MLflow's own.
    """
    quiet_mlflow()
    file = sqlite_file(uri)
    with store_lock(uri, runs_dir):
        if file is not None and not (file.exists() and file.stat().st_size):
            _create(file)
        try:
            return _answering(credentials.whole(uri, runs_dir))
        except Exception as error:  # MLflow raises many types
            if file is None:
                raise
            _refuse_damaged(file, error)
            if not _is_incomplete(file):
                raise
            aside = _set_aside(file)
            print_note(f"{file} is incomplete and has no runs ({brief(error)}); renamed to {aside.name} and replaced")
            _create(file)
            return _answering(uri)


def _answering(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for any other store."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


@contextmanager
def store_lock(uri: str, runs_dir: Path) -> Iterator[None]:
    """Hold a store's lock. The lock of a SQLite file is beside the file, so that all runs_dirs with this file share it.

    Raises RunError if another process holds the lock for longer than LOCK_SECONDS.
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
    """Create a store beside `file` and rename it to `file`. The caller must hold the store's lock."""
    for leftover in file.parent.glob(f"{_escaped(file.name)}.*.new*"):  # left by a process that was killed here
        leftover.unlink()
    # The name is new each time, because MLflow remembers each name as an open store.
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        _answering(f"{SQLITE}{new}")
        with new.open("rb") as made:
            os.fsync(made.fileno())
        for stale in _with_journals(file)[1:]:  # SQLite would roll an old journal back into the new store
            stale.unlink(missing_ok=True)
        new.replace(file)
    finally:
        for path in _with_journals(new):
            path.unlink(missing_ok=True)
    sync_folder(file.parent)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _with_journals(file: Path) -> list[Path]:
    """Return a SQLite file and the files that SQLite keeps beside it. The SQLite file is the first."""
    return [file.with_name(file.name + ending) for ending in ("", "-journal", "-wal", "-shm")]


def _is_incomplete(file: Path) -> bool:
    """Return whether the creation of this MLflow store was interrupted: it has MLflow's first tables, but no runs."""
    try:
        with closing(sqlite3.connect(file, timeout=1.0)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "experiments" not in tables:
                return False
            return "runs" not in tables or database.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    except sqlite3.Error:  # locked, or not a database
        return False


def _set_aside(file: Path) -> Path:
    """Rename a store and return its new path."""
    aside = file.with_name(f"{file.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
    for source, target in zip(_with_journals(file), _with_journals(aside), strict=True):
        if source.exists():
            source.rename(target)
    return aside


def _refuse_damaged(file: Path, error: Exception) -> None:
    """Raise RunError if SQLite reports that the file is damaged."""
    if any(words in str(error) for words in ("is not a database", "is malformed")):
        raise RunError(
            f"{file} is damaged ({brief(error)}); move it away, then relora sync RUN_FOLDERS fills a new store from "
            "the runs' own files"
        ) from error


# ------------------------------------------------------------------------------------------------------------- calls


def brief(error: BaseException) -> str:
    """Format an error on one line, without passwords. The error of a library includes its class."""
    if isinstance(error, RunError):
        return credentials.redacted(str(error))
    kind, line = type(error).__name__, credentials.redacted(first_line(error))
    remedy = f"; {SIGN_IN}" if "error code 401" in line else ""
    return kind if line == kind else f"{kind}: {line[:200]}{remedy}"


@contextmanager
def mlflow_errors(config: RunConfig) -> Iterator[None]:
    """Turn every exception inside the block into a RunError that names the store."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"MLflow at {config.mlflow_uri} fails: {brief(error)}") from error


def experiment_id(client: "MlflowClient", config: RunConfig) -> str:
    """Return the id of the configured experiment; create it if it is missing. Raises RunError if it was deleted."""
    runs_dir, name, uri = Path(config.runs_dir), config.tracker.experiment, config.mlflow_uri
    with store_lock(uri, runs_dir):
        found = client.get_experiment_by_name(name)
        if found is None:
            local = (runs_dir / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return client.create_experiment(name, artifact_location=local)
    if found.lifecycle_stage == "deleted":
        raise RunError(
            f"the MLflow experiment {name} at {uri} was deleted; restore it with: MLFLOW_TRACKING_URI={uri} mlflow "
            f"experiments restore --experiment-id {found.experiment_id}, or choose another: tracker.experiment=NAME"
        )
    return found.experiment_id


def recorded_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """Return the run with that id; None if the store has none. A run that was deleted in the UI is returned too."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def is_deleted(run: "Run") -> bool:
    """Return whether a run was deleted in the UI. It can be restored, and it accepts no data until then."""
    return run.info.lifecycle_stage == "deleted"


def runs_of_config(client: "MlflowClient", experiment: str, config_hash: str) -> "Sequence[Run]":
    """Return the runs of a config, including those that were deleted in the UI."""
    from mlflow.entities import ViewType

    return client.search_runs([experiment], f"tags.config_hash = '{config_hash}'", run_view_type=ViewType.ALL)


def send_params(client: "MlflowClient", run_id: str, values: Mapping[str, object]) -> None:
    """Set parameters, at most `PARAMS_PER_CALL` per call, which is MLflow's limit."""
    from mlflow.entities import Param

    params = [Param(name, str(value)[:VALUE_LENGTH]) for name, value in values.items()]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])


def send_points(client: "MlflowClient", run_id: str, points: Sequence[Point]) -> None:
    """Add points in one call. MLflow stores equal points only once."""
    from mlflow.entities import Metric

    if points:
        client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def values_held(client: "MlflowClient", run_id: str) -> dict[tuple[str, int], float]:
    """Return the newest value of each (metric, step) that MLflow holds of a run."""
    names = client.get_run(run_id).data.metrics
    points = [point for name in names for point in client.get_metric_history(run_id, name)]
    return {(point.key, point.step): point.value for point in sorted(points, key=lambda point: point.timestamp)}
