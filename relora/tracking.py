"""The MLflow view of a run, mirrored from its folder: the one importer of mlflow.

Metrics are sent from metrics.jsonl with their original timestamps, and the status from status.json. MLflow stores an
equal point once, so sending again changes nothing, and an MLflow that is down costs a run nothing: what it missed is
sent when it is back, at the end, or by `relora sync`.
"""

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from relora.compare import Compared
from relora.config import RunConfig
from relora.errors import RunError
from relora.metrics import complete_bytes, row_metrics
from relora.rundir import RunDir, Status, read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

SYNC_INTERVAL_SECONDS = 5.0
LAST_SYNC_SECONDS = 60.0
"""How long the end of a run waits for its last metrics to be sent."""
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
VALUE_LENGTH = 6000

MLFLOW_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "cancelled": "KILLED",
}


def quiet_mlflow() -> None:
    """Settings that MLflow reads when it is imported: no telemetry, no long retries, no chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def open_store(uri: str, runs_dir: Path) -> "MlflowClient":
    """A client of `uri`; whoever comes first creates a sqlite store, alone (two creators break it for ever)."""
    quiet_mlflow()
    from mlflow import MlflowClient

    with _store_lock(uri, runs_dir):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
        return client


def _store_lock(uri: str, runs_dir: Path) -> FileLock:
    """The lock of a store: a sqlite file's stands beside it, so that every runs_dir that shares it agrees."""
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else runs_dir / "mlflow"
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_suffix(".lock"))


@contextmanager
def failures_told(config: RunConfig) -> Iterator[None]:
    """Turn whatever MLflow raises inside into a RunError that names the store."""
    try:
        yield
    except Exception as error:
        raise RunError(f"MLflow at {config.mlflow_uri} fails: {_brief(error)}") from error


def experiment_id(client: "MlflowClient", config: RunConfig) -> str:
    """The configured experiment, created where it is missing."""
    runs_dir, name = Path(config.runs_dir), config.tracker.experiment
    with _store_lock(config.mlflow_uri, runs_dir):
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        local = config.mlflow_uri.startswith("sqlite:")
        return client.create_experiment(name, artifact_location=(runs_dir / "mlartifacts").as_uri() if local else None)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one sync sent."""

    rows: int
    status: str


class Mirror:
    """One run's MLflow run."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self.run, self.config = run, config
        self._client: MlflowClient | None = None

    def sync(self) -> Sent:
        """Send what MLflow does not have yet: run, params, tags, metrics, status. Raises what MLflow raises."""
        with FileLock(self.run.path / ".mirror.lock"):  # two at once would make two runs of it
            return self._sync()

    def _sync(self) -> Sent:
        state, status = read_json(self.run.mirror_file), self.run.status or Status(state="running")
        fresh = self._client is None
        client = self._client = self._client or open_store(self.config.mlflow_uri, Path(self.config.runs_dir))
        if state.get("uri") != self.config.mlflow_uri or (fresh and not _knows(client, state["run_id"])):
            state = self._start(client, status)
        run_id = state["run_id"]
        if "message" in state["tags"] and not status.message:
            client.delete_tag(run_id, "message")
            del state["tags"]["message"]
        for name, value in self._tags(status).items():
            if state["tags"].get(name) != value:
                client.set_tag(run_id, name, value)
                state["tags"][name] = value
        rows = self._send_rows(client, run_id, state)
        wanted = MLFLOW_STATUS[status.state]
        if state.get("status") != wanted:
            if wanted == "RUNNING":
                client.update_run(run_id, status=wanted)
            else:
                client.set_terminated(run_id, status=wanted, end_time=status.ended_ms)
            state["status"] = wanted
        write_json(self.run.mirror_file, state)
        return Sent(rows=rows, status=wanted)

    def _tags(self, status: Status) -> dict[str, str]:
        """Everything about the run that is no parameter, or that may change from attempt to attempt."""
        config = self.config
        tags = {
            "method": config.method.name,
            "variant": config.variant,
            "comparison_key": config.comparison_key,
            "git_commit": status.git_commit or "unknown",
            "attempt": str(status.attempt),
            **status.corpus,
        }
        if config.study is not None:
            tags[f"study.{config.study}"] = "1"
        if status.slurm_job_id:
            tags["slurm_job_id"] = status.slurm_job_id
        if status.message:
            tags["message"] = status.message[:VALUE_LENGTH]
        return tags

    def _start(self, client: "MlflowClient", status: Status) -> dict[str, Any]:
        from mlflow.entities import Param

        config, experiment = self.config, experiment_id(client, self.config)
        # A crash between create_run and the file below would leave a second run behind: look for the first.
        here = self.run.path.resolve()
        known = [
            run
            for run in client.search_runs([experiment], f"tags.config_hash = '{config.config_hash}'")
            if Path(run.data.tags.get("run_dir", "")).resolve() == here
        ]
        if known:
            run_id = known[0].info.run_id
        else:
            tags = {"config_hash": config.config_hash, "run_dir": str(self.run.path)}
            created = client.create_run(experiment, start_time=status.started_ms, tags=tags, run_name=config.name)
            run_id = created.info.run_id
        params = [Param(name, str(value)[:VALUE_LENGTH]) for name, value in config.parameters.items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])
        state = {
            "uri": config.mlflow_uri,
            "experiment_id": experiment,
            "run_id": run_id,
            "tags": {name: value for run in known[:1] for name, value in run.data.tags.items()},
            "status": "",
            "sent_bytes": 0,
        }
        write_json(self.run.mirror_file, state)
        return state

    def _send_rows(self, client: "MlflowClient", run_id: str, state: dict[str, Any]) -> int:
        """Send the complete rows after `sent_bytes`, in calls of a thousand points; each call's progress is kept."""
        from mlflow.entities import Metric

        if not self.run.metrics_file.exists():
            return 0
        # A file that is shorter than what was sent is another: a power cut took rows, or the run began anew.
        if state["sent_bytes"] > self.run.metrics_file.stat().st_size:
            state["sent_bytes"] = 0
        with self.run.metrics_file.open("rb") as file:
            file.seek(state["sent_bytes"])
            text = file.read()
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        metrics: list[Metric] = []
        taken_bytes = 0
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            metrics += [Metric(name, value, row["time_ms"], row["step"]) for name, value in row_metrics(row).items()]
            taken_bytes += len(line)
            if len(metrics) > METRICS_PER_CALL - 50 or number == len(lines):
                client.log_batch(run_id, metrics=metrics)
                state["sent_bytes"] += taken_bytes
                write_json(self.run.mirror_file, state)
                metrics, taken_bytes = [], 0
        return len(lines)


