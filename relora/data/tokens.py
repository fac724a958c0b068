"""Documents that are token ids already: raw files as nanoGPT writes them, numpy, and rows of parquet and arrow.

Imports pyarrow.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from relora.common.errors import first_line
from relora.config.data import TokensConfig
from relora.config.sources import TOKEN_KINDS
from relora.data.decoding import CorpusError, Tally
from relora.data.readers import arrow_batches
from relora.data.source import Document, Vocabulary
from relora.data.text import FilesSource, own_files
from relora.data.tokenizer import copy_tokenizer, vocabulary

BLOCK_TOKENS = 1 << 20
FIRST_ROWS = 1000
"""If none of so many rows has the end-of-text token, then each row is a document."""

Ids = NDArray[np.uint32]


class TokensSource(FilesSource):
    """Token ids in files. The end-of-text token ends a document, and so does the end of a file."""

    is_text: ClassVar[bool] = False

    def __init__(self, config: TokensConfig) -> None:
        """Find the files. Raises CorpusError if there are none."""
        self.tokens = config
        self._surveys, files = own_files(config, TOKEN_KINDS)
        super().__init__(config, files)
        self._known: Vocabulary | None = None

    def described(self) -> str:
        """Describe which files are read, and which are left out."""
        return "; ".join(f"{part}: {survey.described()}" for part, survey in self._surveys.items())

    def vocabulary(self, folder: Path, log_line: Callable[[str], None]) -> Vocabulary:
        """Return the vocabulary of data.tokenizer, which is copied into `folder`, or the one that the config states."""
        given = self.config.tokenizer
        if given is not None:
            if not (folder / "tokenizer_config.json").exists():
                copy_tokenizer(given, folder, log_line)
            self._known = vocabulary(folder, given)
        else:
            self._known = Vocabulary(vocab_size=self.tokens.vocab_size, end_of_text_id=self.tokens.end_of_text_id)
        return self._known

    def documents(self, part: str, tally: Tally, cursor: Any = None) -> Iterator[Document]:
        """Yield the documents of all files of a part, without their end-of-text tokens. A file's number is a cursor."""
        end_of_text_id = self._vocabulary().end_of_text_id
        for number in range(cursor or 0, len(self.files[part])):
            is_first = True
            for chunks in _documents(self._blocks(self.files[part][number]), end_of_text_id):
                yield Document(chunks=chunks, cursor=number if is_first else None, counts=asdict(tally))
                is_first = False

    def _vocabulary(self) -> Vocabulary:
        if self._known is not None:
            return self._known
        with tempfile.TemporaryDirectory() as folder:
            return self.vocabulary(Path(folder), lambda message: None)

    def _blocks(self, path: Path) -> Iterator[Ids]:
        """Yield the ids of a file, in blocks. Rows without end-of-text tokens get one each.

        Raises CorpusError if an id is not in the vocabulary.
        """
        known, position = self._vocabulary(), 0
        for block in _ids_of(path, self.tokens, known.end_of_text_id):
            wrong = np.flatnonzero((block < 0) | (block >= known.vocab_size))
            if len(wrong):
                raise CorpusError(
                    f"{path}: the token id {block[wrong[0]]} at position {position + wrong[0]:,} is not in the "
                    f"vocabulary of {known.vocab_size:,} ids; set data.tokenizer, or data.vocab_size and "
                    "data.token_type, to those of these files"
                )
            yield block.astype(np.uint32)
            position += len(block)


