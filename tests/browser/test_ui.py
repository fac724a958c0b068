import base64
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import (
    ALL_IN_VIEW,
    PAGE_SECONDS,
    SCREEN,
    START_SECONDS,
    Ui,
    listens,
    plot_of,
    setting,
)
from mlflow import MlflowClient
from small import eventually

from relora.cli.ui import own_address
from relora.common.errors import RunError
from relora.config import credentials
from relora.config.compose import compose
from relora.runs.metrics import read_rows, row_metrics
from relora.runs.rundir import RunDir, read_json
from relora.training.job import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]

CHARTS = ("train/loss", "train/lr", "eval/loss", "eval/perplexity", "progress/tokens", "restart/relative_update")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run with a warm start and three restarts."""
    overrides = setting(tmp_path_factory.mktemp("ui"))
    config = compose(overrides)
    assert launch(config, overrides).state == "finished"
    return RunDir(config.run_dir)


@pytest.fixture(scope="module")
def ui(run: RunDir) -> Iterator[Ui]:
    """A running UI."""
    with Ui(run.path.parent) as started:
        yield started


@pytest.fixture(scope="module")
def link(ui: Ui) -> str:
    """The link that the UI prints."""
    return ui.links()["url"]


def test_ctrl_c_ends_a_ui_that_is_still_starting(run: RunDir) -> None:
    with Ui(run.path.parent) as starting:
        eventually(lambda: len(starting.grown_family()) > 1, "the server's process", START_SECONDS)
        time.sleep(0.5)
        assert starting.stop(signal.SIGINT) == 0
        assert starting.left_behind() == []


def test_sigterm_ends_the_server_too(run: RunDir) -> None:
    with Ui(run.path.parent) as serving:
        serving.links()
        serving.stop(signal.SIGTERM)
        assert serving.left_behind() == []


def test_a_port_in_use_is_an_error_and_prints_no_link(run: RunDir) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with Ui(run.path.parent, "--port", port) as refused:
            shown, error = refused.process.communicate(timeout=START_SECONDS)
    assert shown == ""
    assert port in error
    assert refused.process.returncode != 0


def answer(url: str, user: str = "", password: str = "") -> int:
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=1")
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=300) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_server_for_other_machines_listens_at_the_named_address_and_asks_for_a_password(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    runs_dir = run.path.parent
    with Ui(runs_dir, "--host", "127.0.0.2", "--auth") as serving:
        url = serving.links()["url"].partition("/#")[0]
        assert url.startswith("http://127.0.0.2:")
        assert not listens(url), "not at another address of this machine"
        settings = runs_dir / ".mlflow_auth" / "basic_auth.ini"
        assert stat.S_IMODE(settings.stat().st_mode) == 0o600
        password = settings.read_text().partition("admin_password = ")[2].partition("\n")[0]
        assert (answer(url), answer(url, "admin", "wrong"), answer(url, "admin", password)) == (401, 401, 200)
        processes = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in serving.grown_family()]
        assert len(processes) >= 3
        assert not any(password.encode() in arguments for arguments in processes)
        # Another process of the same runs_dir needs only the name of the user.
        monkeypatch.setattr(credentials, "_whole", {})
        public = url.replace("://", "://admin@")
        client = MlflowClient(credentials.whole(public, runs_dir))
        assert client.get_run(read_json(run.mirror_file)["run_id"]).info.run_name == run.path.name
        assert serving.stop(signal.SIGINT) == 0
        assert serving.process.stderr is not None
        notes = serving.process.stderr.read()
    assert f"sign in as admin; the password is admin_password in {settings}" in notes
    assert re.search(r"127\.0\.0\.2 is 127\.0\.0\.2 .*other machines cannot reach; give --host", notes)
    assert password not in notes


@pytest.mark.parametrize(
    ("host", "why"),
    [("192.0.2.7", "is 192.0.2.7"), ("no-such-machine.invalid", "cannot be resolved"), ("0.0.0.0", "is 0.0.0.0")],
)
def test_a_host_that_is_no_address_of_this_machine_is_refused(run: RunDir, host: str, why: str) -> None:
    with pytest.raises(RunError, match=f"--host {host} {why}.* a tunnel: ssh -L"):
        own_address(host)


def test_ui_of_a_server_prints_the_link_and_serves_nothing(run: RunDir, link: str) -> None:
    server = link.partition("/#")[0]
    command = [Path(sys.executable).with_name("relora"), "ui", f"tracker.uri={server}", f"runs_dir={run.path.parent}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, f"MLflow UI: {link}")


# ------------------------------------------------------------------------------------------------------ the browser


def assert_drawn(page: Any, run: RunDir, metric: str) -> None:
    """Check that the chart shows the points of the metrics file, on a line that is large enough to see."""
    plot = eventually(lambda: plot_of(page, metric), f"the chart of {metric}", PAGE_SECONDS)
    rows = [row for row in read_rows(run.metrics_file) if metric in row_metrics(row)]
    expected = dict(sorted((row["step"], row[metric]) for row in rows))
    assert [step for step, _ in plot["points"]] == list(expected)
    assert [value for _, value in plot["points"]] == pytest.approx(list(expected.values()), rel=1e-6)
    width, height = plot["lines"][0]
    assert width > 100
    assert height > 30


def test_the_link_shows_the_run_and_its_charts(run: RunDir, link: str, page: Any, screenshots: Path) -> None:
    page.set_window_size(*SCREEN)
    page.get(link)
    body = eventually(
        lambda: next((t for t in [page.find_element("tag name", "body").text] if run.path.name in t), None),
        "the run's row",
        PAGE_SECONDS,
    )
    assert "1 matching run" in body
    for metric in ("eval/loss", "eval/perplexity"):
        assert_drawn(page, run, metric)
    page.save_screenshot(str(screenshots / "experiment.png"))


def test_the_page_of_a_run_draws_its_curves(run: RunDir, link: str, page: Any, screenshots: Path) -> None:
    mirror = read_json(run.mirror_file)
    page.set_window_size(*ALL_IN_VIEW)
    page.get(f"{link.partition('#')[0]}#/experiments/{mirror['experiment_id']}/runs/{mirror['run_id']}/model-metrics")
    try:
        for metric in CHARTS:
            assert_drawn(page, run, metric)
    finally:
        page.save_screenshot(str(screenshots / "run.png"))


def test_the_page_of_a_run_shows_its_parameters_and_metrics(
    run: RunDir, link: str, page: Any, screenshots: Path
) -> None:
    mirror = read_json(run.mirror_file)
    page.set_window_size(*SCREEN)
    page.get(f"{link.partition('#')[0]}#/experiments/{mirror['experiment_id']}/runs/{mirror['run_id']}")

    def complete_page() -> str | None:
        text = page.find_element("tag name", "body").text
        return text if "method.reset_interval_steps" in text and "summary/test_perplexity" in text else None

    body = eventually(complete_page, "parameters and metrics of the run", PAGE_SECONDS)
    page.save_screenshot(str(screenshots / "overview.png"))
    assert "Finished" in body
    assert "comparison_key" in body


# ---------------------------------------------------------------------------------------------------------- the end


def test_ctrl_c_ends_the_server_and_all_its_processes(ui: Ui, link: str) -> None:
    assert len(ui.grown_family()) >= 3, "relora, the server, its worker"
    assert listens(link)
    assert ui.stop(signal.SIGINT) == 0
    assert ui.left_behind() == []
    assert not listens(link)
