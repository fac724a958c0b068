"""Passwords of MLflow stores. They are in no file that others can read, and later processes can still connect."""

import json
import re
import socket
import stat
from pathlib import Path

import pytest

from relora.cli import main as cli
from relora.common.errors import ConfigError
from relora.config import credentials
from relora.config.compose import compose
from relora.config.frozen import freeze, read_frozen
from relora.runs.rundir import RunDir
from relora.training.summary import relaunch_command

PASSWORD = "geheim-7%2Fx"


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_whole", {})


@pytest.fixture
def server() -> str:
    """The address of a server that does not answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("http://alice:secret@head:5000", "http://alice@head:5000"),
        ("http://alice:se/cr@et@head:5000/base", "http://alice@head:5000/base"),
        ("https://:secret@head", "https://@head"),
        ("postgresql://u:p%40ss@db:5432/mlflow?sslmode=require", "postgresql://u@db:5432/mlflow?sslmode=require"),
        (
            "postgresql://db/mlflow?user=u&password=secret&sslmode=require",
            "postgresql://db/mlflow?user=u&sslmode=require",
        ),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dsecret", "mssql+pyodbc:///"),
        ("http://alice@head:5000", "http://alice@head:5000"),
        ("http://head:5000/path@2", "http://head:5000/path@2"),
        ("http://[::1]:5000", "http://[::1]:5000"),
        ("sqlite:////tmp/a:b@c/mlflow.db", "sqlite:////tmp/a:b@c/mlflow.db"),
    ],
)
def test_a_store_is_named_without_its_password(uri: str, public: str, tmp_path: Path) -> None:
    assert credentials.learn(uri) == public
    assert credentials.without_password(public) == public
    assert credentials.whole(public, tmp_path) == uri
    assert compose([f"tracker.uri={uri}"]).tracker.uri == public


@pytest.mark.parametrize(
    "text",
    [
        "could not reach http://alice:secret@head:5000/api",
        "bad value postgresql://db/x?password=secret&a=b",
        "FATAL: secret does not match",
    ],
)
def test_a_text_of_a_library_is_shown_without_passwords(text: str) -> None:
    credentials.learn("http://alice:secret@head:5000")
    assert "secret" not in credentials.redacted(text)


def test_later_processes_connect_with_a_file_that_only_its_owner_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = credentials.learn("http://alice:secret@head:5000")
    credentials.keep(public, tmp_path)
    credentials.keep(credentials.learn("postgresql://u:other@db/x"), tmp_path)
    credentials.keep("http://head:5000", tmp_path)
    (file,) = tmp_path.glob(".secrets.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setattr(credentials, "_whole", {})
    assert credentials.whole(public, tmp_path) == "http://alice:secret@head:5000"
    assert credentials.whole("postgresql://u@db/x", tmp_path) == "postgresql://u:other@db/x"
    assert credentials.whole("http://head:5000", tmp_path) == "http://head:5000"
    file.write_text("{")
    monkeypatch.setattr(credentials, "_whole", {})
    assert credentials.whole(public, tmp_path) == public
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:newer@head:5000")
    assert credentials.whole(public, tmp_path) == "http://alice:newer@head:5000"


@pytest.mark.slow
def test_no_file_and_no_output_of_a_study_holds_the_password(
    tiny: list[str], server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://alice:{PASSWORD}@{server}"
    arguments = [item for item in tiny if item.startswith(("data", "model", "runs_dir", "trainer"))]
    arguments += [f"tracker.uri={uri}", "method=full", "schedule.warmup_steps=2", "study=mine", "cluster=debug"]
    runs_dir = tmp_path / "runs"
    assert cli.run(["-m", *arguments]) == 0
    (run,) = (RunDir(file.parent) for file in runs_dir.glob("*/status.json"))
    where = f"runs_dir={runs_dir}"
    assert cli.main(["sync", str(run.path)]) == 1
    assert cli.main(["status", "mine", where]) == 0
    assert cli.main(["ui", where, f"tracker.uri={uri}"]) == 1
    assert cli.run([f"tracker.uri=htp://alice:{PASSWORD}@{server}"]) == 2
    assert cli.run([f"tracker.uri={uri}", "trainer.total_steps=nonsense"]) == 2
    shown = "".join(capfd.readouterr())
    assert re.search("other users can see .*MLFLOW_TRACKING_URI=.* in the environment", shown)
    assert f"http://alice@{server} fails" in shown
    assert PASSWORD not in shown
    holders = [path for path in runs_dir.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert holders == [runs_dir / ".secrets.json"]
    assert read_frozen(run.config_file).mlflow_uri == f"http://alice@{server}"
    assert (run.path / "model").is_dir(), "the run finished"


def test_a_folder_of_an_earlier_version_is_read_and_its_password_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([f"runs_dir={tmp_path}"])
    config.tracker.uri = f"http://alice:{PASSWORD}@head:5000"
    run = RunDir(config.run_dir)
    freeze(config, run.config_file)
    run.launch_file.write_text(json.dumps({"overrides": [f"tracker.uri={config.tracker.uri}"]}))
    read = read_frozen(run.config_file)
    assert read.mlflow_uri == "http://alice@head:5000"
    assert credentials.whole(read.mlflow_uri, tmp_path) == f"http://alice:{PASSWORD}@head:5000"
    assert relaunch_command(run) == "python run.py tracker.uri=http://alice@head:5000"


# ------------------------------------------------------------------------------------------- MLFLOW_TRACKING_URI


@pytest.mark.slow
def test_mlflow_tracking_uri_is_used_if_no_store_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"runs_dir={tmp_path}"
    plain = compose([where])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:secret@head:5000")
    config = compose([where])
    assert config.mlflow_uri == "http://alice@head:5000"
    assert config.config_hash == plain.config_hash
    assert compose([where, f"tracker.uri=sqlite:///{tmp_path}/own.db"]).mlflow_uri == f"sqlite:///{tmp_path}/own.db"
    assert compose([where, "tracker=jsonl"]).tracker.uri is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    assert compose([where]).mlflow_uri == f"sqlite:///{tmp_path}/own.db"


def test_a_run_keeps_the_store_that_it_was_launched_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:secret@head:5000")
    config = compose([f"runs_dir={tmp_path}"])
    run = RunDir(config.run_dir)
    freeze(config, run.config_file)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(credentials, "_whole", {})
    assert read_frozen(run.config_file).mlflow_uri == "http://alice@head:5000"
    assert credentials.whole("http://alice@head:5000", tmp_path) == "http://alice:secret@head:5000"


@pytest.mark.parametrize("value", ["databricks", "mlruns", "file:///tmp/mlruns", "htp://alice:secret@head"])
def test_an_mlflow_tracking_uri_that_relora_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI=.* unset it, or give tracker.uri=") as raised:
        compose([])
    assert "secret" not in str(raised.value)
    compose(["tracker=jsonl"])


def test_ui_and_sync_both_use_mlflow_tracking_uri(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([f"runs_dir={tmp_path}"])
    freeze(config, RunDir(config.run_dir).config_file)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for command in (["ui", f"runs_dir={tmp_path}"], ["sync", str(config.run_dir)]):
        assert cli.main(command) == 1
        assert f"MLflow at http://{server} fails" in capsys.readouterr().err
