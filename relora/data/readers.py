"""Read the documents of one file. Only the text field of a record matters; other fields may have any type.

Imports pyarrow, for parquet, arrow and zst.
"""

import csv
import gzip
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from relora.common.errors import first_line
from relora.common.files import reason
from relora.config.sources import kind_of
from relora.data.decoding import CHUNK_BYTES, LONGEST_RECORD, CorpusError, Readable, Tally, lines, text_chunks, too_long

MOST_WITHOUT_TEXT_SHARE = 0.1
"""More records than this share without text mean that the text is in another field."""
FIRST_RECORDS = 1000
"""The share of records without text is checked after these records too, and not only at the end of the file."""
ROWS = 512
_BETWEEN = re.compile(r"[\s,]*")
"""White space and commas between the records of an array."""

Chunks = Iterable[str]
"""The text of a document, in parts."""


def read_documents(path: Path, text_field: str, tally: Tally) -> Iterator[Chunks]:
    """Yield all non-empty documents of a file. A text file is one document, and so is each record of the other kinds.

    Args:
        path: A file of which `kind_of` knows the kind.
        text_field: The field or column that holds the text.
        tally: Gets the counts.

    Yields:
        The document, in chunks of its text. Read them before the next document.

    Raises:
        CorpusError: The file cannot be read, is not text, or has too few records with text. The chunks raise it too.
    """
    kind = kind_of(path)
    assert kind is not None
    if kind == "text":
        chunks = _checked(path, text_chunks(path, tally))
        if (first := next(chunks, None)) is not None:
            yield itertools.chain((first,), chunks)
    else:
        for text in _checked(path, _texts(path, kind, text_field, tally)):
            yield (text,)


