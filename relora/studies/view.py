"""A study in MLflow: the gaps of its runs, its report, and a prepared view for the UI."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.common.errors import print_note
from relora.config.run import RunConfig
from relora.studies.gaps import Compared
from relora.tracking.artefacts import check_place
from relora.tracking.mirror import mirrored
from relora.tracking.store import experiment_id, is_deleted, open_store, recorded_run

if TYPE_CHECKING:
    from mlflow import MlflowClient


def gap_metric(study: str) -> str:
    """Return the name of the metric for a run's gap to full rank in a study.

    A baseline is chosen over the seeds that a study needs. So a run that belongs to several studies has one gap for
    each study.
    """
    return f"summary/gap_to_full_percent.{study}"


def attach_report(config: RunConfig, study: str, folder: Path, members: Sequence[Compared], headline: str) -> None:
    """Tag each run of the store as a member of the study, record its gap, and store the report in a separate run.

    Args:
        config: The config of a run of the study. It names the store.
        study: The name of the study.
        folder: The folder of the report.
        members: The finished runs.
        headline: The description of the report's run in MLflow.

    Raises:
        RunError: The store was moved with the runs. Only the files of the report are missing in MLflow then.
        Exception: Any error of MLflow.
    """
    client, deleted = open_store(config.mlflow_uri, Path(config.runs_dir)), []
    for member in members:
        state = mirrored(member.run.folder)
        recorded = recorded_run(client, state["run_id"]) if state.get("uri") == config.mlflow_uri else None
        if recorded is None:
            continue
        if is_deleted(recorded):
            deleted.append(member.run.name)
            continue
        run_id, known = state["run_id"], recorded.data
        tags = {f"study.{study}": "1", f"role.{study}": member.role}
        if member.baseline is not None:
            tags[f"baseline.{study}"] = member.baseline.name
        for name, value in tags.items():
            if known.tags.get(name) != value:
                client.set_tag(run_id, name, value)
        gap, metric = member.tokens.relative, gap_metric(study)
        if gap is not None and math.isfinite(gap) and known.metrics.get(metric) != 100 * gap:
            client.log_metric(run_id, metric, 100 * gap, step=0)
    if deleted:
        names = ", ".join(deleted)
        print_note(f"deleted in MLflow, so not in the view of {study}: {names}; relora sync RUN_FOLDER restores a run")
    experiment = experiment_id(client, config)
    found = client.search_runs([experiment], f"tags.report_of = '{study}'")
    if found:
        run_id = found[0].info.run_id
    else:
        created = client.create_run(experiment, tags={"report_of": study}, run_name=f"report {study}")
        run_id = created.info.run_id
    client.set_tag(run_id, "mlflow.note.content", headline)
    write_view(client, experiment, study)
    client.set_terminated(run_id, "FINISHED")
    check_place(config, str(client.get_run(run_id).info.artifact_uri))
    client.log_artifacts(run_id, str(folder), "report")


def view_key(study: str) -> str:
    """Return the key of the prepared view of a study in the address of the UI."""
    return hashlib.sha256(f"relora view {study}".encode()).hexdigest()


def write_view(client: "MlflowClient", experiment: str, study: str) -> None:
    """Prepare the UI's table and charts for a study. If a later MLflow ignores this, the UI shows all runs."""
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{view_key(study)}", json.dumps(view(study)))


def _table_columns(study: str) -> dict[str, int]:
    """Return the columns and their widths in pixels. The columns with the answer are visible without scrolling."""
    return {
        "params.`method.name`": 120,
        "params.`method.rank`": 110,
        "params.`method.reset_interval_steps`": 220,
        "metrics.`summary/test_perplexity`": 180,
        f"metrics.`{gap_metric(study)}`": 240,
        "metrics.`summary/eval_perplexity`": 185,
        "metrics.`summary/trainable_parameters`": 215,
        "metrics.`summary/tokens_per_second`": 205,
        "metrics.`summary/peak_memory_bytes`": 215,
        "params.`trainer.seed`": 110,
    }


def view(study: str) -> dict[str, Any]:
    """Return the state of the UI in the format of its share links (seen in MLflow 3.17)."""
    sections = {"perplexity": 2, "results": 2, "what matters": 1}
    as_they_are = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
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
        "selectedColumns": list(_table_columns(study)),
        "columnOrder": list(_table_columns(study)),
        "columnWidths": _table_columns(study),
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
            {"uuid": name, "name": name, "columns": columns, **as_they_are} for name, columns in sections.items()
        ],
        "compareRunCharts": [
            line("eval/perplexity", "progress/tokens", "log"),
            line("eval/perplexity", "progress/flops", "log"),
            bar("summary/test_perplexity"),
            bar(gap_metric(study)),
            parallel,
        ],
    }
