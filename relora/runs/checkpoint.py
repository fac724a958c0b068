"""Checkpoints: one file per step, written atomically, with a checksum. A run resumes from the newest undamaged one.

torch is imported only to write and to read a file, so that the progress of a run can be read without torch.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from relora.common.errors import RunError
from relora.common.files import reason, remove_leftovers, replacing, set_aside, sha256_of
from relora.config.plan import KEPT_CHECKPOINTS

KEPT = KEPT_CHECKPOINTS
"""Checkpoints that are kept: the newest, and an older one for the case that the newest is damaged."""

FOOTER = re.compile(rb"\nrelora sha256 ([0-9a-f]{64})\n")
"""The end of a checkpoint: the digest of all bytes before it. torch ignores it when it reads the archive."""
FOOTER_BYTES = 80
ARCHIVE_END = re.compile(rb"PK\x05\x06.{18}", re.DOTALL)
"""The end of an old checkpoint, which has no checksum."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of every complete checkpoint, oldest first. Unfinished files have a different name."""
    found = ((re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in folder.glob("step-*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def path_of(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint that is written before optimizer step `step`."""
    return folder / f"step-{step:08d}.pt"


def latest_step(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint, or None if there is none."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1][0] if checkpoints else None


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`, and delete all except the newest `KEPT` checkpoints up to `step`.

    Checkpoints of later steps are deleted too, because a run that is at `step` could not read them. The file gets its
    final name only when it is complete and on the disk.

    Returns:
        The file.

    Raises:
        CheckpointError: The file cannot be written, for example because the disk is full. Earlier checkpoints are
            unchanged then.
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
    """Write to a file, compute the digest of the written bytes, and keep the error of the file.

    The error is kept because torch reports a full disk as "unexpected pos 704 vs 598".
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
    """Load onto the CPU what `save` wrote. Raises CheckpointError if any bit of the file has changed since."""
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
    """Raise CheckpointError if the file is damaged."""
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
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")


def load_latest(folder: Path, log_line: Callable[[str], None]) -> dict[str, Any] | None:
    """Load the newest undamaged checkpoint onto the CPU; None if there are no checkpoints.

    Each damaged checkpoint is reported through `log_line`, and the one before it is tried. Raises CheckpointError if
    all checkpoints are damaged.
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