def _checked(path: Path, texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts. An error of reading becomes a CorpusError that names the file."""
    try:
        yield from texts
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is cut or damaged: {first_line(error)}; copy it again") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {reason(error)}") from error


# --------------------------------------------------------------------------------------------------------- records


def _texts(path: Path, kind: str, text_field: str, tally: Tally) -> Iterator[str]:
    """Yield the texts of the records of a file."""
    read: Callable[[Path, str, Tally], Iterator[tuple[str, Any]]] = _READERS[kind]
    field = TextField(str(path), text_field, tally)
    for where, record in read(path, text_field, tally):
        if text := field.text(where, record):
            yield text
    field.check()


class TextField:
    """Takes the text out of records, counts those without text, and raises if they are too many."""

    def __init__(self, source: str, text_field: str, tally: Tally) -> None:
        """Start to count.

        Args:
            source: The file or split of the records, for messages.
            text_field: The field with the text.
            tally: Gets the counts.
        """
        self.source, self.text_field, self.tally = source, text_field, tally
        self.records = self.without = 0
        """Records that were read, and those of them whose text is missing or null."""
        self._example = ""

    def text(self, where: str, record: Any) -> str:
        """Return the text of a record; empty if it has none. Raises CorpusError if the field holds no text.

        Args:
            where: The place of the record in the source, for messages.
            record: The fields of the record.
        """
        self.records += 1
        self.tally.records += 1
        value = record.get(self.text_field) if isinstance(record, dict) else record
        if value is None:
            self.without += 1
            self.tally.null += 1
            if not self._example:
                fields = ", ".join(record) if isinstance(record, dict) else "no field"
                self._example = f"{where} has {fields};"
        elif not isinstance(value, str):
            raise CorpusError(
                f"{self.source}, {where}: the field {self.text_field!r} holds {_kind_of_value(value)} and not text; "
                "set data.text_field to the field with the text"
            )
        if not value:
            self.tally.without_text += 1
        if self.records == FIRST_RECORDS:
            self.check()
        return _without_surrogates(value, self.tally) if value else ""

    def check(self) -> None:
        """Raise CorpusError if too many records had no text."""
        if self.without > MOST_WITHOUT_TEXT_SHARE * self.records:
            raise CorpusError(
                f"{self.source}: {self.without:,} of {self.records:,} records have no text in the field "
                f"{self.text_field!r}; {self._example} set data.text_field to the field with the text"
            )


def _kind_of_value(value: object) -> str:
    kinds = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _without_surrogates(text: str, tally: Tally) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        tally.replaced_surrogates += sum("\ud800" <= character <= "\udfff" for character in text)
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


def json_records(path: Readable, tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record) of a file that has an array of records, or one record on each line.

    Raises:
        CorpusError: The file is no JSON, or an element is no record.
        OSError, EOFError, lzma.LZMAError, zlib.error: The file cannot be read, or is cut.
    """
    chunks, empty = text_chunks(path, tally), ""
    for chunk in chunks:
        if not chunk.strip():
            empty += chunk  # its lines count
            continue
        read = _array if chunk.lstrip().startswith("[") else _json_lines
        yield from read(path, itertools.chain((empty + chunk,), chunks))
        return


def _json_lines(path: Readable, chunks: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines(path, chunks), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(
                    f"{path}, line {number}: this is no JSON, or the line is cut: {error}; a file has one "
                    "record on each line, or one array of records"
                ) from error
            yield f"line {number}", _as_record(path, f"line {number}", record)


def _array(path: Readable, chunks: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read an array in chunks, so that memory holds a few records at a time."""
    decoder, buffer = json.JSONDecoder(), next(chunks)
    position, number = buffer.index("[") + 1, 0
    while True:
        position = _BETWEEN.match(buffer, position).end()  # type: ignore[union-attr]
        if buffer[position : position + 1] == "]":
            if buffer[position + 1 :].strip() or any(chunk.strip() for chunk in chunks):
                raise CorpusError(
                    f"{path} goes on after its JSON array; write one record on each line of a .jsonl file"
                )
            return
        try:
            record, end = decoder.raw_decode(buffer, position)
        except RecursionError as error:
            raise CorpusError(f"{path}, record {number + 1}: it is nested too deeply") from error
        except ValueError as error:
            left = len(buffer) - position
            if left > LONGEST_RECORD:
                raise too_long(path, f"record {number + 1}") from error
            # As much again as there is, so that a long record is not parsed once for each chunk.
            more = "".join(itertools.islice(chunks, 1 + left // CHUNK_BYTES))
            if not more:
                where = f"{path}, record {number + 1}"
                raise CorpusError(f"{where}: this is no JSON, or the file is cut: {error}") from error
            buffer, position = buffer[position:] + more, 0
            continue
        number, position = number + 1, end
        yield f"record {number}", _as_record(path, f"record {number}", record)


def _as_record(path: Readable, where: str, record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise CorpusError(f"{path}, {where}: this is {_kind_of_value(record)} and no record with fields")
    return record


def _table(delimiter: str) -> Callable[[Path, str, Tally], Iterator[tuple[str, Any]]]:
    def read(path: Path, text_field: str, tally: Tally) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(LONGEST_RECORD)
        rows = csv.DictReader(lines(path, text_chunks(path, tally)), delimiter=delimiter, strict=True)
        try:
            columns = rows.fieldnames or []
            _check_column(path, text_field, columns)
            for number, row in enumerate(rows, start=1):
                yield f"record {number}", row
        except csv.Error as error:
            raise CorpusError(
                f"{path}, line {rows.reader.line_num}: the table cannot be read: {error}; a cell that begins with a "
                'quote must end with one, and a quote in it is written twice: ""'
            ) from error

    return read


def _check_column(path: Path, column: str, columns: Any, key: str = "data.text_field") -> None:
    if not columns:
        raise CorpusError(f"{path} is empty: it has no row with the names of its columns; fill or remove it")
    if column not in columns:
        raise CorpusError(
            f"{path} has no column {column!r}; it has {', '.join(columns)}; set {key} to the column to read"
        )


def _columns(kind: str) -> Callable[[Path, str, Tally], Iterator[tuple[str, Any]]]:
    def read(path: Path, text_field: str, tally: Tally) -> Iterator[tuple[str, Any]]:
        number = 0
        for batch in arrow_batches(path, kind, text_field):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"record {number}", {text_field: value}

    return read


def arrow_batches(path: Path, kind: str, column: str, key: str = "data.text_field") -> Iterator[Any]:
    """Yield record batches with one column of a parquet or arrow file.

    Args:
        path: The file.
        kind: "parquet" or "arrow".
        column: The name of the column.
        key: The config key of that name, for messages.

    Raises:
        CorpusError: The file has no such column, or is cut or damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if kind == "parquet":
            with parquet.ParquetFile(path) as file:
                _check_column(path, column, file.schema_arrow.names, key)
                yield from file.iter_batches(batch_size=ROWS, columns=[column])
            return
        with pa.memory_map(str(path)) as file:
            try:
                batches: Any = pa.ipc.open_stream(file)
                schema = batches.schema
            except pa.ArrowInvalid:
                opened = pa.ipc.open_file(file)
                schema = opened.schema
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            _check_column(path, column, schema.names, key)
            yield from (batch.select([column]) for batch in batches)
    except pa.ArrowException as error:
        raise CorpusError(f"{path} cannot be read as {kind}: {first_line(error)}") from error


_READERS: dict[str, Callable[[Path, str, Tally], Iterator[tuple[str, Any]]]] = {
    "jsonl": lambda path, text_field, tally: json_records(path, tally),
    "json": lambda path, text_field, tally: json_records(path, tally),
    "csv": _table(","),
    "tsv": _table("\t"),
    "parquet": _columns("parquet"),
    "arrow": _columns("arrow"),
}
