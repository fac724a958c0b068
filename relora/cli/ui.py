"""The MLflow UI on the runs' store: its links, its server, and the mirroring that keeps the store up to date."""

import configparser
import contextlib
import importlib.util
import io
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from relora.common.errors import ConfigError, RunError, print_note
from relora.config import credentials, frozen
from relora.config.run import RunConfig
from relora.studies.manifest import studies, unknown_study
from relora.studies.publish import mirror_runs
from relora.studies.study import Planned

ADMIN = "admin"
"""The first user of a server that asks for a password. MLflow's UI can add more users."""
PORT = 5000
START_SECONDS = 90.0
MIRROR_SECONDS = 10.0


def links(config: RunConfig, *, create: bool = False) -> dict[str, str]:
    """The links into the MLflow UI.

    Args:
        config: Says where the store and the runs are. With a `study`, only the view of this study is linked.
        create: Whether the store may be created if it does not exist.

    Returns:
        URL fragments to append to the server's address: "all" for all runs, and the view of each study by its name.

    Raises:
        ConfigError: No run was recorded or submitted and `create` is False, or the study is unknown.
    """
    uri, runs_dir = config.mlflow_uri, Path(config.runs_dir)
    store = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not store.exists() and not create and not _submissions(runs_dir):
        raise ConfigError(
            f"{store} does not exist: no run was recorded there; set runs_dir=... to the folder of the runs"
        )

    from relora.studies.view import view_key, write_view
    from relora.tracking.store import experiment_id, mlflow_errors, open_store

    known = studies(runs_dir)
    if config.study is not None and config.study not in known:
        raise unknown_study(runs_dir, config.study)
    with mlflow_errors(config):
        client = open_store(uri, runs_dir)
        experiment = experiment_id(client, config)
    found = {"all": f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"}
    for study in [config.study] if config.study else known:
        with mlflow_errors(config):
            write_view(client, experiment, study)
        found[study] = f"{found['all']}&viewStateShareKey={view_key(study)}"
    return found


def _submissions(runs_dir: Path) -> list[Path]:
    """The configs of the runs that were submitted to SLURM."""
    configs = [file.with_name("config.yaml") for file in sorted(runs_dir.glob("*/submission.json"))]
    return [file for file in configs if file.is_file()]


def submitted_runs(runs_dir: Path, seen: set[Path]) -> list[Planned]:
    """The runs that were submitted to SLURM. Their jobs do not write to a store that is a file.

    A run whose config cannot be read is left out. The user gets one note of it: its file is then added to `seen`.
    """
    planned: list[Planned] = []
    for file in _submissions(runs_dir):
        try:
            planned.append(Planned(config=frozen.read_frozen(file), role="arm"))
        except ConfigError as error:
            if file not in seen:
                print_note(f"{error}; MLflow gets nothing of this run")
            seen.add(file)
    return planned


def serve(
    config: RunConfig, *, port: int | None, host: str | None, auth: bool, ready: Callable[[str, str], None]
) -> int:
    """Run an MLflow server with one worker until Ctrl-C or SIGTERM, and mirror the submitted runs to it.

    Args:
        config: Says where the store and the runs are.
        port: None for 5000, or a free port if 5000 is in use.
        host: A name or an address of this machine at which the server accepts other machines. None accepts
            only this machine.
        auth: Whether the server asks for the password of `sign_in`.
        ready: Called when the server answers, with its address and the tracker.uri with which runs record there.

    Returns:
        The exit code.

    Raises:
        RunError: The server does not start.
    """
    address = "127.0.0.1" if host is None else own_address(host)
    port = port or _free_port(address)
    if _listens(address, port):
        raise RunError(f"port {port} is in use; choose another --port, or omit it for a free one")
    runs_dir = Path(config.runs_dir)
    name = host or address
    url = store = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    command = ["--workers", "1", "--host", address, "--port", str(port)]
    command += ["--artifacts-destination", (runs_dir / "mlartifacts").as_uri()]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    # In an argument, the store's password would be visible to all users of the machine.
    environment["MLFLOW_BACKEND_STORE_URI"] = credentials.whole(config.mlflow_uri, runs_dir)
    if host is not None:
        names = dict.fromkeys((name, address, "localhost", "127.0.0.1"))
        command += ["--allowed-hosts", ",".join(f"{name}:*,{name}" for name in names)]
    if auth:
        file, password, secret_key = sign_in(runs_dir)
        command += ["--app-name", "basic-auth"]
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(file), "MLFLOW_FLASK_SERVER_SECRET_KEY": secret_key}
        store = credentials.learn(url.replace("://", f"://{ADMIN}:{password}@"))
        credentials.keep(store, runs_dir)
        print_note(f"sign in as {ADMIN}; the password is admin_password in {file}")
    elif host is not None:
        print_note(f"anyone who can reach {url} can see, change and delete its runs; --auth asks for a password")
    if host is not None and ipaddress.ip_address(address).is_loopback:
        print_note(f"{host} is {address} here, which other machines cannot reach; give --host another address")
    log = tempfile.TemporaryFile()  # noqa: SIM115 -- a full pipe that nobody reads would block the server
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(address, port):
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                detail = log.read().decode(errors="replace") or "no answer"
                raise RunError(f"the MLflow server did not start on port {port}: {detail.strip()[-500:]}")
            time.sleep(0.2)
        ready(url, store)
        damaged: set[Path] = set()
        while server.poll() is None:
            mirror_runs(submitted_runs(runs_dir, damaged))
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


