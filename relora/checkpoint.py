"""Checkpoints: one file a step, written whole or not at all, the newest readable one wins.

Loads torch only to write and to read: who asks how far a run is needs none.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from relora.errors import RunError
from relora.rundir import sync_folder

KEPT = 2
"""The newest, and one to fall back on should its disk lie."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every complete checkpoint, oldest first; files still being written have another name."""
    found = ((re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in folder.glob("step-*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def path_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint before the update of `step`."""
    return folder / f"step-{step:08d}.pt"


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, None where there is none."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1][0] if checkpoints else None


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` and drop all but the newest `KEPT`.

    The file appears under its name only after it is complete and on the disk. Raises CheckpointError when it cannot be
    written (a full disk, say); earlier checkpoints are untouched then.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    path = path_of(folder, step)
    temporary = path.with_suffix(".tmp")
    writer = _Writer()
    try:
        with temporary.open("wb") as file:
            writer.file = file
            torch.save(state, cast(BinaryIO, writer))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = writer.error or error
        raise CheckpointError(f"checkpoint of step {step} could not be written to {folder}: {reason}") from error
    for _, old in _checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


class _Writer:
    """Remembers the file's own error: torch turns a full disk into "unexpected pos 704 vs 598"."""

    file: BinaryIO
    error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises what torch raises for a file that is not whole."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def load_latest(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None when there is none.

    An unreadable one is named through `say` and the one before it taken. Raises CheckpointError when none can be read.
    """
    checkpoints = _checkpoints(folder)
    for _, path in reversed(checkpoints):
        try:
            return load(path)
        except Exception as error:
            say(f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); trying the one before it")
    if checkpoints:
        raise CheckpointError(f"no checkpoint in {folder} can be read; remove the folder to train from the start")
    return None
