"""Real runs with a real MLflow server or store that is down, slow, silent, failing or locked, or that loses the run.

Training continues and ends with the weights of an undisturbed run. MLflow gets each point once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient
from processes import free_port
from small import TINY, eventually

from relora.cli import main as cli
from relora.config.compose import compose
from relora.runs.metrics import MetricsLog, read_rows, row_metrics
from relora.runs.rundir import RunDir
from relora.tracking import mirror as tracking
from relora.training.job import launch

pytestmark = pytest.mark.slow


FIRST, LAST = 3, 14
"""The outage begins at step FIRST and lasts to the end of the run, unless a test ends it earlier."""
BOUND_SECONDS = 15.0
"""The time limit of the steps from FIRST to LAST. It is far below the time-outs and retries of an outage."""
ERROR_500 = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """A proxy between relora and a server. `mode` says how it handles every later request."""

    def __init__(self, server: int) -> None:
        self.server, self.mode, self.requests = server, "pass", 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # either side may close the connection at any moment, often after a silence; the next call notices it
        with contextlib.suppress(OSError):
            self._relay(client)

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.server)) as server:
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
            while chunk := _received(client):
                self.requests += 1
                if self.mode == "down":
                    return
                if self.mode == "failing":
                    client.sendall(ERROR_500)
                    return
                if self.mode == "slow":
                    time.sleep(1.0)
                while self.mode == "silent":
                    time.sleep(0.05)
                server.sendall(chunk)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        while chunk := _received(source):
            try:
                target.sendall(chunk)
            except OSError:
                return


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[int]:
    """The port of an MLflow server."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(empty_store, folder / "mlflow.db")
    command = ["--workers", "1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *command],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    eventually(listens, "the server starts")
    yield port
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:  # uvicorn waits without end for a connection that a client keeps open
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def setting(text: Path) -> list[str]:
    return [*TINY, "data=text", f"data.path={text}", "trainer.log_interval_steps=1"]


def weights(run: RunDir) -> str:
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(setting: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run without MLflow."""
    overrides = [*setting, f"runs_dir={tmp_path_factory.mktemp('undisturbed')}", "tracker=jsonl"]
    assert launch(compose(overrides), overrides).state == "finished"
    return weights(RunDir(compose(overrides).run_dir))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SYNC_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "FIRST_SYNC_SECONDS", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def trained(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, at: Mapping[int, Callable[[RunDir], None]]
) -> tuple[RunDir, float]:
    """Train a run and call a function at some steps. Return the run and the seconds from step FIRST to step LAST."""
    config = compose(overrides)
    run, real, times = RunDir(config.run_dir), MetricsLog.log, {}

    def log(self: MetricsLog, step: int, metrics: Mapping[str, float]) -> None:
        real(self, step, metrics)
        if step not in times and step:
            if step in at:
                at[step](run)
            times[step] = time.monotonic()

    monkeypatch.setattr(MetricsLog, "log", log)
    assert launch(config, overrides).state == "finished"
    return run, times[LAST] - times[FIRST]


def is_recorded(run: RunDir) -> None:
    eventually(run.mirror_file.exists, "the run is in MLflow", 60)


def assert_complete(run: RunDir, uri: str) -> None:
    """MLflow has each point of the file once, and the final status of the run."""
    client = MlflowClient(uri)
    recorded = client.get_run(json.loads(run.mirror_file.read_text())["run_id"])
    assert recorded.info.status == "FINISHED"
    assert recorded.info.lifecycle_stage == "active"
    history = (
        point for name in recorded.data.metrics for point in client.get_metric_history(recorded.info.run_id, name)
    )
    held = sorted((point.key, point.step, point.value, point.timestamp) for point in history)
    rows = read_rows(run.metrics_file)
    assert held == sorted(
        (name, row["step"], value, row["time_ms"]) for row in rows for name, value in row_metrics(row).items()
    )


@pytest.mark.parametrize(
    ("mode", "begins"),
    [
        ("down", "at the start"),
        ("slow", "at the start"),
        ("down", "in the middle"),
        ("failing", "in the middle"),
        ("silent", "in the middle"),
    ],
)
def test_an_outage_to_the_end_does_not_disturb_the_run_and_sync_sends_the_rest(
    setting: list[str],
    server: int,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    begins: str,
) -> None:
    monkeypatch.setattr(tracking, "LAST_SYNC_SECONDS", 0.3)
    proxy = Proxy(server)
    overrides = [*setting, f"runs_dir={tmp_path}", f"tracker.uri=http://127.0.0.1:{proxy.port}"]

    def begin(run: RunDir) -> None:
        if begins == "in the middle":
            is_recorded(run)
        proxy.mode = mode

    if begins == "at the start":
        proxy.mode = mode
    run, seconds = trained(overrides, monkeypatch, {FIRST - 1: begin})
    assert seconds < BOUND_SECONDS
    assert weights(run) == undisturbed
    assert f"relora sync {run.path}" in capsys.readouterr().out
    proxy.mode = "pass"
    assert cli.main(["sync", str(run.path)]) == 0
    assert_complete(run, f"http://127.0.0.1:{server}")


def test_after_an_outage_in_the_middle_mlflow_is_complete_at_the_end(
    setting: list[str],
    server: int,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy = Proxy(server)
    overrides = [*setting, f"runs_dir={tmp_path}", f"tracker.uri=http://127.0.0.1:{proxy.port}"]

    def begin(run: RunDir) -> None:
        is_recorded(run)
        proxy.mode, proxy.requests = "failing", 0

    def end(run: RunDir) -> None:
        eventually(lambda: proxy.requests > 1, "a request during the outage")
        proxy.mode = "pass"

    run, _ = trained(overrides, monkeypatch, {FIRST - 1: begin, LAST - 4: end})
    shown = capsys.readouterr().out
    assert "training goes on" in shown
    assert "relora sync" not in shown
    assert weights(run) == undisturbed
    assert_complete(run, f"http://127.0.0.1:{server}")


def test_a_run_that_is_deleted_in_the_middle_is_complete_at_the_end(
    setting: list[str], server: int, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{server}"
    overrides = [*setting, f"runs_dir={tmp_path}", f"tracker.uri={uri}"]

    def delete(run: RunDir) -> None:
        is_recorded(run)
        MlflowClient(uri).delete_run(json.loads(run.mirror_file.read_text())["run_id"])

    run, _ = trained(overrides, monkeypatch, {FIRST: delete})
    assert weights(run) == undisturbed
    assert_complete(run, uri)


def test_a_store_that_another_process_locks_does_not_disturb_the_run(
    setting: list[str],
    undisturbed: str,
    empty_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "LAST_SYNC_SECONDS", 0.3)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    locking = sqlite3.connect(tmp_path / "mlflow.db", timeout=20, isolation_level=None, check_same_thread=False)
    overrides = [*setting, f"runs_dir={tmp_path}"]

    def lock(run: RunDir) -> None:
        is_recorded(run)
        locking.execute("BEGIN EXCLUSIVE")

    run, seconds = trained(overrides, monkeypatch, {FIRST - 1: lock})
    assert seconds < BOUND_SECONDS
    assert weights(run) == undisturbed
    locking.execute("ROLLBACK")
    locking.close()
    assert cli.main(["sync", str(run.path)]) == 0
    assert_complete(run, compose(overrides).mlflow_uri)
