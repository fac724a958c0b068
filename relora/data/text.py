"""Documents in files of this machine: the standard library, or what data.path names."""

import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from relora.common.errors import ConfigError
from relora.common.files import sha256_of
from relora.common.tables import in_units
from relora.config.data import DataConfig, FilesConfig, TextConfig
from relora.config.sources import KINDS, Survey, check_path
from relora.data.decoding import CorpusError, Tally
from relora.data.readers import read_documents
from relora.data.source import SPLITS, Document, Source

STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class FilesSource(Source):
    """Documents in files. A text file is one document, and so is each record of the other kinds."""

    def __init__(self, config: DataConfig, files: dict[str, list[Path]]) -> None:
        self.config, self.files = config, files
        self._stats = self._stats_now()

    def _stats_now(self) -> dict[str, list[tuple[str, int, int]]]:
        """The path, size and time of each file."""
        try:
            stats = {part: [(path, path.stat()) for path in self.files[part]] for part in self.parts}
        except OSError as error:
            raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from error
        return {
            part: [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found] for part, found in stats.items()
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """The splits that have files."""
        return tuple(split for split in SPLITS if self.files.get(split))

    @property
    def identity(self) -> Any:
        """The path, size and time of each file."""
        return self._stats

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for stats in self._stats.values() for _, size, _ in stats)

    def described(self) -> str:
        """Describe how many files are read."""
        counts = {part: len(files) for part, files in self.files.items()}
        return f"{sum(counts.values())} files, {in_units(self.size_bytes)}"

    def documents(self, part: str, tally: Tally, cursor: Any = None) -> Iterator[Document]:
        """Yield the documents of all files of a part. The number of a file is a cursor."""
        for number in range(cursor or 0, len(self.files[part])):
            is_first, counts = True, asdict(tally)
            for chunks in read_documents(self.files[part][number], self.config.text_field, tally):
                yield Document(chunks=chunks, cursor=number, counts=counts) if is_first else Document(chunks=chunks)
                is_first = False

    def check_unchanged(self) -> None:
        """Raise CorpusError if the size or time of a file changed."""
        now = self._stats_now()
        for part, before in self._stats.items():
            for (path, *old), (_, *new) in zip(before, now[part], strict=True):
                if old != new:
                    raise CorpusError(f"{path} changed while it was read; prepare the corpus again when it is complete")

    def provenance(self) -> dict[str, Any]:
        """List all files, with the digests of their bytes."""
        return {
            "files": [
                {"part": part, "path": str(path), "size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for part in self.parts
                for path in self.files[part]
            ]
        }


class StdlibSource(FilesSource):
    """The sources of the Python standard library."""

    def __init__(self, config: DataConfig) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        files: list[Path] = []
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in STDLIB_EXCLUDED]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        if not files:
            raise CorpusError(f"the standard library in {root} has no source files; use data=text data.path=...")
        super().__init__(config, {"train": sorted(files)})

    def provenance(self) -> dict[str, Any]:
        """Name the version of Python, and list all files with the digests of their bytes."""
        return {"python": platform.python_version(), **super().provenance()}


class TextSource(FilesSource):
    """The files of data.path, data.validation_path and data.test_path."""

    def __init__(self, config: TextConfig) -> None:
        self._surveys, files = own_files(config, KINDS)
        super().__init__(config, files)

    def described(self) -> str:
        """Describe which files are read for which split, and which are left out."""
        texts = {part: survey.described() for part, survey in self._surveys.items()}
        if len(texts) > 1:
            return "; ".join(f"{part}: {text}" for part, text in texts.items())
        own = [f"{len(self.files[part])} for {part}" for part in self.parts] if len(self.parts) > 1 else []
        return "; ".join([texts["train"], *([f"by their names, {', '.join(own)}"] if own else [])])


def own_files(config: FilesConfig, kinds: dict[str, str]) -> tuple[dict[str, Survey], dict[str, list[Path]]]:
    """Return what is read and left out for each path of the config, and the files of each split.

    Raises CorpusError if a path has no files.
    """
    surveys: dict[str, Survey] = {}
    for part, key in (("train", "path"), ("validation", "validation_path"), ("test", "test_path")):
        path = getattr(config, key)
        if path is not None:
            try:
                surveys[part] = check_path(Path(path), f"data.{key}", kinds)
            except ConfigError as error:
                raise CorpusError(str(error)) from error
            except OSError as error:
                raise CorpusError(f"{error.filename or path} of data.{key} cannot be read: {error.strerror}") from error
    try:
        files = surveys["train"].by_split("data.path")
    except ConfigError as error:
        raise CorpusError(str(error)) from error
    held_out = {part: found.read for part, found in surveys.items() if part != "train"}
    own = {path.resolve() for paths in held_out.values() for path in paths}
    files = {part: [path for path in paths if path.resolve() not in own] for part, paths in files.items()} | held_out
    if not files["train"]:
        raise CorpusError(f"data.path={config.path} has only held-out files; leave some text for training")
    return surveys, files
