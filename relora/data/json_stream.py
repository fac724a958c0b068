"""Records of JSON files here or at an address, one after the other, with a state from which reading can go on.

Only the text field of a record matters. `datasets` gives each field one type for all files, and fails where a later
record has another type.
"""

import itertools
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from relora.common.files import reason
from relora.config.sources import kind_of
from relora.data.decoding import CorpusError, Tally, Unfinished
from relora.data.readers import json_records

KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class NamedFile:
    """A file on this machine, or at an address that fsspec can open: https://..., hf://..."""

    def __init__(self, name: str) -> None:
        """Remember the path or address. Nothing is opened."""
        self.name = name
        self._opened: BinaryIO | None = None
        self._size_bytes: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        """The last ending of the name."""
        return PurePosixPath(self.name.partition("?")[0]).suffix

    def open(self, mode: str) -> BinaryIO:
        """Open the file. Errors are those of fsspec and of the HTTP library."""
        if "://" in self.name:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(self.name)
            opened: Any = system.open(path, mode)
            self._size_bytes = getattr(opened, "size", None)
        else:
            opened = Path(self.name).open(mode)  # noqa: SIM115 -- the caller closes it
            self._size_bytes = Path(self.name).stat().st_size
        self._opened = opened
        return opened

    @property
    def share_read(self) -> float:
        """The share of the bytes that are read. 0 if the size is unknown."""
        if self._opened is None or self._opened.closed or not self._size_bytes:
            return 0.0
        return min(1.0, self._opened.tell() / self._size_bytes)


def is_json(names: Sequence[str]) -> bool:
    """Return whether there are files and all are JSON by the endings of their names. Those in archives do not count."""
    return bool(names) and all(
        "::" not in name and kind_of(Path(name.partition("?")[0]), KINDS) is not None for name in names
    )


class JsonStream:
    """Iterates over the records of files. It has the methods of a stream of `datasets` that relora.data.hub uses."""

    def __init__(self, names: Sequence[str], tally: Tally) -> None:
        """Remember the files. Nothing is opened.

        Args:
            names: Paths and addresses.
            tally: Gets the counts of each file when it is read to its end.
        """
        self._files = [NamedFile(name) for name in names]
        self._tally = tally
        self._file = self._record = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the next record."""
        name = str(self._files[self._file]) if self._file < len(self._files) else ""
        return {"file": self._file, "name": name, "record": self._record}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a place.

        Raises:
            CorpusError: The state is that of an earlier version of relora.
            Unfinished: The files are others than before.
        """
        if "record" not in state:
            raise CorpusError(
                "this preparation was begun by an earlier version of relora, and cannot go on; the same command begins "
                "anew"
            )
        self._file, self._record = state["file"], state["record"]
        if self.state_dict()["name"] != state["name"]:
            raise Unfinished(
                f"the preparation stopped in {state['name']}, and the dataset has other files now; bring them back, or "
                "remove the .partial folder of the corpus to begin anew"
            )

    @property
    def share_read(self) -> float:
        """The share of the files, and of the bytes of the current one, that are read."""
        if self._file == len(self._files):
            return 1.0
        return (self._file + self._files[self._file].share_read) / len(self._files)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the records from the place on.

        Raises:
            CorpusError: The file is no JSON.
            OSError: The file cannot be read, or is cut.
            Exception: Errors of the HTTP library.
        """
        while self._file < len(self._files):
            # A file that is opened again is read from its beginning, so its counts begin there too.
            own, number = Tally(), self._file
            file = self._files[number]
            try:
                records = itertools.islice(json_records(file, own), self._record, None)
                ahead = next(records, None)
                # One record is read ahead, so that the place after the last record is the next file.
                while ahead is not None:
                    (_, record), ahead = ahead, next(records, None)
                    self._file, self._record = (number, self._record + 1) if ahead is not None else (number + 1, 0)
                    yield record
                if self._file == number:  # no record was left in it
                    self._file, self._record = number + 1, 0
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise OSError(f"{file}: {reason(error)}") from error
            except GeneratorExit:
                self._count(own)
                raise
            self._count(own)

    def _count(self, own: Tally) -> None:
        for name, count in asdict(own).items():
            setattr(self._tally, name, getattr(self._tally, name) + count)
