"""The folder of a study: its manifest study.json, and how often it was cancelled."""

from pathlib import Path
from typing import Any

from relora.common.checks import check_name
from relora.common.errors import ConfigError, DamagedFile
from relora.common.files import read_json, write_json

CANCELLATIONS = "cancelled.json"
"""The file in a study's folder that counts its cancellations."""


def study_dir(runs_dir: Path, study: str) -> Path:
    """Return the folder of a study. Raises ConfigError for an invalid name: a path could lead out of `runs_dir`."""
    check_name("study", study)
    return runs_dir / "studies" / study


def studies(runs_dir: Path) -> list[str]:
    """Return the names of the studies of a runs_dir."""
    return sorted(path.parent.name for path in runs_dir.glob("studies/*/study.json"))


def unknown_study(runs_dir: Path, study: str) -> ConfigError:
    """Return the error for a study that is not in `runs_dir`. The message lists the studies that exist there."""
    known = ", ".join(studies(runs_dir)) or "none"
    return ConfigError(
        f"study {study} does not exist in {runs_dir}; the studies there: {known}. Check the name and runs_dir=..."
    )


def manifest_of(runs_dir: Path, study: str) -> dict[str, Any]:
    """Return the content of study.json.

    Raises:
        ConfigError: The name is invalid, or the study was never launched in `runs_dir`.
        DamagedFile: The file cannot be read, or lacks the runs, the launches or the role of a run.
    """
    file = study_dir(runs_dir, study) / "study.json"
    manifest = read_json(file)
    if not manifest and not file.exists():
        raise unknown_study(runs_dir, study)
    runs, launches = manifest.get("runs"), manifest.get("launches")
    remedy = "launch the study again: that writes a new file"
    if not isinstance(runs, dict) or not isinstance(launches, list):
        raise DamagedFile(file, "it has no runs and launches", remedy)
    for name, entry in runs.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
            raise DamagedFile(file, f"its run {name} has no role", remedy)
        entry.setdefault("variant", name)
    return manifest


def note_cancellation(runs_dir: Path, study: str) -> None:
    """Record that the study was cancelled, so that its launchers start no more runs."""
    write_json(study_dir(runs_dir, study) / CANCELLATIONS, {"times": cancellations(runs_dir, study) + 1})


def cancellations(runs_dir: Path, study: str) -> int:
    """Return how often the study was cancelled."""
    return read_json(study_dir(runs_dir, study) / CANCELLATIONS).get("times", 0)
