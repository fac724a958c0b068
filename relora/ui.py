"""The MLflow UI on the runs' store: its links, its server, and the mirror that keeps the store up to date."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from relora import compose
from relora.compare import studies
from relora.config import RunConfig
from relora.errors import ConfigError, RunError
from relora.publish import mirror_runs
from relora.study import Planned

PORT = 5000
START_SECONDS = 90.0
MIRROR_SECONDS = 10.0


def links(config: RunConfig, *, create: bool = False) -> dict[str, str]:
    """What to put behind a server's address: "all", and the prepared view of each study.

    Raises ConfigError where nothing was recorded, unless the store is to be created.
    """
    uri, runs_dir = config.mlflow_uri, Path(config.runs_dir)
    store = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not store.exists() and not create and not _submitted(runs_dir):
        raise ConfigError(f"{store} does not exist: no run was recorded there; give the runs_dir=... of the runs")

    from relora.store import experiment_id, failures_told, open_store
    from relora.view import view_key, write_view

    known = studies(runs_dir)
    if config.study is not None and config.study not in known:
        raise ConfigError(f"no study {config.study} was launched in {runs_dir}; there are: {', '.join(known)}")
    with failures_told(config):
        client = open_store(uri, runs_dir)
        experiment = experiment_id(client, config)
    found = {"all": f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"}
    for study in [config.study] if config.study else known:
        with failures_told(config):
            write_view(client, experiment, study)
        found[study] = f"{found['all']}&viewStateShareKey={view_key(study)}"
    return found


def _submitted(runs_dir: Path) -> list[Planned]:
    """The runs that were submitted to SLURM: with a store that is a file, their jobs leave it alone."""
    files = sorted(runs_dir.glob("*/submission.json"))
    configs = [file.with_name("config.yaml") for file in files]
    return [Planned(config=compose.at_home(file), role="arm") for file in configs if file.is_file()]


def serve(config: RunConfig, *, port: int | None, host: str | None, ready: Callable[[str], None]) -> int:
    """An MLflow server of one worker until Ctrl-C or SIGTERM; `ready` is told its address.

    With `host`, the name by which other machines reach this one, it accepts them. Raises RunError where it does not
    start.
    """
    port = port or _free_port()
    if _listens(port):
        raise RunError(f"port {port} is in use; take another --port, or leave it out for a free one")
    artifacts = Path(config.runs_dir) / "mlartifacts"
    command = ["--workers", "1", "--host", "127.0.0.1" if host is None else "0.0.0.0", "--port", str(port)]
    command += ["--backend-store-uri", config.mlflow_uri, "--artifacts-destination", artifacts.as_uri()]
    if host is not None:
        command += ["--allowed-hosts", f"{host}:*,{host},localhost:*,127.0.0.1:*"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = tempfile.TemporaryFile()  # noqa: SIM115 -- a pipe that nobody reads would block the server one day
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *command],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                detail = log.read().decode(errors="replace") or "no answer"
                raise RunError(f"the MLflow server did not start on port {port}: {detail.strip()[-500:]}")
            time.sleep(0.2)
        ready(f"http://{host or '127.0.0.1'}:{port}")
        while server.poll() is None:
            mirror_runs(_submitted(Path(config.runs_dir)))
            try:
                server.wait(MIRROR_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return server.returncode
    except KeyboardInterrupt:
        return 0
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
        log.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    """5000 if nothing listens there, else one that the system picks."""
    for wanted in (PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", wanted))
                return probe.getsockname()[1]
            except OSError:
                continue
    raise RunError("no free port")
