"""The MLflow view of a run, mirrored from its folder: the one importer of mlflow.

Metrics are sent from metrics.jsonl with their original timestamps, and the status from status.json. MLflow stores an
equal point once, so sending again changes nothing, and an MLflow that is down costs a run nothing: what it missed is
sent when it is back, at the end, or by `relora sync`.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from relora.config import RunConfig
from relora.errors import RunError
from relora.metrics import complete_bytes, row_metrics
from relora.rundir import RunDir, Status, read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

SYNC_INTERVAL_SECONDS = 5.0
FIRST_SYNC_SECONDS = 30.0
"""How long the mirror waits for a first row: importing MLflow takes a core for seconds, and would delay that row."""
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
        elsewhere = state.get("uri") != self.config.mlflow_uri
        if not state or ((fresh or elsewhere) and not knows(client, state["run_id"])):
            state = self._start(client, status)
        elif elsewhere:  # the store moved with its runs, or has another address: what it has of this run is unknown
            state |= {"uri": self.config.mlflow_uri, "tags": {}, "status": "", "sent_bytes": 0}
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
            "run_dir": str(self.run.path),
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


def knows(client: "MlflowClient", run_id: str) -> bool:
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
        last = self._wait_for_a_row()
        while True:
            try:
                self.mirror.sync()
                self.problem = None
            except Exception as error:  # whatever MLflow raises, training goes on
                if self.problem is None and not last:
                    self.say(f"MLflow at {self.mirror.config.mlflow_uri} fails ({_brief(error)}); training goes on")
                self.problem = error
            if last:
                return
            last = self._stopping.wait(SYNC_INTERVAL_SECONDS)

    def _wait_for_a_row(self) -> bool:
        """Until there is something to show, `FIRST_SYNC_SECONDS` at most; return whether the run has ended."""
        for _ in range(max(1, round(FIRST_SYNC_SECONDS / SYNC_INTERVAL_SECONDS))):
            if self._stopping.wait(SYNC_INTERVAL_SECONDS):
                return True
            if complete_bytes(self.mirror.run.metrics_file):
                break
        return False

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
