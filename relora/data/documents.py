"""The text of a corpus: its files, its documents, and which of them are held out. Imports datasets."""

import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from relora.common.errors import RunError
from relora.config.groups import RECORD_SUFFIXES, DataConfig, text_files, tokenizer_file

FORMAT = 2
"""Of a prepared corpus. A new format has another fingerprint."""
FEW_DOCUMENTS = 100
"""Below this many documents, documents are split by pieces, or the held-out sets would be one document or none."""
LONGEST_LINE_PIECES = 4
"""A line longer than this many pieces is cut inside."""
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class CorpusError(RunError):
    """The text cannot be read or is too little."""


def source_files(config: DataConfig) -> list[Path]:
    """The files that the text is read from, sorted. Raises CorpusError where there are none."""
    if config.name == "text":
        assert config.path is not None
        files = text_files(Path(config.path))
        if not files:
            raise CorpusError(f"data.path={config.path} holds no text any more")
        return files
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise CorpusError(f"the standard library in {root} has no sources; use data=text data.path=...")
    return files


def fingerprint(config: DataConfig, files: list[Path]) -> str:
    """Finds a prepared corpus without reading the text: settings, and each file's path, size and time."""
    settings = {key: value for key, value in asdict(config).items() if key != "sequence_length_tokens"}
    tokenizer = tokenizer_file(config.tokenizer).read_bytes() if config.tokenizer else b""
    stats = ((path, path.stat()) for path in files)
    listing = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = json.dumps([FORMAT, settings, listing, hashlib.sha256(tokenizer).hexdigest()])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def read_documents(files: list[Path], text_field: str) -> Iterator[str]:
    """Every non-empty document: a text file is one, a jsonl or parquet file has one a record."""
    for path in files:
        if path.suffix in RECORD_SUFFIXES:
            yield from filter(None, _records(path, text_field))
        elif text := path.read_bytes().decode("utf-8", errors="replace"):  # read_text would change line ends
            yield text


def _records(path: Path, text_field: str) -> Iterator[str]:
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    if kind == "json" and _is_blank(path):
        return
    number = 0
    try:
        for number, record in enumerate(
            load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True), start=1
        ):
            text = record.get(text_field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"{path}, record {number}: field {text_field!r} holds no text; the record has "
                    f"{', '.join(record)}; set data.text_field"
                )
            yield text
    except CorpusError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds
        raise CorpusError(f"{path} cannot be read as {kind} after record {number}: {error}") from error


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(line.strip() for line in file)


def cut(document: str, piece_characters: int | None) -> Iterator[str]:
    """The document whole, or cut at line ends into pieces of at least `piece_characters`; longer lines are cut too."""
    if piece_characters is None:
        yield document
        return
    parts: list[str] = []
    length = 0
    for line in document.splitlines(keepends=True):
        for start in range(0, len(line), LONGEST_LINE_PIECES * piece_characters):
            part = line[start : start + LONGEST_LINE_PIECES * piece_characters]
            parts.append(part)
            length += len(part)
            if length >= piece_characters:
                yield "".join(parts)
                parts, length = [], 0
    if parts:
        yield "".join(parts)


def digest_of(piece: str) -> bytes:
    """12 bytes that identify a piece of text."""
    return hashlib.blake2b(piece.encode("utf-8", "replace"), digest_size=12).digest()


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How the text is split."""

    piece_characters: int | None
    held_out: dict[bytes, str]
    """Digest of a piece -> "validation" or "test"; the rest is for training."""

    def assign(self, files: list[Path], text_field: str) -> Iterator[tuple[str, str, bool]]:
        """(split, piece, whether a document ends here) of the whole corpus, in its own order."""
        for document in read_documents(files, text_field):
            pieces = list(cut(document, self.piece_characters))
            for number, piece in enumerate(pieces, start=1):
                yield self.held_out.get(digest_of(piece), "train"), piece, number == len(pieces)


def split_documents(config: DataConfig, files: list[Path]) -> Splits:
    """Split by document: in the order of their digests, documents fill validation, then test, up to their shares.

    Equal documents have equal digests, so none stands on both sides, and all of them count; adding a document moves
    few others.
    """
    sizes: Counter[bytes] = Counter()
    documents = total_characters = 0
    for document in read_documents(files, config.text_field):
        sizes[digest_of(document)] += len(document)
        documents += 1
        total_characters += len(document)
    piece_characters = None
    if documents < FEW_DOCUMENTS:
        piece_characters = max(256, total_characters // 2000)
        sizes = Counter()
        for document in read_documents(files, config.text_field):
            for piece in cut(document, piece_characters):
                sizes[digest_of(piece)] += len(piece)
    held_out: dict[bytes, str] = {}
    order = sorted(sizes)
    for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        room = target = share * total_characters
        for key in order:
            if key not in held_out and sizes[key] <= room:
                held_out[key] = split
                room -= sizes[key]
            if room < 0.02 * target:
                break
        if room == target:
            raise CorpusError(
                f"{documents} documents of {total_characters} characters leave none for {split} at "
                f"data.{split}_fraction={share}; take more text or a larger fraction"
            )
    return Splits(piece_characters=piece_characters, held_out=held_out)
