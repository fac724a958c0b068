"""The files of `data.path`: which are read as text, and which are left out for what reason. Reads no text."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from relora.common.errors import ConfigError, shown
from relora.common.tables import in_units

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""How the files with each ending are read."""
COMPRESSIONS = (".gz", ".xz", ".zst")
NOT_COMPRESSED = ("parquet", "arrow", "raw", "numpy")
"""Kinds that are not read with one of COMPRESSIONS: they compress their own content, or are mapped into memory."""
TOKEN_KINDS = {".bin": "raw", ".npy": "numpy", ".parquet": "parquet", ".arrow": "arrow"}
"""How files with token ids are read."""
MEDIA = (
    *(
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".webp",
        ".svg",
        ".ico",
        ".bmp",
        ".tif",
        ".tiff",
        ".mp3",
        ".wav",
        ".flac",
        ".ogg",
    ),
    *(".mp4", ".mov", ".webm", ".ttf", ".otf", ".woff", ".woff2"),
)
"""Files that hold no text. A folder may have any amount of them."""
ABOUT_THE_DATA = (
    "readme",
    "license",
    "licence",
    "copying",
    "notice",
    "authors",
    "changelog",
    "citation",
    "contributing",
)
"""Names of files beside records that describe the records, as the card of a dataset does."""
FIRST_BYTES, LONGEST_FIRST_LINE_BYTES = 4096, 1 << 20
"""What is read of a .json file that begins like an array, and of others, to know whether it holds records."""
ABOUT = "describes the data"
"""The reason for leaving them out."""
NAMES_SHOWN = 4
NAMED_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
"""Names of files and folders -> the split that they hold."""
UNNAMED_KINDS = (".py", ".md")
"""Files of programs and documentation are called train, test or dev for other reasons."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file that is not read."""

    path: Path
    reason: str
    size_bytes: int
    may_hold_text: bool = True


@dataclass(kw_only=True)
class Survey:
    """All files of a data.path."""

    root: Path
    """The data.path itself."""
    read: list[Path] = field(default_factory=list)
    """Sorted by path."""
    read_bytes: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    def by_split(self, key: str) -> dict[str, list[Path]]:
        """Return split -> files, if the files are named after splits. Otherwise all files are for training.

        A name has a split's name as a word, as in c4-train.00001.json.gz or val/a.txt. If at least one file is for
        training and one is held out, then files without a split's name are left out. If no file is named for training,
        then only files and folders whose whole name is that of a split are held out: val.txt, but not my_test.txt.

        Args:
            key: The config key of `root`, for messages.

        Raises:
            ConfigError: Most bytes are left out.
        """
        named = self._grouped(_split_named)
        if "train" in named and named.keys() & {"validation", "test"}:
            for path in named.pop("", []):
                size_bytes = path.stat().st_size
                self.left_out.append(LeftOut(path=path, reason="not named after a split", size_bytes=size_bytes))
                self.read_bytes -= size_bytes
            self.read = sorted(path for files in named.values() for path in files)
            self.check_left_out(key)
            return named
        named = self._grouped(_split_exactly_named)
        train = sorted(named.pop("", []) + named.pop("train", []))
        return {"train": train, **named} if train else {"train": self.read}

    def _grouped(self, split_of: Callable[[Path, Path], str]) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in self.read:
            found.setdefault(split_of(path, self.root), []).append(path)
        return found

    def check_left_out(self, key: str) -> None:
        """Raise ConfigError if more bytes are left out than read. `key` is the config key of `root`."""
        if self.missed_bytes > self.read_bytes:
            raise ConfigError(
                f"{key}={shown(self.root, 200)} has {in_units(self.read_bytes)} that relora can read, and "
                f"{in_units(self.missed_bytes)} of other files; {self.left_out_described()}; move or convert them, or "
                "name a folder or file with only the text"
            )

    @property
    def missed_bytes(self) -> int:
        """Bytes of the files that are left out although they may hold text."""
        return sum(each.size_bytes for each in self.left_out if each.may_hold_text)

    def described(self) -> str:
        """Describe on one line how many files of each kind are read, and which are left out."""
        kinds = Counter("".join(path.suffixes[-1 - is_compressed(path) :]) for path in self.read)
        text = f"{', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}, {in_units(self.read_bytes)}"
        return f"{text}; {self.left_out_described()}" if self.left_out else text

    def left_out_described(self) -> str:
        """Describe on one line which files are left out and why, the largest first."""
        largest = sorted(self.left_out, key=lambda each: (-each.size_bytes, each.path))
        names = [f"{each.path.name} ({each.reason}, {in_units(each.size_bytes)})" for each in largest[:NAMES_SHOWN]]
        more = [f"{len(largest) - NAMES_SHOWN} more"] if len(largest) > NAMES_SHOWN else []
        return f"left out: {', '.join([*names, *more])}"


