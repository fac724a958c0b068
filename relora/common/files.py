"""Files that are whole or not there: how they are written, put in their place, read and checked.

A file, or a folder of files, gets its name only after all of it is on the disk, so that neither a kill nor a power cut
nor a full disk leaves a half-written one under that name. What they leave, *.tmp, is removed by the next write.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from relora.common.errors import DamagedFile, first_line

READ_BYTES = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when it is complete and on the disk.

    Where that fails, `path` is what it was. Raises OSError that names `path`.
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
    """A folder to fill that takes the place of `folder` when all its files are complete and on the disk.

    For one writer at a time, as a lock ensures. Where that fails, `folder` is what it was. Raises OSError.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for base, _, names in os.walk(temporary):
            for name in names:
                with Path(base, name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(base))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (found := system_error(error)) is not None:
            raise naming(found, folder) from error
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file that holds its old text or the new one at any time. Raises OSError that names it."""
    with replacing(path) as file:
        file.write(text.encode())


def overwrite(path: Path, text: str) -> None:
    """Write into a file that is there, which a full disk still takes where the text is no longer than a block.

    Cut short it is damaged: for a file that is worth less as it is. Raises OSError that names it.
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
    """Write an object; the file is whole at any time. Raises OSError that names it."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file. Raises DamagedFile for a file that holds none."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(path, reason(error)) from error
    if not isinstance(values, dict):
        raise DamagedFile(path, "it holds no JSON object")
    return values


def sha256_of(path: Path, size_bytes: int | None = None) -> str:
    """The digest of a file, or of its first `size_bytes`, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size_bytes is None else size_bytes
        while left > 0 and (piece := file.read(min(READ_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def crc32_of(path: Path) -> str:
    """The checksum of a file, in eight hexadecimal digits: for damage, at more than 1 GB/s, not for malice."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def check_crc32(path: Path, wanted: str, remedy: str = "") -> None:
    """Raise DamagedFile where a file has another checksum than when it was written, or cannot be read."""
    try:
        found = crc32_of(path)
    except OSError as error:
        raise DamagedFile(path, reason(error), remedy) from error
    if found != wanted:
        raise DamagedFile(path, f"its checksum is {found}, when it was written it was {wanted}", remedy)


ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Of the element types of a safetensors file."""


def check_weight_sums(folder: Path) -> None:
    """Compare a model's weights with the checksums that its export left in relora.json; a folder may have none.

    Raises DamagedFile.
    """
    sums = read_json(folder / "relora.json").get("crc32", {})
    if not isinstance(sums, dict):
        raise DamagedFile(folder / "relora.json", "its crc32 holds no checksums")
    for name, wanted in sums.items():
        check_crc32(folder / name, wanted, "take a copy of the model, or train it again")


def check_weights(folder: Path) -> None:
    """Read the safetensors files of a model's folder, every byte. Raises DamagedFile where one is not whole.

    Each is to have the checksum of its export, where the folder tells it.

    The format: the length of a header in 8 bytes, the header (JSON: name, shape and place of each tensor), the tensors.
    """
    check_weight_sums(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                header_bytes = int.from_bytes(file.read(8), "little")
                if not 0 < header_bytes <= size_bytes - 8:
                    raise DamagedFile(path, f"it has {size_bytes} bytes and no header")
                header = json.loads(file.read(header_bytes))
                end = 0
                tensors = {name: about for name, about in header.items() if name != "__metadata__"}
                for name, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                    first, last = about["data_offsets"]
                    if first != end or last - first != math.prod(about["shape"]) * ITEM_BYTES[about["dtype"]]:
                        raise DamagedFile(path, f"its tensor {name} has not the bytes of its shape")
                    end = last
                if not tensors or size_bytes != 8 + header_bytes + end:
                    raise DamagedFile(path, f"it has {size_bytes} bytes and should have {8 + header_bytes + end}")
                while file.read(READ_BYTES):
                    pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(path, reason(error)) from error


def set_aside(path: Path) -> Path:
    """Rename what cannot be read to *.damaged, where it disturbs nothing and a person can look at it."""
    aside = path.with_name(path.name + ".damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    return aside


def remove_leftovers(folder: Path, pattern: str = "*.tmp") -> None:
    """Remove the files that a killed process has left half-written; those that are being written are locked."""
    for path in folder.glob(pattern):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """A new file, locked while it is written."""
    while True:
        with path.open("wb") as file:
            with suppress(OSError):  # some file systems know no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return
            # Another process took it for a leftover before it was locked.


def sync_folder(folder: Path) -> None:
    """Make a rename inside it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def naming(error: OSError, path: Path) -> OSError:
    """The same error, with the file that it happened to; a full disk alone names none."""
    if error.errno is None or error.filename is not None:
        return error
    return OSError(error.errno, error.strerror, os.fspath(path))


RUST_ERROR = re.compile(r"\bos error (\d+)\b|\bOs \{ code: (\d+)")
"""How a library that is written in Rust (safetensors, tokenizers) tells an error of the system."""


def system_error(error: BaseException) -> OSError | None:
    """The error of the system that `error` is, or that its text tells; None where it is none."""
    if isinstance(error, OSError):
        return error
    found = RUST_ERROR.search(str(error)) if isinstance(error, Exception) else None
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))


def reason(error: BaseException) -> str:
    """Why a file cannot be read or written, in one line, for a message that names the file."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
