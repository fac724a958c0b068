"""The disk space of code snapshots, and those that no job needs any more."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from relora.common.errors import DamagedFile
from relora.common.files import read_json, size_bytes
from relora.common.tables import some_of
from relora.runs.code import FOLDER, RECORD
from relora.runs.rundir import RunDir

NEW_SECONDS = 24 * 3600.0
"""A snapshot younger than this may belong to jobs that are being submitted, or to the report of a study."""
NEEDS_NO_CODE = ("finished", "failed", "cancelled")
"""States of runs that no queued or running job trains. A new launch of them makes a snapshot of its own."""


@dataclass(kw_only=True)
class SnapshotCost:
    """The disk space of a code snapshot. `why` is the reason why it is deletable or kept."""

    folder: Path
    snapshot_bytes: int
    deletable: list[Path] = field(default_factory=list)
    deletable_bytes: int = 0
    why: str = ""
    deleted_bytes: int = 0


def snapshots_of(runs_dir: Path, states: dict[str, str]) -> list[SnapshotCost]:
    """List the code snapshots.

    Args:
        runs_dir: The folder of all runs.
        states: The state of each run in it, by name.
    """
    users: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name, state in states.items():
        if state in NEEDS_NO_CODE:
            continue
        try:
            used = read_json(RunDir(runs_dir / name).submission_file).get("code")
        except (DamagedFile, OSError):
            unknown.append(name)
            continue
        if used:
            users.setdefault(used, []).append(f"{name} ({state})")
    found: list[SnapshotCost] = []
    for folder in sorted((runs_dir / FOLDER).glob("*")):
        if not folder.is_dir() or not (folder / RECORD).is_file():
            continue
        cost = SnapshotCost(folder=folder, snapshot_bytes=size_bytes(folder))
        own = users.get(folder.name, [])
        if folder.is_symlink():
            cost.why = f"left alone: it is a link to {folder.readlink()}, and nothing is deleted through links"
        elif own:
            cost.why = f"kept: {some_of(own)} runs it"
        elif unknown:
            cost.why = f"kept: unknown whether {some_of(unknown)} runs it"
        elif age_seconds(folder) < NEW_SECONDS:
            cost.why = "kept: made less than a day ago"
        else:
            cost.why = "every run that was submitted with it has ended"
            cost.deletable, cost.deletable_bytes = [folder], cost.snapshot_bytes
        found.append(cost)
    return found


def age_seconds(folder: Path) -> float:
    """Return the seconds since the snapshot was made."""
    return time.time() - (folder / RECORD).stat().st_mtime