def own_address(host: str) -> str:
    """The address of this machine that the name `host` has. Raises RunError if there is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    addresses = []
    for family, _, _, _, (address, *_) in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        addresses.append(str(address))
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((address, 0))
            if not ipaddress.ip_address(address).is_unspecified:
                return str(address)
    is_what = f"is {addresses[0]}, which is not a single address of this machine" if addresses else "cannot be resolved"
    raise RunError(
        f"--host {host} {is_what}; give a name or address at which other machines reach this machine, or "
        "omit --host and use a tunnel: ssh -L"
    )


def sign_in(runs_dir: Path) -> tuple[Path, str, str]:
    """Get MLflow's settings for a server that asks for a password.

    They are made once for each runs_dir. Only their owner can read the file.

    Returns:
        The settings file, the admin's password and the server's secret key.

    Raises:
        RunError: MLflow's extra for this is not installed.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise RunError("--auth needs an extra of MLflow; install it with: pip install 'mlflow[auth]'")
    folder = runs_dir / ".mlflow_auth"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / "basic_auth.ini"
    settings = configparser.ConfigParser(interpolation=None)
    with FileLock(folder / ".lock"):
        settings.read(file)
        if not settings.has_section("relora"):
            settings["mlflow"] = {
                "default_permission": "READ",
                "database_uri": f"sqlite:///{folder.absolute() / 'basic_auth.db'}",
                "admin_username": ADMIN,
                "admin_password": secrets.token_urlsafe(24),
                "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
            }
            settings["relora"] = {"secret_key": secrets.token_urlsafe(24)}
            text = io.StringIO()
            settings.write(text)
            credentials.write_private(file, text.getvalue())
    return file, settings["mlflow"]["admin_password"], settings["relora"]["secret_key"]


def _listens(address: str, port: int) -> bool:
    with socket.socket(_family(address)) as probe:
        return probe.connect_ex((address, port)) == 0


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _free_port(address: str) -> int:
    """Port 5000 if it is free, else a port that the system picks."""
    for wanted in (PORT, 0):
        with socket.socket(_family(address)) as probe:
            try:
                probe.bind((address, wanted))
                return probe.getsockname()[1]
            except OSError:
                continue
    raise RunError("no free port")
