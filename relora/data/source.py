"""What a source of documents provides: its own splits, its documents, and places from which reading can go on."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from relora.config.data import DataConfig
from relora.data.decoding import Tally

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the writing of tokens needs to know about a tokenizer."""

    vocab_size: int
    """The largest id and one. Ids may have holes."""
    end_of_text_id: int

    @property
    def dtype(self) -> str:
        """The type of the token files."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


Content = str | NDArray[np.uint32]
"""Text, or token ids."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document. It ends with the end-of-text token in the corpus."""

    chunks: Iterable[Content]
    """Its content, in parts. Read them before the next document."""
    cursor: Any = None
    """A JSON value with which `Source.documents` begins at this document; None if reading cannot begin here."""
    counts: dict[str, int] = field(default_factory=dict)
    """With a cursor: the tally before this document was read."""


class Source(ABC):
    """Reads the documents of a corpus."""

    is_read_twice: ClassVar[bool] = True
    """Whether reading all documents costs little compared with their encoding. Then the splits have exact sizes."""

    is_text: ClassVar[bool] = True
    """Whether the documents are text, and not token ids."""

    config: DataConfig

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """The splits for which the source has documents of their own. "train" is always one of them."""

    @property
    @abstractmethod
    def identity(self) -> Any:
        """A JSON value that changes when the documents change. It is found without reading the documents."""

    @abstractmethod
    def described(self) -> str:
        """Describe on one line what is read, and what is left out."""

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the files that are read; None if unknown."""
        return None

    @abstractmethod
    def documents(self, part: str, tally: Tally, cursor: Any = None) -> Iterator[Document]:
        """Yield the documents of a part, from the one with this cursor on. They always come in the same order.

        Args:
            part: One of `parts`.
            tally: Gets the counts of what reading changed or left out.
            cursor: The cursor of the first document; None for all documents.

        Raises:
            CorpusError: The documents cannot be read.
        """

    def vocabulary(self, folder: Path, log_line: Callable[[str], None]) -> Vocabulary | None:
        """Return the vocabulary of documents that are token ids, and put their tokenizer into `folder` if there is one.

        None for text.
        """
        return None

    def share_read(self) -> float | None:
        """Return the share of the documents of the current part that are read; None if unknown."""
        return None

    def pinned(self) -> Any:
        """Return a JSON value that names the state of the source, so that another process reads the same documents."""
        return None

    def pin(self, state: Any) -> None:
        """Read the documents of an earlier process, which had this `pinned` state; None for no earlier process."""
        return

    def check_reachable(self) -> None:
        """Raise CorpusError at once if a source elsewhere cannot be reached and there is no copy of it."""
        return

    def check_unchanged(self) -> None:
        """Raise CorpusError if the documents changed while they were read."""
        return

    def provenance(self) -> dict[str, Any]:
        """Return where the documents came from, for source.json."""
        return {}


def digest_of(content: Content) -> bytes:
    """12 bytes that identify a piece of text, or of token ids."""
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content.tobytes()
    return hashlib.blake2b(data, digest_size=12).digest()


def size_of(content: Content) -> int:
    """The bytes of a piece of text in UTF-8; for token ids, 0."""
    return len(content.encode("utf-8", "replace")) if isinstance(content, str) else 0
