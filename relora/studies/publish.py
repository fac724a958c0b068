"""Publish the results of a study: its report, and its runs in MLflow."""

import sys
from collections.abc import Sequence
from pathlib import Path

from relora.config.run import RunConfig
from relora.studies.compare import Study, load_study
from relora.studies.study import Planned


def publish_report(runs_dir: Path, name: str, *, on_node: bool = False) -> Study:
    """Write the report of a study, send missing data to MLflow, and print the answer and the path of the report.

    Args:
        runs_dir: The folder of all runs.
        name: The name of the study.
        on_node: Whether this is a node of a cluster, which must not open an MLflow store that is a file.

    Returns:
        The study.
    """
    from relora.studies.report import answer, write_report

    study = load_study(runs_dir, name)
    folder = write_report(study, runs_dir)
    mirrored = [member for member in study.members if _is_mirrored(member.run.config, on_node)]
    if mirrored:
        from relora.studies.view import attach_report
        from relora.tracking.mirror import mirror_all
        from relora.tracking.store import brief

        mirror_all([(member.run.folder, member.run.config) for member in mirrored if member.run.config], _warn)
        finished = [member for member in mirrored if member.run.finished]
        config = mirrored[-1].run.config
        assert config is not None
        try:
            if finished:
                attach_report(config, name, folder, finished, "\n\n".join(answer(study)))
        except Exception as error:  # MLflow raises errors of many types
            print(f"the report could not be attached in MLflow at {config.mlflow_uri}: {brief(error)}", flush=True)
    print("\n".join(["", *answer(study), f"report: {folder / 'report.html'}"]), flush=True)
    return study


def _is_mirrored(config: RunConfig | None, on_node: bool) -> bool:
    return (
        config is not None
        and config.tracker.name == "mlflow"
        and not (on_node and config.mlflow_uri.startswith("sqlite:"))
    )


def mirror_runs(planned: Sequence[Planned]) -> None:
    """Send the missing data of the runs to MLflow, for runs that could not send it themselves."""
    mirrored = [(item.run, item.config) for item in planned if item.config.tracker.name == "mlflow"]
    if mirrored:
        from relora.tracking.mirror import mirror_all

        mirror_all(mirrored, _warn)


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def join_study(planned: Sequence[Planned], study: str) -> None:
    """Tag the runs that an earlier launch or another study has already recorded in MLflow."""
    _tag(planned, study, belongs=True)


def leave_study(planned: Sequence[Planned], study: str) -> None:
    """Take the runs out of the study in MLflow, as far as they are recorded there."""
    _tag(planned, study, belongs=False)


def _tag(planned: Sequence[Planned], study: str, *, belongs: bool) -> None:
    recorded = [item for item in planned if item.run.mirror_file.exists()]
    if not recorded:
        return
    from relora.tracking.mirror import tag_study
    from relora.tracking.store import brief

    for item in recorded:
        try:
            tag_study(item.run, item.config, study, belongs=belongs)
        except Exception as error:  # MLflow raises errors of many types
            print(f"{item.config.name} could not be tagged study.{study} in MLflow: {brief(error)}", flush=True)