def _ids_of(path: Path, config: TokensConfig, end_of_text_id: int) -> Iterator[NDArray[Any]]:
    """Yield the ids of a file in blocks. Raises CorpusError if the file cannot be read."""
    kind = TOKEN_KINDS[path.suffix.lower()]
    try:
        if kind in ("parquet", "arrow"):
            yield from _joined_rows(_rows(path, kind, config.tokens_field), end_of_text_id)
            return
        if kind == "numpy":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            size_bytes, item_bytes = path.stat().st_size, np.dtype(config.token_type).itemsize
            if size_bytes % item_bytes:
                raise CorpusError(
                    f"{path} has {size_bytes:,} bytes, which is no multiple of the {item_bytes} bytes of "
                    f"data.token_type={config.token_type}; the file is cut, or it has another type"
                )
            ids = np.memmap(path, dtype=config.token_type, mode="r") if size_bytes else np.empty(0, config.token_type)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as token ids: {first_line(error)}") from error
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise CorpusError(f"{path} holds {ids.dtype} of shape {ids.shape}, and not a row of token ids")
    if ids.ndim == 2:
        yield from _joined_rows((np.asarray(row) for row in ids), end_of_text_id)
        return
    for start in range(0, len(ids), BLOCK_TOKENS):
        yield np.asarray(ids[start : start + BLOCK_TOKENS])


def _rows(path: Path, kind: str, field: str) -> Iterator[NDArray[Any]]:
    """Yield the ids of each row of a parquet or arrow file."""
    import pyarrow as pa

    number = 0
    try:
        for batch in arrow_batches(path, kind, field, "data.tokens_field"):
            column = batch.column(0)
            kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
            if not any(is_kind(column.type) for is_kind in kinds) or not pa.types.is_integer(column.type.value_type):
                raise CorpusError(
                    f"{path}: the column {field!r} holds {column.type} and not lists of token ids; set "
                    "data.tokens_field to the column with the ids"
                )
            for row in column:
                number += 1
                if row.is_valid:
                    if row.values.null_count:
                        raise CorpusError(f"{path}, row {number}: a token id of the column {field!r} is null")
                    yield row.values.to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise CorpusError(f"{path} cannot be read as {kind}: {first_line(error)}") from error


def _joined_rows(rows: Iterator[NDArray[Any]], end_of_text_id: int) -> Iterator[NDArray[Any]]:
    """Yield rows one after the other. If the first rows have no end-of-text token, each row gets one."""
    first = list(itertools.islice(rows, FIRST_ROWS))
    are_documents = not any((row == end_of_text_id).any() for row in first)
    for row in itertools.chain(first, rows):
        yield np.append(row, end_of_text_id) if are_documents else row


def _documents(blocks: Iterator[Ids], end_of_text_id: int) -> Iterator[Iterator[Ids]]:
    """Cut the ids of a file at the end-of-text tokens. Yield the chunks of each document that is not empty."""
    reading = _Reading(blocks, end_of_text_id)
    while reading.advance():
        yield reading.document()


class _Reading:
    """Reads blocks, and cuts them into documents."""

    def __init__(self, blocks: Iterator[Ids], end_of_text_id: int) -> None:
        self._blocks, self._end_of_text_id = blocks, end_of_text_id
        self._block: Ids = np.empty(0, np.uint32)
        self._ends = np.empty(0, np.int64)
        self._place = self._next_end = 0

    def advance(self) -> bool:
        """Go to the first id of the next document. Return whether there is one."""
        while True:
            while self._next_end < len(self._ends) and self._ends[self._next_end] == self._place:
                self._place += 1
                self._next_end += 1
            if self._place < len(self._block):
                return True
            if not self._load():
                return False

    def document(self) -> Iterator[Ids]:
        """Yield the chunks of the document at this place, and go behind it."""
        while True:
            if self._next_end < len(self._ends):
                end = int(self._ends[self._next_end])
                if end > self._place:
                    yield self._block[self._place : end]
                self._place = end
                return
            if self._place < len(self._block):
                yield self._block[self._place :]
            if not self._load():
                return

    def _load(self) -> bool:
        found = next(self._blocks, None)
        if found is None:
            self._place = len(self._block)
            return False
        self._block, self._place, self._next_end = found, 0, 0
        self._ends = np.flatnonzero(self._block == self._end_of_text_id)
        return True
