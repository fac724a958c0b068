"""Write files and folders atomically, read them, and check them for damage.

A file or folder gets its final name only after all its content is on the disk. So a kill, a power cut or a full disk
never leaves a half-written file under that name. The *.tmp files that they leave are removed by the next write.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from relora.common.errors import DamagedFile, first_line

READ_BYTES = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a temporary file to write, which replaces `path` when it is complete and on the disk.

    If writing fails, `path` is unchanged. Raises OSError that names `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        remove_leftovers(path.parent, f"{path.name}.*.tmp")
        with _held(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise naming(error, path) from error
        raise


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which replaces `folder` when all its files are complete and on the disk.

    The caller holds a lock, so that there is one writer at a time. If writing fails before the replacement, `folder`
    is unchanged. Raises OSError.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (found := system_error(error)) is not None:
            raise naming(found, folder) from error
        raise


def publish(temporary: Path, folder: Path) -> None:
    """Replace `folder` by a folder whose files are complete. The caller holds a lock. Raises OSError."""
    for base, _, names in os.walk(temporary):
        for name in names:
            with Path(base, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(base))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    sync_folder(folder.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: at any time it has its old text or the new one. Raises OSError that names the file."""
    with replacing(path) as file:
        file.write(text.encode())


def overwrite(path: Path, text: str) -> None:
    """Write into an existing file, in place. This works on a full disk if the text is no longer than one block.

    An interrupted write damages the file. So use this only for a file whose old text is worth less than that risk.
    Raises OSError that names the file.
    """
    try:
        with path.open("r+b") as file:
            file.write(text.encode())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise naming(error, path) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object atomically. Raises OSError that names the file."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty if there is no file. Raises DamagedFile if the file has no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(path, reason(error)) from error
    if not isinstance(values, dict):
        raise DamagedFile(path, "it is not a JSON object")
    return values


def sha256_of(path: Path, size_bytes: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `size_bytes` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size_bytes is None else size_bytes
        while left > 0 and (piece := file.read(min(READ_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def crc32_of(path: Path) -> str:
    """Return the CRC-32 of a file in eight hexadecimal digits.

    It is fast (more than 1 GB/s) and finds accidental damage, but not a deliberate change.
    """
    found = 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def check_crc32(path: Path, wanted: str, remedy: str = "") -> None:
    """Check a file against the checksum from when it was written.

    Args:
        path: The file.
        wanted: The CRC-32 from when the file was written.
        remedy: The end of the error message: what the user can do.

    Raises:
        DamagedFile: The checksum differs, or the file cannot be read.
    """
    try:
        found = crc32_of(path)
    except OSError as error:
        raise DamagedFile(path, reason(error), remedy) from error
    if found != wanted:
        raise DamagedFile(path, f"its checksum is {found}, but was {wanted} when it was written", remedy)


ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element of each data type of a safetensors file."""


def check_weight_sums(folder: Path) -> None:
    """Compare the weight files of a model with the checksums that its export wrote into relora.json.

    A folder without checksums passes. Raises DamagedFile if a checksum differs.
    """
    sums = read_json(folder / "relora.json").get("crc32", {})
    if not isinstance(sums, dict):
        raise DamagedFile(folder / "relora.json", "its crc32 is not a table of checksums")
    for name, wanted in sums.items():
        check_crc32(folder / name, wanted, "use a copy of the model, or train it again")


def check_weights(folder: Path) -> None:
    """Read every byte of the safetensors files of a model's folder. Raises DamagedFile if one is not complete.

    Files whose checksum is in relora.json must also match it.

    The format: the length of a header in 8 bytes, the header (JSON: name, shape and place of each tensor), the tensors.
    """
    check_weight_sums(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 0 < header_bytes <= size_bytes - 8:
                    raise DamagedFile(path, f"it has {size_bytes} bytes and no valid header")
                header = json.loads(file.read(header_bytes))
                end = 0
                tensors = {name: about for name, about in header.items() if name != "__metadata__"}
                for name, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                    first, last = about["data_offsets"]
                    if first != end or last - first != math.prod(about["shape"]) * ITEM_BYTES[about["dtype"]]:
                        raise DamagedFile(path, f"the bytes of its tensor {name} do not fit the shape")
                    end = last
                if not tensors or size_bytes != 8 + header_bytes + end:
                    raise DamagedFile(path, f"it has {size_bytes} bytes and should have {8 + header_bytes + end}")
                while file.read(READ_BYTES):
                    pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(path, reason(error)) from error


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to *.damaged, so that it is not read again and the user can look at it."""
    aside = path.with_name(path.name + ".damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    return aside


def remove_leftovers(folder: Path, pattern: str = "*.tmp") -> None:
    """Remove half-written files that a killed process left. Files that are being written are locked, and stay."""
    for path in folder.glob(pattern):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is locked while it is written."""
    while True:
        with path.open("wb") as file:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return
            # Another process removed the file as a leftover before it was locked. Try again.


def sync_folder(folder: Path) -> None:
    """Sync the folder to the disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def naming(error: OSError, path: Path) -> OSError:
    """Return the same error with the name of the file. Python's error of a full disk has no file name."""
    if error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror, os.fspath(path))


RUST_ERROR = re.compile(r"\bos error (\d+)\b|\bOs \{ code: (\d+)")
"""The form of a system error in messages of libraries written in Rust (safetensors, tokenizers)."""


def system_error(error: BaseException) -> OSError | None:
    """Return the system error that `error` is or that its message reports; None for any other error."""
    if isinstance(error, OSError):
        return error
    found = RUST_ERROR.search(str(error)) if isinstance(error, Exception) else None
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))


def reason(error: BaseException) -> str:
    """Say on one line why a file cannot be read or written. The message around it names the file."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def is_locked(lock_file: Path) -> bool:
    """Return whether a process holds a lock. A lock file that does not exist is not created."""
    if not lock_file.exists():
        return False
    try:
        with FileLock(lock_file, timeout=0):
            return False
    except Timeout:
        return True


def size_bytes(path: Path) -> int:
    """Return the bytes of a file or of all files in a folder. Links count as links. 0 if missing or not readable."""
    size = 0
    for file in [Path(base, name) for base, _, names in os.walk(path) for name in names] or [path]:
        with suppress(OSError):
            found = file.lstat()
            size += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return size
