"""The copy of a run in MLflow, made from the run's folder.

Metrics are sent from metrics.jsonl with their original timestamps, and the status from status.json. MLflow stores equal
points only once, so it is safe to send them again. If MLflow is down, the run continues. The missing points are sent
when MLflow is back, at the end of the run, or by `relora sync`.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from relora.common.errors import ConfigError, RunError, print_note
from relora.config.identity import spelled_out
from relora.config.run import RunConfig
from relora.runs.metrics import complete_bytes, decoded, row_metrics
from relora.runs.rundir import RunDir, Status, read_json, write_json
from relora.tracking.artefacts import send_changes, unsent_changes
from relora.tracking.store import (
    VALUE_LENGTH,
    Point,
    brief,
    experiment_id,
    is_deleted,
    open_store,
    recorded_run,
    runs_of_config,
    send_params,
    send_points,
    values_held,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SYNC_INTERVAL_SECONDS = 5.0
FIRST_SYNC_SECONDS = 30.0
"""How long the mirror waits for a first row. The import of MLflow uses a core for seconds, and would delay that row."""
LAST_SYNC_SECONDS = 60.0
"""How long the end of a run waits for its last metrics to be sent."""
POINTS_PER_CALL = 1000
MARK_BYTES = 1024
"""The bytes before an offset in the metrics file that are checked to see that the rows are still the same."""

MLFLOW_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "cancelled": "KILLED",
}


def parameters(config: RunConfig) -> dict[str, Any]:
    """Return the run's MLflow parameters: every field that can change the results.

    The parallel coordinates plot of MLflow's UI omits a run that has no value for one of its axes. Therefore the rank,
    the interval and the pruning ratio are 0 for a method without them.
    """
    return {
        "method.optimizer_reset.pruning_ratio": 0.0,
        **spelled_out(config),
        "method.rank": config.rank or 0,
        "method.reset_interval_steps": config.reset_interval_steps or 0,
    }


def mirrored(run: RunDir) -> dict[str, Any]:
    """Read a run's mlflow.json; empty if there is none or it is damaged. In that case MLflow itself is asked."""
    try:
        state = read_json(run.mirror_file)
    except RunError:
        return {}
    kinds = {"uri": str, "experiment_id": str, "run_id": str, "tags": dict, "status": str, "sent_bytes": int}
    return state if all(isinstance(state.get(key), kind) for key, kind in kinds.items()) else {}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The number of rows and the status that one sync sent."""

    rows: int
    status: str


class Mirror:
    """The copy of one run in MLflow. `log_line` receives messages for the user."""

    def __init__(self, run: RunDir, config: RunConfig, log_line: Callable[[str], None] = print_note) -> None:
        self.run, self.config, self.log_line = run, config, log_line
        self._client: MlflowClient | None = None
        self._held: dict[tuple[str, int], float] | None = None
        """The values that MLflow held of the run before rows were lost; None if MLflow was not asked."""
        self._changes_failed = False

    def sync(self) -> Sent:
        """Send what MLflow does not have yet: run, params, tags, metrics, status. Raises what MLflow raises."""
        with FileLock(self.run.path / ".mirror.lock"):  # two processes at once would create two MLflow runs
            try:
                return self._sync()
            except Exception:
                self._client = None  # the store, or the run in it, may have been removed: open it again next time
                raise

    def _sync(self) -> Sent:
        state, status = mirrored(self.run), self.run.status or Status(state="running")
        before = json.dumps(state)
        client = self._client
        if client is None or state.get("uri") != self.config.mlflow_uri:
            client = self._client = open_store(self.config.mlflow_uri, Path(self.config.runs_dir))
            state = self._opened(client, state, status)
        run_id = state["run_id"]
        for name, value in self._tags(status, state["tags"]).items():
            if state["tags"].get(name) != value:
                client.set_tag(run_id, name, value)
                state["tags"][name] = value
        rows = self._send_rows(client, run_id, state)
        wanted = MLFLOW_STATUS[status.state]
        ended_ms = None if wanted == "RUNNING" else status.ended_ms
        if (state["status"], state.get("ended_ms")) != (wanted, ended_ms):
            if wanted == "RUNNING":
                client.update_run(run_id, status=wanted)
            else:
                client.set_terminated(run_id, status=wanted, end_time=ended_ms)
            state |= {"status": wanted, "ended_ms": ended_ms}
        self._send_changes(client, run_id, state, status)
        if json.dumps(state) != before:
            write_json(self.run.mirror_file, state)
        return Sent(rows=rows, status=wanted)

    def _send_changes(self, client: "MlflowClient", run_id: str, state: dict[str, Any], status: Status) -> None:
        """Send the changes of the code. A failure is told once, and stops nothing: the figures are in MLflow."""
        codes = unsent_changes(self.run, status, state.get("changes", []))
        if not codes or self._changes_failed:
            return
        try:
            send_changes(client, run_id, self.run, self.config, codes)
            state["changes"] = [*state.get("changes", []), *codes]
        except Exception as error:  # MLflow raises many types
            self._changes_failed = True
            self.log_line(f"MLflow does not get the changes of the code: {brief(error)}")

    def _tags(self, status: Status, known: dict[str, str]) -> dict[str, str]:
        """Return the tags: everything about the run that is not a parameter, or that may change between attempts."""
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
        if status.attempts and status.attempts[-1].code:
            tags["code"] = status.attempts[-1].code
        if config.rates.basis != "unknown":
            tags["rates"] = config.rates.in_full[:VALUE_LENGTH]
        if config.study is not None:
            tags[f"study.{config.study}"] = "1"
        if status.slurm_job_id:
            tags["slurm_job_id"] = status.slurm_job_id
        if status.message or known.get("message"):  # emptied and not removed: a tag cannot be removed twice
            tags["message"] = status.message[:VALUE_LENGTH]
        return tags

    # ------------------------------------------------------------------------------------- which run of MLflow it is

    def _opened(self, client: "MlflowClient", state: dict[str, Any], status: Status) -> dict[str, Any]:
        """Return the state of the run in a newly opened store. The run is created if the store does not have it."""
        experiment = experiment_id(client, self.config)
        run = recorded_run(client, state["run_id"]) if state else None
        if run is None or run.info.experiment_id != experiment:
            return self._start(client, experiment, status)
        self._restore(client, run)
        if state["uri"] != self.config.mlflow_uri:  # the store was moved with its runs, or has a new address
            state |= {"uri": self.config.mlflow_uri, "sent_bytes": 0}
        return state | {"tags": dict(run.data.tags), "status": run.info.status, "ended_ms": run.info.end_time}

    def _restore(self, client: "MlflowClient", run: "Run") -> None:
        if is_deleted(run):
            client.restore_run(run.info.run_id)
            self.log_line(
                f"{self.run.path.name} was deleted in MLflow; it is restored there, since its folder still exists"
            )

    def _start(self, client: "MlflowClient", experiment: str, status: Status) -> dict[str, Any]:
        """Create the MLflow run. Reuse the run of this folder if MLflow has it, and only mlflow.json was lost."""
        config, here = self.config, self.run.path.resolve()
        of_this_path = [
            run
            for run in runs_of_config(client, experiment, config.config_hash)
            if Path(run.data.tags.get("run_dir", "")).resolve() == here
        ]
        known = [run for run in of_this_path if run.info.start_time == status.started_ms]
        if known:
            self._restore(client, known[0])
            run_id = known[0].info.run_id
        else:
            tags = {"config_hash": config.config_hash, "run_dir": str(self.run.path)}
            created = client.create_run(experiment, start_time=status.started_ms, tags=tags, run_name=config.name)
            run_id = created.info.run_id
        for run in of_this_path:
            if run not in known and not is_deleted(run):
                self._retire(client, run, run_id)
        send_params(client, run_id, parameters(config))
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

    def _retire(self, client: "MlflowClient", run: "Run", successor: str) -> None:
        """Keep the MLflow run of a removed folder, but take it out of all studies. `successor` replaces it there."""
        if "replaced_by" not in run.data.tags:
            client.set_tag(run.info.run_id, "replaced_by", successor)
            for name in run.data.tags:
                if name.startswith("study."):
                    client.set_tag(run.info.run_id, name, "0")

    # ------------------------------------------------------------------------------------------------------- metrics

    def _send_rows(self, client: "MlflowClient", run_id: str, state: dict[str, Any]) -> int:
        """Send the complete rows after `sent_bytes`, in calls of a thousand points. Each call's progress is saved.

        After a power cut, rows may be lost and different rows written in their place. Then the offset is no longer
        valid, and from then on the rows are compared with the values in MLflow. A step that MLflow has keeps its first
        value there. Return the number of rows sent.
        """
        lines, start = self._unsent_lines(state["sent_bytes"], state.get("sent_mark"))
        if lines and not start:
            self._held = values_held(client, run_id)
            state["may_be_held"] = bool(self._held)
        elif lines and state.get("may_be_held") and self._held is None:
            self._held = values_held(client, run_id)
        held = self._held or {}
        points: list[Point] = []
        sent_rows, end = 0, start
        for number, line in enumerate(lines, start=1):
            fresh = [point for point in _points(line) if not _is_held(point, held)]
            points += fresh
            sent_rows += bool(fresh)
            end += len(line)
            if len(points) > POINTS_PER_CALL - 50 or number == len(lines):
                send_points(client, run_id, points)
                points = []
                state["sent_bytes"], state["sent_mark"] = end, self._mark(end)
                write_json(self.run.mirror_file, state)
        return sent_rows

    def _unsent_lines(self, offset_bytes: int, mark: str | None) -> tuple[list[bytes], int]:
        """Return the complete lines after the offset, and the offset. It is 0 if the file changed before the offset."""
        start = offset_bytes if offset_bytes and self._mark(offset_bytes) == mark else 0
        if not self.run.metrics_file.exists():
            return [], start
        with self.run.metrics_file.open("rb") as file:
            file.seek(start)
            text = file.read()
        return text[: text.rfind(b"\n") + 1].splitlines(keepends=True), start

    def _mark(self, offset_bytes: int) -> str:
        """Return a checksum of the last bytes before an offset; empty if the offset is not at the end of a line."""
        if not self.run.metrics_file.exists():
            return ""
        with self.run.metrics_file.open("rb") as file:
            file.seek(max(0, offset_bytes - MARK_BYTES))
            before = file.read(min(offset_bytes, MARK_BYTES))
            ends = file.tell() == offset_bytes and before.endswith(b"\n")
        return hashlib.sha256(before).hexdigest()[:16] if ends else ""


def _points(line: bytes) -> list[Point]:
    """Return the points of a row; none if the row is damaged."""
    row = decoded(line)
    if row is None:
        return []
    return [Point(name, float(value), row["time_ms"], row["step"]) for name, value in row_metrics(row).items()]


def _is_held(point: Point, held: dict[tuple[str, int], float]) -> bool:
    """Return whether MLflow needs no such point. It gets the newest value of a result, and the first one of a step."""
    value = held.get((point.name, point.step))
    return value is not None and (not point.name.startswith("summary/") or value == point.value)


def mirror_all(
    runs: Sequence[tuple[RunDir, RunConfig]], log_line: Callable[[str], None], *, held_here: bool = False
) -> None:
    """Send what MLflow does not have of runs that do not mirror themselves.

    These are dead runs, and SLURM's runs if the store is a file. If one run fails, the other runs are still sent. A
    store that does not answer is not asked again.

    Args:
        runs: The runs and their configs.
        log_line: Receives each failure once.
        held_here: This process holds the locks of the runs, so none of them mirrors itself.
    """
    broken: set[str] = set()
    reported: set[str] = set()
    for run, config in runs:
        uri = config.mlflow_uri
        try:
            by_others = run.submission_file.exists() and uri.startswith("sqlite:")
            if uri not in broken and _is_behind(run, uri) and (by_others or held_here or not run.is_locked):
                Mirror(run, config, log_line).sync()
        except Exception as error:  # MLflow raises many types
            ours = isinstance(error, (ConfigError, RunError))
            why = str(error) if ours else f"MLflow at {uri} fails ({brief(error)})"
            if _answers(config):
                if why not in reported:
                    log_line(
                        f"{config.name} could not be sent to MLflow: {why}; try again with: relora sync {run.path}"
                    )
                reported.add(why)
            else:
                broken.add(uri)
                log_line(f"{why}; relora sync sends the rest later")


def _answers(config: RunConfig) -> bool:
    try:
        open_store(config.mlflow_uri, Path(config.runs_dir))
    except Exception:  # MLflow raises many types
        return False
    return True


def _is_behind(run: RunDir, uri: str) -> bool:
    """Return whether the run's files have more than was sent."""
    status, sent = run.status, mirrored(run)
    if status is None or status.attempt == 0:
        return False
    has = (uri, complete_bytes(run.metrics_file), MLFLOW_STATUS[status.state], status.message[:VALUE_LENGTH])
    reported = sent.get("tags", {}).get("message", "")
    return has != (sent.get("uri"), sent.get("sent_bytes"), sent.get("status"), reported)


