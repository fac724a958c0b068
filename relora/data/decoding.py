"""Open files, compressed or not, and turn their bytes into characters, a chunk at a time. Imports pyarrow, for zst."""

import codecs
import gzip
import io
import lzma
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

from relora.common.errors import RunError

MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
"""Byte-order marks. The mark of UTF-32 begins with that of UTF-16, so it comes first."""
MOST_UNDECODABLE_SHARE = 0.002
"""More bytes than this share that are not UTF-8 mean another encoding. Latin-1 text in German has ten times as many."""
FEW_UNDECODABLE_BYTES = 8
"""So many are always replaced. A short file with one wrong byte is no other encoding."""
MOST_NUL_SHARE = 0.01
CHUNK_BYTES = 1 << 20
LONGEST_RECORD = 1 << 28
"""Characters of a record. A longer one would take gigabytes of memory, and is rather a file of another kind."""


class Readable(Protocol):
    """A file on this machine (a Path) or elsewhere. `str` of it names it for messages."""

    @property
    def suffix(self) -> str:
        """The last ending of the name."""
        ...

    def open(self, mode: str, /) -> Any:
        """Open the file."""
        ...


class CorpusError(RunError):
    """The text of a corpus cannot be read, or there is too little of it."""


class Unfinished(CorpusError):  # noqa: N818 -- says what the corpus is
    """The preparation stopped, and can go on from its last state."""


@dataclass(kw_only=True)
class Tally:
    """Counts of what reading the text has changed or left out."""

    records: int = 0
    without_text: int = 0
    """Records with no text field, with null, or with an empty text."""
    null: int = 0
    """Those of `without_text` whose text is missing or null."""
    replaced_bytes: int = 0
    """Bytes that are not valid in the encoding of their file. Each becomes U+FFFD."""
    replaced_surrogates: int = 0
    """Halves of a character in a JSON text. Each becomes U+FFFD."""

    def remarks(self) -> list[str]:
        """Describe what was changed or left out. Empty if nothing was."""
        said: list[str] = []
        if self.without_text:
            said.append(f"{self.without_text:,} of {self.records:,} records have no text and were skipped")
        if self.replaced_bytes:
            said.append(f"{self.replaced_bytes:,} bytes are not valid in their file's encoding and became U+FFFD")
        if self.replaced_surrogates:
            said.append(f"{self.replaced_surrogates:,} halves of characters were replaced by U+FFFD")
        return said


def text_chunks(path: Readable, tally: Tally) -> Iterator[str]:
    """Yield the characters of a file in chunks. No chunk is empty.

    Raises:
        CorpusError: The file is hardly text.
        OSError, EOFError, lzma.LZMAError, zlib.error: The file cannot be read, or is cut.
    """
    with _opened(path) as file:
        data = file.read(CHUNK_BYTES)
        encoding, length = _encoding(data[:4])
        decoder = _Decoder(path=path, tally=tally, encoding=encoding, read_bytes=length)
        data = data[length:]
        while data:
            after = file.read(CHUNK_BYTES)
            if text := decoder.decoded(data, last=not after):
                yield text
            data = after
    decoder.check()


def lines(path: Readable, chunks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a file with their ends. Only "\\n" ends a line.

    Args:
        path: The file, for the message.
        chunks: Its characters (`text_chunks`).

    Raises:
        CorpusError: A line is longer than LONGEST_RECORD.
    """
    parts: list[str] = []
    number = 1
    for chunk in chunks:
        if sum(map(len, parts)) > LONGEST_RECORD:
            raise too_long(path, f"line {number}")
        start = 0
        while end := chunk.find("\n", start) + 1:
            line = chunk[start:end]
            if parts:
                line = "".join([*parts, line])
                parts.clear()
            yield line
            start, number = end, number + 1
        if start < len(chunk):
            parts.append(chunk[start:])
    if parts:
        yield "".join(parts)


def too_long(path: Readable, where: str) -> CorpusError:
    """Return the error for a record that is longer than LONGEST_RECORD."""
    return CorpusError(
        f"{path}, {where}: it has more than {LONGEST_RECORD:,} characters; cut it into several records, or write the "
        "text into a .txt file"
    )


@contextmanager
def _opened(path: Readable) -> Iterator[BinaryIO]:
    """Open a file for reading bytes. A compressed file gives its content."""
    with ExitStack() as closing:
        stored = closing.enter_context(path.open("rb"))
        suffix = path.suffix.lower()
        if suffix == ".gz":
            yield cast(BinaryIO, closing.enter_context(gzip.open(stored)))
        elif suffix == ".xz":
            yield cast(BinaryIO, closing.enter_context(lzma.open(stored)))
        elif suffix == ".zst":
            import pyarrow as pa

            content: Any = pa.input_stream(stored, compression="zstd")
            yield cast(BinaryIO, closing.enter_context(io.BufferedReader(content)))
        else:
            yield stored


def _encoding(start: bytes) -> tuple[str, int]:
    """Return the encoding that a byte-order mark names, and the length of the mark. UTF-8 without a mark."""
    for mark, name in MARKS:
        if start.startswith(mark):
            return name, len(mark)
    return "utf-8", 0


@dataclass(kw_only=True)
class _Decoder:
    """Decodes a file, counts the bytes that it replaces, and refuses a file with too many of them."""

    path: Readable
    tally: Tally
    encoding: str
    read_bytes: int
    bad_bytes: int = 0
    nul_bytes: int = 0
    first_bad: int | None = None
    rest: bytes = b""
    """The beginning of a character that the next chunk completes."""

    def decoded(self, data: bytes, *, last: bool) -> str:
        whole, begin = self.rest + data, self.read_bytes - len(self.rest)
        make = codecs.getincrementaldecoder(self.encoding)
        decoder = make("strict")
        try:
            text = decoder.decode(whole, last)
        except UnicodeDecodeError as error:
            if self.first_bad is None:
                self.first_bad = begin + error.start
            decoder = make("replace")
            text = decoder.decode(whole, last)
            used = whole[: len(whole) - len(decoder.getstate()[0])]
            bad = text.count("\ufffd") - used.count("\ufffd".encode(self.encoding))
            self.bad_bytes += bad
            self.tally.replaced_bytes += bad
        self.rest = decoder.getstate()[0]
        self.nul_bytes += text.count("\0")
        self.read_bytes += len(data)
        return text

    def check(self) -> None:
        """Raise CorpusError if the file is hardly text."""
        if self.bad_bytes > max(FEW_UNDECODABLE_BYTES, MOST_UNDECODABLE_SHARE * self.read_bytes):
            raise CorpusError(
                f"{self.path}: {self.bad_bytes:,} of {self.read_bytes:,} bytes are not valid {self.encoding.upper()}, "
                f"the first at byte {self.first_bad}; convert the file to UTF-8, for example with iconv"
            )
        if self.nul_bytes > MOST_NUL_SHARE * self.read_bytes:
            raise CorpusError(
                f"{self.path}: {self.nul_bytes:,} of {self.read_bytes:,} bytes are NUL, as in a binary file or in "
                "UTF-16 without a byte-order mark; convert the file to UTF-8, or move it away"
            )
