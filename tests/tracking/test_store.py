"""Creation of a store that is killed or finds a full disk, incomplete and damaged stores, deleted experiments."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from relora.cli import main as cli
from relora.common.errors import RunError
from relora.config.compose import compose
from relora.tracking import store
from relora.tracking.store import experiment_id, open_store

CHILDREN = """
import os, resource, signal, sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from alembic import command
from relora.tracking.store import open_store

folder, what = Path(sys.argv[1]), sys.argv[2]
for value in sys.argv[3:]:
    child = os.fork()
    if child == 0:
        if what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
        try:
            open_store(f"sqlite:///{folder / 'mlflow.db'}", folder)
        except BaseException as error:
            print(type(error).__name__, flush=True)
            os._exit(1)
        os._exit(0)
    if what == "kill":
        while max([0, *(file.stat().st_size for file in folder.glob("mlflow.db*[!l]"))]) < int(value):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(value, (folder / "mlflow.db").exists(), flush=True)
"""
"""Open a store in one child process after another. Each is killed, or has a full disk, at a given size of the file."""


def opened_by_children(folder: Path, what: str, *values: object) -> list[str]:
    command = [sys.executable, "-c", CHILDREN, str(folder), what, *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def runs_in(file: Path) -> int:
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return database.execute("SELECT count(*) FROM runs").fetchone()[0]


@pytest.mark.slow
def test_a_kill_while_a_store_is_created_leaves_no_store(tmp_path: Path, empty_store: Path) -> None:
    whole = empty_store.stat().st_size
    output = opened_by_children(tmp_path, "kill", *(int(whole * share) for share in (0.0, 0.3, 0.6, 0.95)))
    assert [line for line in output if line.endswith("True")] == []
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "mlflow.db-journal").write_bytes(b"of a store that was removed")
    open_store(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path).create_experiment("works")
    assert runs_in(tmp_path / "mlflow.db") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.lock"]


@pytest.mark.slow
def test_a_full_disk_while_a_store_is_created_leaves_no_store(tmp_path: Path, empty_store: Path) -> None:
    whole = empty_store.stat().st_size
    limits = [int(whole * share) for share in (0.3, 0.9)]
    error = "OperationalError"  # of SQLite, which finds no room
    assert opened_by_children(tmp_path, "limit", *limits) == [error, f"{limits[0]} False", error, f"{limits[1]} False"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.lock"]


@pytest.mark.slow
def test_an_incomplete_store_is_renamed_and_replaced(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow leaves such a store if the disk becomes full, and cannot use the store later."""
    file = tmp_path / "mlflow.db"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(empty_store.stat().st_size * 0.8), before[1]))
        try:
            MlflowClient(f"sqlite:///{file}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(Exception, match=r"already exists|out-of-date|duplicate column"):
        MlflowClient(f"sqlite:///{file}")
    open_store(f"sqlite:///{file}", tmp_path).create_experiment("works")
    shown = capsys.readouterr().err
    (aside,) = tmp_path.glob("mlflow.db.broken-*")
    assert str(file) in shown
    assert aside.name in shown


def test_a_store_with_runs_is_never_replaced(tmp_path: Path, empty_store: Path) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copy(empty_store, file)
    client = open_store(f"sqlite:///{file}", tmp_path)
    client.create_run(client.create_experiment("mine"))
    with closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.commit()
    store_of_another_name = tmp_path / "copy.db"  # a path that MLflow has not opened yet
    file.rename(store_of_another_name)
    with pytest.raises(Exception, match="mlflow db upgrade"):
        open_store(f"sqlite:///{store_of_another_name}", tmp_path)
    assert runs_in(store_of_another_name) == 1


@pytest.mark.parametrize(
    "content", [b"this is no database at all, but some text\n" * 100, b"SQLite format 3\x00" + b"\x07" * 9000]
)
def test_a_file_that_is_no_store_is_kept_and_the_error_names_the_remedy(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"mlflow.db is damaged .* move it away, .*relora sync"):
        open_store(f"sqlite:///{file}", tmp_path)
    assert file.read_bytes() == content


def test_a_store_that_another_process_locks_for_too_long_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with store.store_lock(uri, tmp_path), pytest.raises(RunError, match=r"mlflow\.lock for 0 s; stop it"):
        open_store(uri, tmp_path)


@pytest.mark.slow
def test_the_error_about_a_deleted_experiment_names_the_remedy(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    shutil.copy(empty_store, runs_dir / "mlflow.db")
    config = compose([f"runs_dir={runs_dir}"])
    client = open_store(config.mlflow_uri, runs_dir)
    number = experiment_id(client, config)
    client.delete_experiment(number)
    assert cli.main(["ui", f"runs_dir={runs_dir}"]) == 1
    shown = capsys.readouterr().err
    assert "experiment relora" in shown
    assert f"mlflow experiments restore --experiment-id {number}" in shown
    assert "tracker.experiment=NAME" in shown
    remedy = [sys.executable, "-m", "mlflow", "experiments", "restore", "--experiment-id", number]
    subprocess.run(
        remedy, env={**os.environ, "MLFLOW_TRACKING_URI": config.mlflow_uri}, check=True, capture_output=True
    )
    assert experiment_id(client, config) == number