def _split_named(path: Path, root: Path) -> str:
    """Return the split that a file is named after; empty if there is none."""
    if path.name.endswith(UNNAMED_KINDS):
        return ""
    words = re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower())
    return next((NAMED_SPLITS[word] for word in words if word in NAMED_SPLITS), "")


def _split_exactly_named(path: Path, root: Path) -> str:
    """Return the split that is the whole name of a file, without its endings, or of a folder; empty if none is."""
    if path.name.endswith(UNNAMED_KINDS):
        return ""
    *folders, name = path.relative_to(root).as_posix().lower().split("/")
    return next((NAMED_SPLITS[each] for each in (*folders, name.partition(".")[0]) if each in NAMED_SPLITS), "")


def kind_of(path: Path, kinds: Mapping[str, str] = KINDS) -> str | None:
    """Return how a file is read, by its endings. None if it is not read."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        return kinds.get(suffix)
    kind = kinds.get(Path(path.stem).suffix.lower())
    return None if kind in NOT_COMPRESSED else kind


def is_compressed(path: Path) -> bool:
    """Return whether the last ending of a file is one of COMPRESSIONS."""
    return path.suffix.lower() in COMPRESSIONS


def survey(path: Path, kinds: Mapping[str, str] = KINDS) -> Survey:
    """List the files below a folder, or the one file, without reading their text.

    Linked folders are followed, each folder once. Files and folders whose names begin with a dot are not listed, and
    neither is a runs_dir with a prepared corpus.

    Raises:
        OSError: A folder cannot be listed.
    """
    if path.is_file():
        kind = kind_of(path, kinds)
        if kind is None:
            return Survey(
                root=path, left_out=[LeftOut(path=path, reason="unknown kind", size_bytes=path.stat().st_size)]
            )
        return Survey(root=path, read=[path], read_bytes=path.stat().st_size)
    found = Survey(root=path)
    files = sorted(_files(path))
    has_records = any(kind_of(file, kinds) not in (None, "text") for file in files)
    for file in files:
        try:
            size_bytes = file.stat().st_size
        except OSError:
            found.left_out.append(LeftOut(path=file, reason="a link to nothing", size_bytes=0))
            continue
        reason = _why_left_out(file, kinds, has_records=has_records)
        if reason is None:
            found.read.append(file)
            found.read_bytes += size_bytes
        else:
            may = reason != ABOUT and file.suffix.lower() not in MEDIA
            found.left_out.append(LeftOut(path=file, reason=reason, size_bytes=size_bytes, may_hold_text=may))
    return found


def _why_left_out(file: Path, kinds: Mapping[str, str], *, has_records: bool) -> str | None:
    kind = kind_of(file, kinds)
    if kind is None:
        return "unknown kind"
    if not file.is_file():
        return "no regular file"
    if has_records and kind == "text" and file.stem.lower() in ABOUT_THE_DATA:
        return ABOUT
    if kind == "json" and not is_compressed(file) and not _holds_records(file):
        return "no JSON records"
    return None


def _holds_records(file: Path) -> bool:
    """Return whether a .json file begins like an array, or like lines with one record each, and not like settings."""
    with file.open("rb") as opened:
        start = opened.read(FIRST_BYTES)
        if not start.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0").startswith(b"["):  # the first line may be long
            start += opened.read(LONGEST_FIRST_LINE_BYTES - FIRST_BYTES)
    is_cut = len(start) == LONGEST_FIRST_LINE_BYTES
    text = start.decode(json.detect_encoding(start), "replace").lstrip("\ufeff \t\r\n")
    first, end, more = text.partition("\n")
    if text.startswith("[") or not end:
        return text.startswith(("[", '{"') if is_cut else "[")
    try:
        return isinstance(json.loads(first), dict) and more.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def _files(root: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=stop):
        own = os.path.realpath(folder)
        if own in seen:
            below.clear()
            continue
        seen.add(own)
        below[:] = sorted(name for name in below if not name.startswith(".") and not _holds_runs(Path(folder, name)))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _holds_runs(folder: Path) -> bool:
    """Return whether a folder is a runs_dir. Its files must not become text, or each launch would change the text."""
    corpora = folder / "corpora"
    return any(next(corpora.glob(each), None) is not None for each in ("*/meta.json", "*-*.lock"))


def check_path(path: Path, key: str = "data.path", kinds: Mapping[str, str] = KINDS) -> Survey:
    """Survey the file or folder of a key. Raises ConfigError if nothing can be read, or if most bytes are left out."""
    if not path.exists():
        raise ConfigError(f"{key}={shown(path, 200)} does not exist")
    found = survey(path, kinds)
    if not found.read:
        readable = ", ".join(kinds)
        if kinds is KINDS:
            readable += f", each except .parquet and .arrow also with {', '.join(COMPRESSIONS)}"
        left_out = f"; {found.left_out_described()}" if found.left_out else ""
        wanted = "text" if kinds is KINDS else "token ids"
        raise ConfigError(
            f"{key}={shown(path, 200)} contains no {wanted}; relora reads files that end in {readable}{left_out}"
        )
    found.check_left_out(key)
    return found