def tag_study(run: RunDir, config: RunConfig, study: str, *, belongs: bool) -> None:
    """Add a run to one more study in MLflow, or take it out of one. Do nothing if the run was never sent there.

    Raises RunError if the run was deleted in MLflow, and what MLflow raises.
    """
    if state := mirrored(run):
        client = open_store(config.mlflow_uri, Path(config.runs_dir))
        recorded = recorded_run(client, state["run_id"])
        if recorded is not None and is_deleted(recorded):
            raise RunError(f"it was deleted there; relora sync {run.path} restores it")
        client.set_tag(state["run_id"], f"study.{study}", "1" if belongs else "0")


# ---------------------------------------------------------------------------------------------- beside the training


class MirrorThread:
    """A thread that keeps MLflow up to date during the training."""

    def __init__(self, mirror: Mirror, log_line: Callable[[str], None]) -> None:
        self.mirror, self.log_line = mirror, log_line
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
            except Exception as error:  # MLflow raises many types; training continues in every case
                if self.problem is None and not last:
                    self.log_line(f"MLflow at {self.mirror.config.mlflow_uri} fails ({brief(error)}); training goes on")
                self.problem = error
            if last:
                return
            last = self._stopping.wait(SYNC_INTERVAL_SECONDS)

    def _wait_for_a_row(self) -> bool:
        """Wait for a first row, at most `FIRST_SYNC_SECONDS`. Return whether the run has ended."""
        for _ in range(max(1, round(FIRST_SYNC_SECONDS / SYNC_INTERVAL_SECONDS))):
            if self._stopping.wait(SYNC_INTERVAL_SECONDS):
                return True
            if complete_bytes(self.mirror.run.metrics_file):
                break
        return False

    def close(self) -> bool:
        """Send the rest, including the final status. Return whether MLflow has everything."""
        self._stopping.set()
        self._thread.join(LAST_SYNC_SECONDS)
        if self._thread.is_alive() or self.problem is not None:
            why = brief(self.problem) if self.problem else f"no answer in {LAST_SYNC_SECONDS:.0f} s"
            self.log_line(
                f"MLflow did not get everything ({why}); send the rest later with: relora sync {self.mirror.run.path}"
            )
            return False
        return True
