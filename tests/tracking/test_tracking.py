import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from relora.cli import main as cli
from relora.config.compose import compose
from relora.config.frozen import freeze, read_frozen, thaw
from relora.config.rates import NOT_TUNED
from relora.config.run import RunConfig
from relora.config.tuned import Presets
from relora.runs.metrics import MetricsLog, read_rows, row_metrics
from relora.runs.rundir import Attempt, RunDir, Status
from relora.studies.view import view
from relora.tracking import mirror as tracking
from relora.tracking.mirror import Mirror, MirrorThread, mirror_all, parameters
from relora.tracking.store import experiment_id, open_store

pytestmark = pytest.mark.slow


STARTED_MS = 1_700_000_000_000
CORPUS = {"corpus_digest": "c" * 32, "tokenizer_digest": "d" * 32}


@pytest.fixture
def runs_dir(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def status_of(state: str, **changes: Any) -> Status:
    values: dict[str, Any] = {"git_commit": "1234abcd", "corpus": CORPUS, "started_ms": STARTED_MS}
    return Status(state=state, **(values | changes))


def new_run(runs_dir: Path, *overrides: str, status: Status | None = None, rows: int = 5) -> tuple[RunDir, RunConfig]:
    """A run folder as training leaves it, without training."""
    config = compose([f'runs_dir="{runs_dir}"', *overrides])
    run = RunDir(config.run_dir)
    freeze(config, run.config_file)
    add_rows(run, 0, rows)
    run.status = status or status_of("running")
    return run, config


def add_rows(run: RunDir, first: int, last: int) -> None:
    with MetricsLog.opened(run.metrics_file, exact=True) as log:
        for step in range(first, last):
            log.log(step, {"train/loss": 1 / (step + 3), "progress/tokens": 64 * step})
            if step % 2 == 0:
                log.log(step, {"eval/perplexity": 300 / (step + 1)})


def recorded(config: RunConfig, experiment: str = "relora") -> list[Run]:
    """Return every run of the experiment in the store of the config."""
    client = open_store(config.mlflow_uri, Path(config.runs_dir))
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def the_run(config: RunConfig) -> Run:
    runs = recorded(config)
    assert len(runs) == 1
    return runs[0]


def points(config: RunConfig, run_id: str) -> list[tuple[str, int, float, int]]:
    """Return (metric, step, value, time) of every point in MLflow."""
    client = MlflowClient(config.mlflow_uri)
    names = client.get_run(run_id).data.metrics
    history = (point for name in names for point in client.get_metric_history(run_id, name))
    return sorted((point.key, point.step, point.value, point.timestamp) for point in history)


def points_of_file(run: RunDir) -> list[tuple[str, int, float, int]]:
    return sorted(
        (name, row["step"], value, row["time_ms"])
        for row in read_rows(run.metrics_file)
        for name, value in row_metrics(row).items()
    )


def all_of(config: RunConfig) -> tuple[Any, ...]:
    """Return everything that MLflow stores about the only run."""
    run = the_run(config)
    info = run.info
    facts = (info.run_id, info.run_name, info.status, info.start_time, info.end_time, run.data.params, run.data.tags)
    return (*facts, points(config, info.run_id))


# -------------------------------------------------------------------------------------------- the content of MLflow


def test_every_point_of_the_file_is_in_mlflow_with_its_time(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    assert Mirror(run, config).sync().rows == 8
    assert points(config, the_run(config).info.run_id) == points_of_file(run)
    assert len(points_of_file(run)) == 13


def test_more_points_than_fit_into_one_call_are_all_sent(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, rows=900)
    Mirror(run, config).sync()
    assert len(points_of_file(run)) > 2 * tracking.POINTS_PER_CALL
    assert points(config, the_run(config).info.run_id) == points_of_file(run)


def test_new_rows_are_added_and_a_half_written_row_is_sent_later(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    mirror = Mirror(run, config)
    mirror.sync()
    add_rows(run, 5, 8)
    torn = b'{"step": 8, "time_ms": 1700000000000, "train/lo'
    with run.metrics_file.open("ab") as file:
        file.write(torn)
    assert mirror.sync().rows == 4
    assert points(config, the_run(config).info.run_id) == points_of_file(run)
    with run.metrics_file.open("ab") as file:
        file.write(b'ss": 0.25}\n')
    assert mirror.sync().rows == 1
    assert mirror.sync().rows == 0
    assert ("train/loss", 8, 0.25, STARTED_MS) in points(config, the_run(config).info.run_id)


@pytest.mark.parametrize("sync_when_short", [False, True])
@pytest.mark.parametrize("with_message", [False, True], ids=["the same bytes long", "longer rows"])
def test_rows_that_were_lost_and_written_again_are_in_mlflow_once(
    runs_dir: Path, sync_when_short: bool, with_message: bool
) -> None:
    run, config = new_run(runs_dir, rows=30)
    mirror = Mirror(run, config)
    mirror.sync()
    before = points(config, the_run(config).info.run_id)
    run.metrics_file.write_bytes(b"".join(run.metrics_file.read_bytes().splitlines(keepends=True)[:2]))
    if sync_when_short:
        assert mirror.sync().rows == 0
    time.sleep(0.002)  # the new rows have another time
    with MetricsLog.opened(run.metrics_file, exact=True) as log:
        for step in range(35):
            extra = {"perf/tokens_per_second": 1000.0} if with_message else {}
            log.log(step, {"train/loss": 1 / (step + 3), "progress/tokens": 64 * step, **extra})
    mirror.sync()
    held = points(config, the_run(config).info.run_id)
    assert set(before) <= set(held)
    keys = [(name, step) for name, step, _, _ in held]
    assert len(keys) == len(set(keys)), "one point a step"
    assert {(name, step, value) for name, step, value, _ in points_of_file(run)} <= {point[:3] for point in held}
    assert mirror.sync().rows == 0


def test_a_lost_result_that_is_measured_again_has_the_new_value(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, rows=0)
    for seconds in (20.0, 30.0):
        run.metrics_file.unlink(missing_ok=True)
        with MetricsLog.opened(run.metrics_file, exact=True) as log:
            log.log(0, {"summary/eval_loss": 3.0, "summary/wall_clock_seconds": seconds})
        Mirror(run, config).sync()
        time.sleep(0.002)
    found = the_run(config)
    assert found.data.metrics == {"summary/eval_loss": 3.0, "summary/wall_clock_seconds": 30.0}
    assert len([point for point in points(config, found.info.run_id) if point[0] == "summary/eval_loss"]) == 1


def test_a_damaged_row_does_not_remove_other_rows(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    run.metrics_file.write_bytes(b"".join([*lines[:3], b"\x00garbage\n", b'["a list"]\n', *lines[3:]]))
    Mirror(run, config).sync()
    assert len(points(config, the_run(config).info.run_id)) == 13


def test_the_run_of_a_new_folder_is_separate_from_the_run_of_a_removed_folder(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, "study=mine")
    Mirror(run, config).sync()
    old = the_run(config)
    shutil.rmtree(run.path)
    run, config = new_run(runs_dir, "study=mine", status=status_of("running", started_ms=STARTED_MS + 77))
    for _ in range(2):
        Mirror(run, config).sync()
        run.mirror_file.unlink()  # the next sync finds the run by the start time of the folder
    found = {item.info.run_id: item for item in recorded(config)}
    assert len(found) == 2
    (new,) = found.keys() - {old.info.run_id}
    assert points(config, new) == points_of_file(run)
    assert found[new].info.start_time == STARTED_MS + 77
    assert found[old.info.run_id].data.tags["replaced_by"] == new
    client = MlflowClient(config.mlflow_uri)
    members = client.search_runs([old.info.experiment_id], "tags.`study.mine` = '1'")
    assert [item.info.run_id for item in members] == [new]


def test_a_run_that_was_deleted_in_the_ui_is_restored_and_reported(
    runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = new_run(runs_dir, status=status_of("finished", ended_ms=STARTED_MS + 5000))
    Mirror(run, config).sync()
    before = all_of(config)
    MlflowClient(config.mlflow_uri).delete_run(before[0])
    assert recorded(config) == []
    add_rows(run, 5, 7)
    assert cli.main(["sync", str(run.path)]) == 0
    message = capsys.readouterr().err
    assert f"{config.name} was deleted in MLflow" in message
    assert "it is restored" in message
    assert the_run(config).info.run_id == before[0]
    assert points(config, before[0]) == points_of_file(run)


def test_a_run_that_is_deleted_while_it_trains_is_restored(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    messages: list[str] = []
    mirror = Mirror(run, config, messages.append)
    mirror.sync()
    before = the_run(config).info.run_id
    MlflowClient(config.mlflow_uri).delete_run(before)
    add_rows(run, 5, 7)
    with pytest.raises(Exception, match="active"):
        mirror.sync()
    mirror.sync()
    assert points(config, the_run(config).info.run_id) == points_of_file(run)
    assert the_run(config).info.run_id == before
    assert len(messages) == 1


def test_a_store_that_is_replaced_while_a_run_trains_is_filled_again(runs_dir: Path, empty_store: Path) -> None:
    run, config = new_run(runs_dir)
    mirror = Mirror(run, config)
    mirror.sync()
    (runs_dir / "mlflow.db").unlink()
    shutil.copy(empty_store, runs_dir / "other.db")
    (runs_dir / "other.db").rename(runs_dir / "mlflow.db")
    add_rows(run, 5, 7)
    with pytest.raises(Exception, match="not found"):
        mirror.sync()
    mirror.sync()
    assert points(config, the_run(config).info.run_id) == points_of_file(run)


@pytest.mark.parametrize("call", range(6))
def test_the_next_sync_repairs_a_call_that_failed_after_a_resume(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    failed = status_of("failed", ended_ms=STARTED_MS + 5000, message="the disk is full")
    run, config = new_run(runs_dir, status=failed)
    Mirror(run, config).sync()
    run.status = status_of("running", attempt=2)
    add_rows(run, 5, 7)
    made = 0

    def interrupted_after_the_call(real: Any) -> Any:
        def method(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            answer = real(*arguments, **named)
            made += 1
            if made == call + 1:
                raise ConnectionError("the answer was lost")
            return answer

        return method

    for name in ("set_tag", "delete_tag", "log_batch", "update_run", "get_run", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, interrupted_after_the_call(getattr(MlflowClient, name)))
    mirror = Mirror(run, config)
    for _ in range(2):
        with contextlib.suppress(ConnectionError):
            mirror.sync()
    monkeypatch.undo()
    found = the_run(config)
    assert (found.info.status, found.data.tags["attempt"], found.data.tags["message"]) == ("RUNNING", "2", "")
    assert points(config, found.info.run_id) == points_of_file(run)


def test_a_run_that_cannot_be_sent_does_not_stop_the_others(runs_dir: Path) -> None:
    runs = [new_run(runs_dir, f"trainer.seed={seed}", status=status_of("interrupted")) for seed in range(2)]
    (runs[0][0].path / "mlflow.json").mkdir()
    messages: list[str] = []
    mirror_all(runs, messages.append)
    assert [found.data.params["trainer.seed"] for found in recorded(runs[0][1]) if found.data.metrics] == ["1"]
    assert len(messages) == 1
    assert runs[0][1].name in messages[0]


@pytest.mark.parametrize("left", ["", "{", '{"run_id": 7}', "[]", '{"uri": "x"}'])
def test_a_damaged_mirror_file_is_written_again(runs_dir: Path, left: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, config = new_run(runs_dir, status=status_of("finished", ended_ms=STARTED_MS + 5000))
    Mirror(run, config).sync()
    before = all_of(config)
    run.mirror_file.write_text(left)
    mirror_all([(run, config)], print)
    assert (capsys.readouterr().out, all_of(config)) == ("", before)
    assert json.loads(run.mirror_file.read_text())["run_id"] == before[0]


def test_a_row_without_a_finite_value_does_not_stop_the_sync(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    with MetricsLog.opened(run.metrics_file, exact=True) as log:
        log.log(9, {"train/loss": float("nan")})
    Mirror(run, config).sync()
    assert points(config, the_run(config).info.run_id) == points_of_file(run)


def test_the_mlflow_run_has_the_name_and_start_time_of_the_run_folder(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    Mirror(run, config).sync()
    info = the_run(config).info
    assert info.run_name == run.path.name == config.name
    assert info.start_time == STARTED_MS


def test_params_are_the_flat_config(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, "method.rank=16", "trainer.seed=7")
    Mirror(run, config).sync()
    params = the_run(config).data.params
    assert params == {name: str(value) for name, value in parameters(config).items()}
    expected = {
        "method.name": "relora",
        "method.rank": "16",
        "method.alpha": "4.0",
        "method.reset_interval_steps": "100",
        "method.optimizer_reset.mode": "magnitude",
        "optimizer.learning_rate": "0.01",
        "trainer.seed": "7",
        "trainer.total_steps": "600",
        "data.name": "stdlib",
        "model.name": "llama_tiny",
    }
    assert expected.items() <= params.items()


@pytest.mark.parametrize(
    ("method", "rank", "interval", "ratio"),
    [
        ("full", 0, 0, 0),
        ("lora", 32, 0, 0),
        ("control", 32, 0, 0),
        ("galore", 32, 0, 0),
        ("fira", 32, 0, 0),
        ("apollo_mini", 1, 0, 0),
        ("relora", 32, 100, 0.99),
    ],
)
def test_every_method_has_every_axis_of_the_parallel_coordinates(
    runs_dir: Path, method: str, rank: int, interval: int, ratio: float
) -> None:
    run, config = new_run(runs_dir, f"method={method}")
    Mirror(run, config).sync()
    params = the_run(config).data.params
    assert params["method.name"] == method
    (chart,) = [chart for chart in view("any")["compareRunCharts"] if chart["type"] == "PARALLEL"]
    assert [float(params[name]) for name in chart["selectedParams"]] == [rank, interval, ratio]


def test_tags_hold_values_that_are_no_parameters(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, "study=ranks", "trainer.seed=3", status=status_of("running", attempt=2))
    Mirror(run, config).sync()
    tags = the_run(config).data.tags
    expected = {
        "method": "relora",
        "variant": config.variant,
        "comparison_key": config.comparison_key,
        "config_hash": config.config_hash,
        "git_commit": "1234abcd",
        "attempt": "2",
        "study.ranks": "1",
        **CORPUS,
    }
    assert expected.items() <= tags.items()
    assert config.variant != config.name, "the seed is not part of the variant"


def test_the_changes_of_the_code_are_an_artefact_of_the_run(runs_dir: Path, tmp_path: Path) -> None:
    run, config = new_run(runs_dir, status=status_of("running", attempts=[Attempt(code="aa"), Attempt(code="bb")]))
    for code in ("aa", "bb"):
        run.changes_file(code).parent.mkdir(exist_ok=True)
        run.changes_file(code).write_text(f"changes of {code}\n")
    mirror = Mirror(run, config)
    mirror.sync()
    recorded_run = the_run(config)
    assert recorded_run.data.tags["code"] == "bb"
    client, run_id = MlflowClient(config.mlflow_uri), recorded_run.info.run_id
    assert [item.path for item in client.list_artifacts(run_id, "code")] == ["code/aa.diff", "code/bb.diff"]
    fetched = Path(client.download_artifacts(run_id, "code", str(tmp_path)))
    assert (fetched / "bb.diff").read_text() == "changes of bb\n"
    before = (fetched / "aa.diff").stat().st_mtime_ns
    mirror.sync()
    assert Path(client.download_artifacts(run_id, "code/aa.diff")).stat().st_mtime_ns == before, "sent once"


def test_a_store_that_takes_no_artefacts_still_gets_the_figures(runs_dir: Path, tmp_path: Path) -> None:
    """A copied runs_dir: its store keeps artefacts in the old place."""
    run, config = new_run(runs_dir, status=status_of("running", attempts=[Attempt(code="aa")]))
    Mirror(run, config).sync()
    moved = tmp_path / "moved"
    runs_dir.rename(moved)
    run, config = new_run(moved, status=status_of("finished", attempts=[Attempt(code="aa")]), rows=7)
    run.changes_file("aa").parent.mkdir(exist_ok=True)
    run.changes_file("aa").write_text("changes\n")
    told: list[str] = []
    mirror = Mirror(run, config, told.append)
    mirror.sync()
    mirror.sync()
    assert the_run(config).info.status == "FINISHED"
    (line,) = [line for line in told if "changes of the code" in line]
    assert "was moved or copied" in line
    assert not runs_dir.exists(), "nothing is written to the old place"


def test_a_tag_says_that_the_rates_were_not_tuned_for_the_setting(runs_dir: Path) -> None:
    overrides = ["trainer.total_steps=500"]
    run, config = new_run(runs_dir, *overrides, status=status_of("running"))
    config = Presets().noted(config, overrides)
    Mirror(run, config).sync()
    rates = the_run(config).data.tags["rates"]
    assert rates.startswith(NOT_TUNED)
    assert "tuned at 600" in rates


def test_a_run_may_belong_to_several_studies(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, "study=one")
    Mirror(run, config).sync()
    again, config = new_run(runs_dir, "study=two")
    Mirror(again, config).sync()
    assert {"study.one": "1", "study.two": "1"}.items() <= the_run(config).data.tags.items()


def test_the_experiment_can_be_named(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, "tracker.experiment=mine and yours")
    Mirror(run, config).sync()
    assert recorded(config) == []
    assert len(recorded(config, "mine and yours")) == 1


def test_artifacts_are_stored_in_runs_dir(runs_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run, config = new_run(runs_dir)
    Mirror(run, config).sync()
    assert str(the_run(config).info.artifact_uri).startswith(f"file://{runs_dir}/mlartifacts/")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["it's", 'a "b"', "with space", "größe"])
def test_runs_dir_may_have_any_name(tmp_path: Path, empty_store: Path, name: str) -> None:
    runs_dir = tmp_path / name
    runs_dir.mkdir()
    shutil.copy(empty_store, runs_dir / "mlflow.db")
    config = compose([f"runs_dir={tmp_path}"])
    config.runs_dir = str(runs_dir)
    run = RunDir(config.run_dir)
    freeze(config, run.config_file)
    add_rows(run, 0, 2)
    run.status = status_of("running")
    Mirror(run, config).sync()
    run.mirror_file.unlink()
    Mirror(run, config).sync()
    assert points(config, the_run(config).info.run_id) == points_of_file(run)


# ---------------------------------------------------------------------------------------------------------- status


@pytest.mark.parametrize(
    ("state", "expected"),
    [("running", "RUNNING"), ("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")],
)
def test_every_state_has_an_mlflow_status(runs_dir: Path, state: str, expected: str) -> None:
    ended = None if state == "running" else STARTED_MS + 5000
    run, config = new_run(runs_dir, status=status_of(state, ended_ms=ended))
    assert Mirror(run, config).sync().status == expected
    info = the_run(config).info
    assert (info.status, info.end_time) == (expected, ended)


def test_a_resumed_run_is_the_same_run_and_runs_again(runs_dir: Path) -> None:
    stopped = status_of("interrupted", ended_ms=STARTED_MS + 5000, message="SIGTERM after step 5")
    run, config = new_run(runs_dir, status=stopped)
    Mirror(run, config).sync()
    first = the_run(config)
    assert first.data.tags["message"] == "SIGTERM after step 5"

    run.status = status_of("running", attempt=2)
    Mirror(run, config).sync()
    second = the_run(config)
    assert second.info.status == "RUNNING"
    assert (second.info.run_id, second.info.start_time) == (first.info.run_id, STARTED_MS)
    assert second.data.tags["attempt"] == "2"

    add_rows(run, 5, 9)
    run.status = status_of("finished", attempt=2, ended_ms=STARTED_MS + 9000)
    Mirror(run, config).sync()
    last = the_run(config).info
    assert (last.run_id, last.start_time) == (first.info.run_id, STARTED_MS)
    assert (last.status, last.end_time) == ("FINISHED", STARTED_MS + 9000)
    assert points(config, last.run_id) == points_of_file(run)


def test_the_message_of_an_earlier_attempt_is_removed_in_a_later_attempt(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, status=status_of("failed", ended_ms=STARTED_MS + 5000, message="the disk is full"))
    Mirror(run, config).sync()
    run.status = status_of("finished", attempt=2, ended_ms=STARTED_MS + 9000)
    Mirror(run, config).sync()
    assert the_run(config).data.tags.get("message", "") == ""


def test_a_message_that_is_too_long_for_mlflow_is_cut(runs_dir: Path) -> None:
    run, config = new_run(runs_dir, status=status_of("failed", ended_ms=STARTED_MS + 1, message="x" * 20_000))
    Mirror(run, config).sync()
    assert set(the_run(config).data.tags["message"]) == {"x"}


# --------------------------------------------------------------------------------------------------- sending twice


def with_nothing_changed(run: RunDir) -> None:
    """Change nothing."""


def with_sent_bytes_forgotten(run: RunDir) -> None:
    state = json.loads(run.mirror_file.read_text())
    run.mirror_file.write_text(json.dumps({**state, "sent_bytes": 0, "tags": {}, "status": ""}))


def with_the_mirror_file_deleted(run: RunDir) -> None:
    run.mirror_file.unlink()


@pytest.mark.parametrize("change", [with_nothing_changed, with_sent_bytes_forgotten, with_the_mirror_file_deleted])
@pytest.mark.parametrize("state", ["running", "finished"])
def test_sending_twice_changes_nothing(runs_dir: Path, change: Any, state: str) -> None:
    ended = None if state == "running" else STARTED_MS + 5000
    run, config = new_run(runs_dir, status=status_of(state, ended_ms=ended))
    Mirror(run, config).sync()
    before = all_of(config)
    for _ in range(2):
        change(run)
        Mirror(run, config).sync()
        assert all_of(config) == before


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_crash_between_mlflow_and_the_mirror_file_sends_nothing_twice(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    run, config = new_run(runs_dir, rows=900, status=status_of("finished", ended_ms=STARTED_MS + 5000))
    real_write, writes = tracking.write_json, 0

    def crash(path: Path, values: dict[str, Any]) -> None:
        nonlocal writes
        writes += 1
        if writes == write:
            raise OSError("the machine went down")
        real_write(path, values)

    monkeypatch.setattr(tracking, "write_json", crash)
    with pytest.raises(OSError, match="the machine went down"):
        Mirror(run, config).sync()
    monkeypatch.undo()
    assert run.mirror_file.exists() == (write > 1)
    Mirror(run, config).sync()
    assert the_run(config).info.status == "FINISHED"
    assert points(config, the_run(config).info.run_id) == points_of_file(run)


# ----------------------------------------------------------------------------------------------- many runs at once

SYNC_AT_ONCE = """
import os, sys
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from relora.config.frozen import thaw
from relora.runs.rundir import RunDir
from relora.tracking.mirror import Mirror

waiting, starting = os.pipe()
children = []
for path in sys.argv[1:]:
    children.append(os.fork())
    if children[-1] == 0:
        os.close(starting)
        os.read(waiting, 1)
        run = RunDir(Path(path))
        Mirror(run, thaw(run.config_file)).sync()
        os._exit(0)
os.close(starting)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.parametrize("place", ["one runs_dir", "a runs_dir each"])
def test_processes_that_open_a_new_store_at_once_all_succeed(tmp_path: Path, place: str) -> None:
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    runs = []
    for seed in range(3):
        runs_dir = tmp_path / ("runs" if place == "one runs_dir" else f"runs{seed}")
        runs.append(new_run(runs_dir, f"tracker.uri={uri}", f"trainer.seed={seed}"))
    command = [sys.executable, "-c", SYNC_AT_ONCE, *(str(run.path) for run, _ in runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = recorded(runs[0][1])
    assert sorted(run.data.params["trainer.seed"] for run in found) == ["0", "1", "2"]
    for run, config in runs:
        run_id = json.loads(run.mirror_file.read_text())["run_id"]
        assert points(config, run_id) == points_of_file(run)


# ------------------------------------------------------------------------------------------ an MLflow that is down


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SYNC_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "FIRST_SYNC_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture
def closed_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("patience_seconds", [3600.0, 0.1])
def test_the_thread_waits_for_a_first_row_but_not_forever(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, patience_seconds: float
) -> None:
    monkeypatch.setattr(tracking, "FIRST_SYNC_SECONDS", patience_seconds)
    run, config = new_run(runs_dir, rows=0)
    run.metrics_file.unlink(missing_ok=True)
    thread = MirrorThread(Mirror(run, config), lambda message: None)
    if patience_seconds > 60:
        time.sleep(0.5)
        assert not run.mirror_file.exists()
        run.metrics_file.write_text('{"step": 0, "time_ms": 1, "eval/loss": 2.0}\n')
    wait_for(run.mirror_file.exists)
    assert thread.close()


@pytest.mark.usefixtures("fast")
def test_an_unreachable_mlflow_is_reported_once_and_sync_sends_all_later(
    runs_dir: Path, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = new_run(runs_dir, f"tracker.uri=http://127.0.0.1:{closed_port}", rows=0)
    syncs: list[float] = []

    class CountingMirror(Mirror):
        def sync(self) -> tracking.Sent:
            syncs.append(time.monotonic())
            return super().sync()

    messages: list[str] = []
    thread = MirrorThread(CountingMirror(run, config), messages.append)
    wait_for(lambda: messages)
    tried = len(syncs)
    began = time.monotonic()
    add_rows(run, 0, 50)
    assert time.monotonic() - began < 30, "training does not wait for MLflow"
    wait_for(lambda: len(syncs) >= tried + 3)
    assert len(messages) == 1
    assert f"MLflow at http://127.0.0.1:{closed_port} fails" in messages[0]
    assert "training goes on" in messages[0]
    run.status = status_of("finished", ended_ms=STARTED_MS + 9000)
    assert thread.close() is False
    assert len(messages) == 2
    assert "did not get everything" in messages[1]
    assert messages[1].endswith(f"relora sync {run.path}")

    assert cli.main(["sync", str(run.path)]) == 1
    assert f"relora: MLflow at http://127.0.0.1:{closed_port} fails" in capsys.readouterr().err

    config.tracker.uri = None
    freeze(config, run.config_file)
    assert cli.main(["sync", str(run.path)]) == 0
    found = the_run(config)
    assert (found.info.status, found.info.start_time, found.info.end_time) == (
        "FINISHED",
        STARTED_MS,
        STARTED_MS + 9000,
    )
    assert points(config, found.info.run_id) == points_of_file(run)
    assert len(points_of_file(run)) == 125


@pytest.mark.usefixtures("fast")
def test_an_mlflow_that_never_answers_does_not_delay_the_end(
    runs_dir: Path, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LAST_SYNC_SECONDS", 0.3)
    run, config = new_run(runs_dir, f"tracker.uri=http://127.0.0.1:{silent_port}", rows=0)
    messages: list[str] = []
    began = time.monotonic()
    thread = MirrorThread(Mirror(run, config), messages.append)
    time.sleep(0.1)
    add_rows(run, 0, 50)
    assert thread.close() is False
    assert time.monotonic() - began < 30
    assert "no answer in" in messages[-1]
    assert "relora sync" in messages[-1]
    thread._thread.join(20)


@pytest.mark.usefixtures("fast")
def test_a_store_that_becomes_available_gets_everything(tmp_path: Path, empty_store: Path) -> None:
    place = tmp_path / "store"
    place.write_text("no folder yet")
    run, config = new_run(tmp_path / "runs", f"tracker.uri=sqlite:///{place}/mlflow.db")
    messages: list[str] = []
    thread = MirrorThread(Mirror(run, config), messages.append)
    wait_for(lambda: messages)
    place.unlink()
    place.mkdir()
    shutil.copy(empty_store, place / "mlflow.db")
    wait_for(lambda: thread.problem is None and run.mirror_file.exists())
    add_rows(run, 5, 20)
    run.status = status_of("finished", ended_ms=STARTED_MS + 9000)
    assert thread.close() is True
    assert len(messages) == 1
    found = the_run(config)
    assert found.info.status == "FINISHED"
    assert points(config, found.info.run_id) == points_of_file(run)


@pytest.mark.usefixtures("fast")
def test_the_thread_keeps_mlflow_up_to_date_during_training(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    messages: list[str] = []
    thread = MirrorThread(Mirror(run, config), messages.append)
    wait_for(run.mirror_file.exists)
    add_rows(run, 5, 9)
    wait_for(lambda: points(config, the_run(config).info.run_id) == points_of_file(run))
    assert the_run(config).info.status == "RUNNING"
    run.status = status_of("finished", ended_ms=STARTED_MS + 9000)
    add_rows(run, 9, 11)
    assert thread.close() is True
    assert messages == []
    assert the_run(config).info.status == "FINISHED"
    assert points(config, the_run(config).info.run_id) == points_of_file(run)


# ----------------------------------------------------------------------------------------------------- relora sync


def test_sync_corrects_a_run_with_a_dead_process_and_no_other_run(
    runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = new_run(runs_dir)
    hold = (
        "import sys, time; from pathlib import Path; from relora.runs.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).locked(): print('locked', flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", hold, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "locked\n"
    assert cli.main(["sync", "--json", str(run.path)]) == 0
    assert json.loads(capsys.readouterr().out) == {str(run.path): {"rows": 8, "status": "RUNNING"}}
    assert run.status is not None
    assert run.status.state == "running"

    trainer.kill()
    trainer.communicate()
    assert cli.main(["sync", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path}: 0 rows sent, status KILLED\n"
    assert the_run(config).info.status == "KILLED"
    assert run.status is not None
    assert run.status.state == "interrupted"
    assert "its process died" in run.status.message


def test_sync_takes_several_runs(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = status_of("finished", ended_ms=STARTED_MS + 1)
    runs = [new_run(runs_dir, f"trainer.seed={seed}", status=ended) for seed in range(3)]
    assert cli.main(["sync", *(str(run.path) for run, _ in runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert len(recorded(runs[0][1])) == 3


def test_sync_continues_after_a_run_that_cannot_be_read(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = status_of("finished", ended_ms=STARTED_MS + 1)
    (first, _), (second, config) = (new_run(runs_dir, f"trainer.seed={seed}", status=ended) for seed in range(2))
    first.config_file.write_text("\t{")
    assert cli.main(["sync", str(first.path), str(second.path)]) == 2
    shown = capsys.readouterr()
    assert str(first.config_file) in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == f"{second.path}: 8 rows sent, status FINISHED\n"
    assert len(recorded(config)) == 1


def test_sync_accepts_any_spelling_of_the_path_of_a_run(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = new_run(runs_dir, status=status_of("finished", ended_ms=STARTED_MS + 1))
    link = runs_dir.parent / "link"
    link.symlink_to(runs_dir)
    monkeypatch.chdir(run.path)
    for spelling in (run.path, Path(), Path("..") / run.path.name, link / run.path.name):
        assert cli.main(["sync", str(spelling)]) == 0
        assert len(recorded(config)) == 1, spelling
        run.mirror_file.unlink()


def test_sync_fills_a_store_that_was_removed(runs_dir: Path, empty_store: Path) -> None:
    run, config = new_run(runs_dir, status=status_of("finished", ended_ms=STARTED_MS + 1))
    Mirror(run, config).sync()
    shutil.copy(empty_store, runs_dir / "mlflow.db")
    assert cli.main(["sync", str(run.path)]) == 0
    assert points(config, the_run(config).info.run_id) == points_of_file(run)
    assert the_run(config).info.status == "FINISHED"


def test_runs_that_were_moved_with_their_store_keep_their_run_ids(runs_dir: Path, tmp_path: Path) -> None:
    run, config = new_run(runs_dir, status=status_of("finished", ended_ms=STARTED_MS + 1))
    Mirror(run, config).sync()
    before = all_of(config)
    shutil.copytree(runs_dir, tmp_path / "copied")
    runs_dir.rename(tmp_path / "moved")
    for place in ("moved", "copied"):
        path = tmp_path / place / run.path.name
        for _ in range(2):
            assert cli.main(["sync", str(path)]) == 0
        config = read_frozen(path / "config.yaml")
        found = the_run(config)
        assert found.data.tags["run_dir"] == str(path)
        assert (found.info.run_id, points(config, found.info.run_id)) == (before[0], before[-1])
    assert not runs_dir.exists(), "nothing is written to the old folder"


def test_sync_of_a_folder_that_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- relora ui


def test_ui_without_a_store_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ui", f"runs_dir={tmp_path / 'nowhere'}"]) == 2
    shown = capsys.readouterr().err
    assert "mlflow.db does not exist: no run was recorded" in shown
    assert "set runs_dir=" in shown
    assert not (tmp_path / "nowhere").exists()


def test_ui_of_an_unknown_study_names_the_known_ones(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs_dir / "studies" / "ranks").mkdir(parents=True)
    (runs_dir / "studies" / "ranks" / "study.json").write_text("{}")
    assert cli.main(["ui", f"runs_dir={runs_dir}", "study=rank"]) == 2
    assert "study rank does not exist" in (shown := capsys.readouterr().err)
    assert "the studies there: ranks" in shown


@pytest.mark.usefixtures("fast")
def test_ui_of_an_unreachable_server_is_one_message(
    tmp_path: Path, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{closed_port}"
    assert cli.main(["ui", f"tracker.uri={uri}", f"runs_dir={tmp_path}"]) == 1
    assert f"relora: MLflow at {uri} fails" in capsys.readouterr().err


def test_the_experiment_is_created_once(runs_dir: Path) -> None:
    config = compose([f"runs_dir={runs_dir}"])
    client = open_store(config.mlflow_uri, runs_dir)
    assert experiment_id(client, config) == experiment_id(client, config)
    assert len([found for found in client.search_experiments() if found.name == "relora"]) == 1


def test_a_frozen_config_names_the_same_store_and_run(runs_dir: Path) -> None:
    run, config = new_run(runs_dir)
    thawed = thaw(run.config_file)
    assert (thawed.mlflow_uri, thawed.run_dir, thawed.config_hash) == (
        config.mlflow_uri,
        run.path,
        config.config_hash,
    )
