"""The text of a corpus: its files, and which documents are held out."""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from relora.common.errors import ConfigError
from relora.config.data import SEQUENCE_KEYS, DataConfig, tokenizer_file
from relora.config.sources import check_path
from relora.data.readers import CorpusError, Tally, read_documents

FORMAT = 4
"""The format of a prepared corpus. It is part of the fingerprint."""
FEW_DOCUMENTS = 100
"""With fewer documents, pieces are held out instead. Otherwise a held-out set would have one document or none."""
LONGEST_LINE_PIECES = 4
"""A line longer than this many pieces is cut within the line."""
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def source_files(config: DataConfig) -> list[Path]:
    """The sorted files that hold the text. Raises CorpusError if there are none."""
    if config.name == "text":
        assert config.path is not None
        try:
            return check_path(Path(config.path)).read
        except ConfigError as error:
            raise CorpusError(str(error)) from error
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise CorpusError(f"the standard library in {root} has no source files; use data=text data.path=...")
    return files


def fingerprint(config: DataConfig, files: list[Path]) -> str:
    """A digest of settings, tokenizer, and each file's path, size and time. It finds a corpus without reading text."""
    settings = {key: value for key, value in asdict(config).items() if key not in SEQUENCE_KEYS}
    tokenizer = b""
    if config.tokenizer:
        file = tokenizer_file(config.tokenizer)
        beside = file.with_name("tokenizer_config.json")  # names the end-of-text token
        tokenizer = file.read_bytes() + (beside.read_bytes() if beside.exists() else b"")
    stats = ((path, path.stat()) for path in files)
    listing = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = json.dumps([FORMAT, settings, listing, hashlib.sha256(tokenizer).hexdigest()])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def cut(document: str, piece_characters: int | None) -> Iterator[str]:
    """Cut a document at line ends into pieces of at least `piece_characters`. The last piece may be shorter.

    A line longer than LONGEST_LINE_PIECES pieces is cut too. With None, the document is one piece.
    """
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
    """The assignment of the text to the splits."""

    piece_characters: int | None
    held_out: dict[bytes, str]
    """Digest of a piece -> "validation" or "test". All other pieces are for training."""

    def assign(self, files: list[Path], text_field: str) -> Iterator[tuple[str, str, bool]]:
        """Yield (split, piece, whether a document ends here) for the whole text, in the order of the files."""
        for document in read_documents(files, text_field):
            pieces = list(cut(document, self.piece_characters))
            for number, piece in enumerate(pieces, start=1):
                yield self.held_out.get(digest_of(piece), "train"), piece, number == len(pieces)


def split_documents(config: DataConfig, files: list[Path], tally: Tally) -> Splits:
    """Split the text by document. In the order of their digests, documents fill validation, then test.

    Each held-out split is filled up to its share of the characters. Equal documents have equal digests, so they are all
    in the same split, and each of them counts. A new document moves only few other documents to another split. With
    fewer than FEW_DOCUMENTS documents, pieces are split instead.

    Args:
        config: The splits' shares and the text field.
        files: The files of the text.
        tally: Gets the counts of what reading changed or left out.

    Raises:
        CorpusError: No document fits into a held-out split.
    """
    sizes: Counter[bytes] = Counter()
    documents = total_characters = 0
    for document in read_documents(files, config.text_field, tally):
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
                f"data.{split}_fraction={share}; use more text or a larger fraction"
            )
    return Splits(piece_characters=piece_characters, held_out=held_out)
