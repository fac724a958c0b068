"""Checkpoints: one file a step, written whole or not at all, with a checksum; the newest undamaged one wins.

Loads torch only to write and to read: who asks how far a run is needs none.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from relora.common.errors import RunError
from relora.common.files import reason, remove_leftovers, replacing, set_aside, sha256_of

KEPT = 2
"""The newest, and one to fall back on should its disk lie."""

FOOTER = re.compile(rb"\nrelora sha256 ([0-9a-f]{64})\n")
"""Ends a checkpoint: the digest of all bytes before it. torch reads the archive before it as if it were not there."""
FOOTER_BYTES = 80
ARCHIVE_END = re.compile(rb"PK\x05\x06.{18}", re.DOTALL)
"""Ends a checkpoint from before checksums were written."""


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
    """Write `state` as the checkpoint of `step` and drop all but the newest `KEPT` up to it.

    Those of later steps go too: a run that is at `step` could not read them. The file appears under its name only
    after it is complete and on the disk. Raises CheckpointError when it cannot be written (a full disk, say); earlier
    checkpoints are untouched then.
    """
    import torch

    path = path_of(folder, step)
    writer = _Writer()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if path.is_dir():
            set_aside(path)
        with replacing(path) as file:
            writer.file = file
            torch.save(state, cast(BinaryIO, writer))
            file.write(b"\nrelora sha256 " + writer.digest.hexdigest().encode() + b"\n")
    except (OSError, RuntimeError) as error:
        why = reason(writer.error or error)
        raise CheckpointError(f"checkpoint of step {step} could not be written to {folder}: {why}") from error
    checkpoints = _checkpoints(folder)
    kept = [other for other, _ in checkpoints if other <= step][-KEPT:]
    for other, old in checkpoints:
        if other not in kept and old.is_dir():
            set_aside(old)
        elif other not in kept:
            old.unlink(missing_ok=True)
    return path


class _Writer:
    """Digests what it writes, and remembers the file's own error.

    torch turns a full disk into "unexpected pos 704 vs 598".
    """

    file: BinaryIO
    error: OSError | None = None

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises CheckpointError for a file that is not, to the bit, what was written."""
    import torch

    try:
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # torch raises many kinds
        if "allocate memory" in str(error):
            raise
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def _verify(path: Path) -> None:
    """Raise CheckpointError where the file is damaged."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if not size_bytes:
            raise CheckpointError(f"{path} is empty")
        file.seek(max(0, size_bytes - FOOTER_BYTES))
        tail = file.read()
    footer = FOOTER.fullmatch(tail)
    if footer is None and not ARCHIVE_END.fullmatch(tail[-22:]):
        raise CheckpointError(f"{path} is damaged: its end is missing")
    if footer is not None and sha256_of(path, size_bytes - FOOTER_BYTES) != footer[1].decode():
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content")


def load_latest(folder: Path, log_line: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that is undamaged, on the CPU; None when there is none.

    A damaged one is named through `say` and the one before it taken. Raises CheckpointError when all are damaged.
    """
    checkpoints = _checkpoints(folder)
    for _, path in reversed(checkpoints):
        try:
            return load(path)
        except CheckpointError as error:
            log_line(f"checkpoint {error}; trying the one before it")
    if checkpoints:
        raise CheckpointError(f"no checkpoint in {folder} can be read; remove the folder to train from the start")
    return None
