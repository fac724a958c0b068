"""Delete files that no run needs any more, and format the list of files for the user."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora.common.errors import RunError
from relora.common.files import size_bytes
from relora.common.tables import aligned, in_units
from relora.studies.corpora import BUSY, STATE, STOPPED_SECONDS, CorpusCost, idle_seconds
from relora.studies.disk import Disk, RunCost, WarmStartCost, judge, state_of_idle, survey
from relora.studies.snapshots import NEW_SECONDS, age_seconds

# ------------------------------------------------------------------------------------------------------- deletion


def delete(disk: Disk) -> None:
    """Delete the files that `disk` lists as deletable, if they still are. Errors are added to `disk.failures`."""
    for cost in disk.corpora:
        if cost.deletable:
            _delete_of_corpus(cost, disk.failures)
    for cost in disk.snapshots:
        if cost.deletable and age_seconds(cost.folder) > NEW_SECONDS:
            cost.deleted_bytes += _deleted_bytes(cost.folder, disk.failures)
    for cost in disk.runs:
        if cost.deletable:
            _delete_of_run(cost, disk.failures)
    marked = [cost for cost in disk.warm_starts if cost.deletable]
    if not marked:
        return
    now = {cost.folder: cost for cost in survey(disk.runs_dir, disk.studies).warm_starts}
    for cost in marked:
        still = now.get(cost.folder)
        if still is not None:
            cost.why = still.why
            _delete_of_warm_start(cost, [path for path in cost.deletable if path in still.deletable], disk.failures)


def _delete_of_run(cost: RunCost, failures: list[str]) -> None:
    """Delete files under the lock of the run, judged by its current state. A run that was started since keeps all."""
    try:
        with cost.run.locked():
            still, cost.why = judge(cost.run, state_of_idle(cost.run))
            for path in cost.deletable:
                if path in still:
                    cost.deleted_bytes += _deleted_bytes(path, failures)
    except RunError as error:
        cost.why = f"kept: {error}"
    except (OSError, ValueError, TypeError) as error:
        failures.append(f"nothing of {cost.run.path} could be deleted: {error}")


def _delete_of_warm_start(cost: WarmStartCost, paths: Sequence[Path], failures: list[str]) -> None:
    try:
        with FileLock(cost.lock_file, timeout=0):
            for path in paths:
                if path == cost.folder:
                    path.rename(cost.leftover)
                cost.deleted_bytes += _deleted_bytes(cost.leftover, failures)
    except Timeout:
        cost.why = "kept: a run trains it or forks from it now"
    except OSError as error:
        failures.append(f"the warm start {cost.folder} could not be deleted: {error}")


def _delete_of_corpus(cost: CorpusCost, failures: list[str]) -> None:
    """Delete a preparation that stopped, unless one has gone on with it since."""
    try:
        with FileLock(cost.lock_file, timeout=0):
            if not cost.folder.exists() or idle_seconds(cost.folder) < STOPPED_SECONDS:
                cost.why = "kept: its preparation has gone on since"
                return
            # The state goes first: without it, no preparation goes on with a rest.
            for path in (cost.folder / STATE, cost.folder):
                cost.deleted_bytes += _deleted_bytes(path, failures)
    except Timeout:
        cost.why = BUSY
    except OSError as error:
        failures.append(f"{cost.folder} could not be deleted: {error}")


def _deleted_bytes(path: Path, failures: list[str]) -> int:
    """Delete a file or a folder, and return the deleted bytes."""
    before = size_bytes(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        failures.append(f"{path} could not be deleted: {error}")
    return before - size_bytes(path)


# ----------------------------------------------------------------------------------------------- output for the user


def as_json(disk: Disk) -> dict[str, Any]:
    """Return the list as a JSON object."""
    return {
        "runs_dir": str(disk.runs_dir),
        "studies": disk.studies,
        "runs": {
            cost.run.path.name: {
                "state": cost.state,
                "checkpoints_bytes": cost.checkpoints_bytes,
                "model_bytes": cost.model_bytes,
                "deletable_bytes": cost.deletable_bytes,
                "deleted_bytes": cost.deleted_bytes,
                "why": cost.why,
            }
            for cost in disk.runs
        },
        "warm_starts": {
            cost.folder.name: {
                "runs": cost.runs,
                "warm_start_bytes": cost.warm_start_bytes,
                "deletable_bytes": cost.deletable_bytes,
                "deleted_bytes": cost.deleted_bytes,
                "why": cost.why,
            }
            for cost in disk.warm_starts
        },
        "corpora": {
            cost.folder.name: {
                "corpus_bytes": cost.corpus_bytes,
                "deletable_bytes": cost.deletable_bytes,
                "deleted_bytes": cost.deleted_bytes,
                "why": cost.why,
            }
            for cost in disk.corpora
        },
        "snapshots": {
            cost.folder.name: {
                "snapshot_bytes": cost.snapshot_bytes,
                "deletable_bytes": cost.deletable_bytes,
                "deleted_bytes": cost.deleted_bytes,
                "why": cost.why,
            }
            for cost in disk.snapshots
        },
        "totals": disk.totals,
        "failures": disk.failures,
    }


def text(disk: Disk, *, deleted: bool) -> str:
    """Return tables of runs, warm starts, corpora and code snapshots, and the sums.

    Args:
        disk: The list.
        deleted: Whether the deletion was done. Otherwise the tables show the bytes that can be deleted.
    """
    column = "deleted" if deleted else "deletable"
    runs = [["run", "state", "checkpoints", "model", column, "why"]]
    for cost in disk.runs:
        sizes = (cost.checkpoints_bytes, cost.model_bytes, cost.deleted_bytes if deleted else cost.deletable_bytes)
        runs.append([cost.run.path.name, cost.state, *map(in_units, sizes), cost.why])
    warm_starts = [["warm start", "forked by", "size", column, "why"]]
    for cost in disk.warm_starts:
        sizes = (cost.warm_start_bytes, cost.deleted_bytes if deleted else cost.deletable_bytes)
        warm_starts.append(
            [
                cost.folder.name,
                f"{len(cost.runs)} run{'' if len(cost.runs) == 1 else 's'}",
                *map(in_units, sizes),
                cost.why,
            ]
        )
    corpora = [["corpus", "size", column, "why"]]
    for cost in disk.corpora:
        sizes = (cost.corpus_bytes, cost.deleted_bytes if deleted else cost.deletable_bytes)
        corpora.append([cost.folder.name, *map(in_units, sizes), cost.why])
    snapshots = [["code", "size", column, "why"]]
    for cost in disk.snapshots:
        sizes = (cost.snapshot_bytes, cost.deleted_bytes if deleted else cost.deletable_bytes)
        snapshots.append([cost.folder.name, *map(in_units, sizes), cost.why])
    tables = [aligned(rows) for rows in (runs, warm_starts, corpora, snapshots) if len(rows) > 1]
    if not tables:
        return f"there is no run in {disk.runs_dir}"
    size = {name: in_units(value) for name, value in disk.totals.items()}
    total = (
        f"{size['checkpoints_bytes']} of checkpoints, {size['model_bytes']} of models, "
        f"{size['warm_starts_bytes']} of warm starts, {size['corpora_bytes']} of corpora, "
        f"{size['snapshots_bytes']} of code; "
    )
    total += (
        f"{size['deleted_bytes']} deleted" if deleted else f"{size['deletable_bytes']} of it deletable with --delete"
    )
    return "\n\n".join([*tables, total])