def _knows(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has the run; one that was removed and made anew has not."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) is not None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def mirror_all(runs: Sequence[tuple[RunDir, RunConfig]], say: Callable[[str], None]) -> None:
    """Send what MLflow lacks of runs that do not mirror themselves: dead ones, and SLURM's where the store is a file.

    What fails is told once a store and costs the other stores nothing.
    """
    broken: set[str] = set()
    for run, config in runs:
        uri = config.mlflow_uri
        by_others = run.submission_file.exists() and uri.startswith("sqlite:")
        if uri in broken or not _is_behind(run, uri) or (not by_others and run.is_locked):
            continue
        try:
            Mirror(run, config).sync()
        except Exception as error:  # whatever MLflow raises
            broken.add(uri)
            say(f"MLflow at {uri} fails ({_brief(error)}); relora sync sends the rest later")


def _is_behind(run: RunDir, uri: str) -> bool:
    """Whether the run's files have more than was sent."""
    status, sent = run.status, read_json(run.mirror_file)
    if status is None or status.attempt == 0:
        return False
    has = (uri, complete_bytes(run.metrics_file), MLFLOW_STATUS[status.state], status.message[:VALUE_LENGTH])
    told = sent.get("tags", {}).get("message", "")
    return has != (sent.get("uri"), sent.get("sent_bytes"), sent.get("status"), told)


def tag_study(run: RunDir, config: RunConfig, study: str) -> None:
    """Make a run that MLflow has already a member of one more study. Raises what MLflow raises."""
    client = open_store(config.mlflow_uri, Path(config.runs_dir))
    client.set_tag(read_json(run.mirror_file)["run_id"], f"study.{study}", "1")


# ------------------------------------------------------------------------------------------------------------ studies


def gap_metric(study: str) -> str:
    """The name of a run's gap to full rank in a study.

    A study with full-rank arms of its own takes the best of them as its baseline, so a run that belongs to several
    studies has a gap in each.
    """
    return f"summary/gap_to_full_percent.{study}"


def attach_report(config: RunConfig, study: str, folder: Path, members: Sequence[Compared]) -> None:
    """Make each run of the store a member of the study with its gap, and keep the report with a run of its own.

    Raises what MLflow raises.
    """
    client = open_store(config.mlflow_uri, Path(config.runs_dir))
    for member in members:
        state = read_json(member.run.folder.mirror_file)
        if state.get("uri") != config.mlflow_uri or not _knows(client, state["run_id"]):
            continue
        known = client.get_run(run_id := state["run_id"]).data
        tags = {f"study.{study}": "1"}
        if member.baseline is not None:
            tags[f"baseline.{study}"] = member.baseline.name
        for name, value in tags.items():
            if known.tags.get(name) != value:
                client.set_tag(run_id, name, value)
        gap, metric = member.tokens.relative, gap_metric(study)
        if gap is not None and math.isfinite(gap) and known.metrics.get(metric) != 100 * gap:
            client.log_metric(run_id, metric, 100 * gap, step=0)
    experiment = experiment_id(client, config)
    found = client.search_runs([experiment], f"tags.report_of = '{study}'")
    if found:
        run_id = found[0].info.run_id
    else:
        created = client.create_run(experiment, tags={"report_of": study}, run_name=f"report {study}")
        run_id = created.info.run_id
    client.log_artifacts(run_id, str(folder), "report")
    client.set_terminated(run_id, "FINISHED")
    write_view(client, experiment, study)


def view_key(study: str) -> str:
    """Names a study's prepared view in the UI's address."""
    return hashlib.sha256(f"relora view {study}".encode()).hexdigest()


def write_view(client: "MlflowClient", experiment: str, study: str) -> None:
    """Prepare the UI's table and charts for a study; where MLflow no longer takes it, the UI just shows all runs."""
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{view_key(study)}", json.dumps(_view(study)))


def _table_columns(study: str) -> list[str]:
    return [
        "params.`method.name`",
        "params.`method.rank`",
        "params.`method.reset_interval_steps`",
        "metrics.`summary/test_perplexity`",
        "metrics.`summary/eval_perplexity`",
        f"metrics.`{gap_metric(study)}`",
        "metrics.`summary/trainable_parameters`",
        "metrics.`summary/tokens_per_second`",
        "metrics.`summary/peak_memory_bytes`",
        "params.`trainer.seed`",
    ]


def _view(study: str) -> dict[str, Any]:
    """The UI's own state as it would share it: measured with MLflow 3.17."""
    sections = ("perplexity", "results", "what matters")
    chart: dict[str, Any] = {
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 50,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "lineSmoothness": 0,
        "ignoreOutliers": False,
        "range": {"xMin": None, "xMax": None, "yMin": None, "yMax": None},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "xAxisScaleType": "linear",
        "scaleType": "linear",
    }

    def line(metric: str, axis: str, scale: str) -> dict[str, Any]:
        keys = {"metricKey": metric, "selectedMetricKeys": [metric], "xAxisKey": "metric"}
        keys |= {"selectedXAxisMetricKey": axis, "scaleType": scale, "displayName": f"{metric} over {axis}"}
        return {**chart, "type": "LINE", "metricSectionId": "perplexity", "uuid": f"{metric} {axis}", **keys}

    def bar(metric: str) -> dict[str, Any]:
        return {**chart, "type": "BAR", "metricSectionId": "results", "uuid": metric, "metricKey": metric}

    parallel = {
        **chart,
        "type": "PARALLEL",
        "metricSectionId": "what matters",
        "uuid": "parallel",
        "displayName": "rank, interval and pruning ratio against perplexity",
        "selectedParams": [
            "method.rank",
            "method.reset_interval_steps",
            "method.optimizer_reset.pruning_ratio",
        ],
        "selectedMetrics": ["summary/test_perplexity"],
        "showAllRuns": True,
    }
    return {
        "searchFilter": f"tags.`study.{study}` = '1'",
        "orderByKey": "metrics.`summary/test_perplexity`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": _table_columns(study),
        "columnOrder": [],
        "columnWidths": {},
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOWALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {
            "xAxisKey": "metric",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "progress/tokens",
        },
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": False}
            for name in sections
        ],
        "compareRunCharts": [
            line("eval/perplexity", "progress/tokens", "log"),
            line("eval/perplexity", "progress/flops", "log"),
            bar("summary/test_perplexity"),
            bar(gap_metric(study)),
            parallel,
        ],
    }


# ---------------------------------------------------------------------------------------------- beside the training


class MirrorThread:
    """Keeps MLflow up to date beside the training thread."""

    def __init__(self, mirror: Mirror, say: Callable[[str], None]) -> None:
        self.mirror, self.say = mirror, say
        self.problem: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            last = self._stopping.wait(SYNC_INTERVAL_SECONDS)
            try:
                self.mirror.sync()
                self.problem = None
            except Exception as error:  # whatever MLflow raises, training goes on
                if self.problem is None and not last:
                    self.say(f"MLflow at {self.mirror.config.mlflow_uri} fails ({_brief(error)}); training goes on")
                self.problem = error
            if last:
                return

    def close(self) -> bool:
        """Send the rest, the final status included; return whether MLflow has it all."""
        self._stopping.set()
        self._thread.join(LAST_SYNC_SECONDS)
        if self._thread.is_alive() or self.problem is not None:
            why = _brief(self.problem) if self.problem else f"no answer in {LAST_SYNC_SECONDS:.0f} s"
            self.say(
                f"MLflow did not get everything ({why}); send the rest later with: relora sync {self.mirror.run.path}"
            )
            return False
        return True


def _brief(error: Exception | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
