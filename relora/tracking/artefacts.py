"""Files of runs and studies in MLflow, and the check that MLflow keeps them where the runs are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from relora.common.errors import RunError
from relora.config.run import RunConfig
from relora.runs.rundir import RunDir, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient


def check_place(config: RunConfig, artifact_uri: str) -> None:
    """Raise RunError if the store of a runs_dir keeps artefacts elsewhere: the runs_dir was moved or copied."""
    path = Path(url2pathname(urlsplit(artifact_uri).path))
    if config.tracker.uri is None and not path.resolve().is_relative_to(Path(config.runs_dir).resolve()):
        raise RunError(
            f"{config.runs_dir} was moved or copied, but its MLflow store still keeps artifacts in {path}; move it "
            "back, or read the report in the folder of the study"
        )


def unsent_changes(run: RunDir, status: Status, sent: Sequence[str]) -> list[str]:
    """Return the hashes of the codes that a run's attempts ran, whose changes exist and are not among `sent`."""
    codes = dict.fromkeys(attempt.code for attempt in status.attempts if attempt.code)
    return [code for code in codes if code not in sent and run.changes_file(code).is_file()]


def send_changes(client: "MlflowClient", run_id: str, run: RunDir, config: RunConfig, codes: Sequence[str]) -> None:
    """Add the changes of these codes since their commits to the run's artefacts. Raises what MLflow raises."""
    check_place(config, str(client.get_run(run_id).info.artifact_uri))
    for code in codes:
        client.log_artifact(run_id, os.fspath(run.changes_file(code)), "code")
