"""Files of every kind are read as their own libraries wrote them. Damaged files and other encodings are refused."""

import codecs
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.data import decoding, readers
from relora.data.decoding import CHUNK_BYTES, CorpusError, Tally
from relora.data.readers import read_documents

TEXTS = [
    "plain",
    "naïve straße 日本語 🙂",
    'quotes " and, commas\tand tabs',
    "two\nlines\r\nand\rmore",
    "\u2028 and \x85",
    "7",
]
RECORDS = [{"id": number, "text": text, "more": {"x": [number]}} for number, text in enumerate(TEXTS)]


def read(*files: Path, field: str = "text", tally: Tally | None = None) -> list[str]:
    tally = Tally() if tally is None else tally
    return ["".join(chunks) for file in files for chunks in read_documents(file, field, tally)]


def assert_refused(file: Path, parts: list[str]) -> None:
    """Reading the file fails, and the message has the file and all `parts`."""
    with pytest.raises(CorpusError) as raised:
        read(file)
    for part in (str(file), *parts):
        assert part in str(raised.value)


# ------------------------------------------------------------------------------------------------------- every kind


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def as_json(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False))


def as_table(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, ["id", "text"], delimiter=delimiter, extrasaction="ignore")
            rows.writeheader()
            rows.writerows(RECORDS)

    return write


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)


def as_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def as_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=2)


KINDS = {
    "a.jsonl": as_jsonl,
    "a.json": as_json,
    "a.csv": as_table(","),
    "a.tsv": as_table("\t"),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow_stream,
    "b.arrow": as_arrow_file,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_records_gives_its_texts(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_the_texts_are_those_that_datasets_reads(tmp_path: Path, name: str) -> None:
    from datasets import load_dataset

    KINDS[name](tmp_path / name)
    kind = {"jsonl": "json"}.get(name.partition(".")[2], name.partition(".")[2])
    rows = load_dataset(kind, data_files=str(tmp_path / name), split="train", streaming=True)
    assert read(tmp_path / name) == [row["text"] for row in rows]


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pa.Codec("zstd").compress(content, asbytes=True)
    return gzip.compress(content) if suffix == ".gz" else lzma.compress(content)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
def test_a_compressed_file_gives_the_same_texts(tmp_path: Path, name: str, suffix: str) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}{suffix}"
    KINDS.get(name, lambda path: path.write_bytes("\n".join(TEXTS).encode()))(plain)
    packed.write_bytes(compressed(plain.read_bytes(), suffix))
    assert read(packed) == read(plain)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(CorpusError, match=rf"{name}{suffix} "):
        read(packed)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1), st.booleans())
def test_any_text_survives_jsonl_and_json(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], plain: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    records = [{"text": text} for text in texts]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=plain) + "\n" for record in records), encoding="utf-8", newline=""
    )
    (folder / "a.json").write_text(json.dumps(records, ensure_ascii=plain), encoding="utf-8", newline="")
    assert read(folder / "a.jsonl") == texts
    assert read(folder / "a.json") == texts


def test_a_json_array_larger_than_a_chunk_is_read(tmp_path: Path) -> None:
    texts = [f"{number} " + "x" * (CHUNK_BYTES // 3) for number in range(8)] + ["y" * (2 * CHUNK_BYTES)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert read(tmp_path / "a.json") == texts


@pytest.mark.parametrize("before", ["", " \n" * CHUNK_BYTES])
def test_json_has_an_array_or_a_record_on_each_line(tmp_path: Path, before: str) -> None:
    """The files of C4 have lines, and the ending of arrays."""
    lines = "\n\n".join(json.dumps(record) for record in RECORDS)
    array = json.dumps(RECORDS)
    for name, content in (("lines.json", lines), ("array.json", array), ("array.jsonl", array)):
        (tmp_path / name).write_text(before + content)
        assert read(tmp_path / name) == TEXTS
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((before + content).encode()))
        assert read(tmp_path / f"{name}.gz") == TEXTS


@pytest.mark.parametrize(("name", "where"), [("a.jsonl", "line 2"), ("a.json", "record 2")])
def test_a_record_that_is_too_long_is_named(
    tmp_path: Path, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decoding, readers):
        monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
        monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    records = [json.dumps({"text": text}) for text in ("short", "x" * 9000, "after")]
    (tmp_path / name).write_text("\n".join(records) if name == "a.jsonl" else f"[{', '.join(records)}]")
    assert_refused(tmp_path / name, [where, "more than 1,000 characters", ".txt"])


def test_only_the_text_field_has_to_have_one_type(tmp_path: Path) -> None:
    """datasets takes the types from the first block, and fails at a field that nobody asked for."""
    records = [{"text": f"{number} " + "x" * 2000, "meta": None} for number in range(6000)]
    records += [{"text": "last", "meta": {"new": [1.5]}, "later": "field"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(read(tmp_path / "a.jsonl")) == 6001


# -------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, mark: bytes, encoding: str) -> None:
    for name, text in (("a.txt", TEXTS[1]), ("a.jsonl", json.dumps(RECORDS[1])), ("a.csv", f"text\n{TEXTS[1]}\n")):
        (tmp_path / name).write_bytes(mark + text.encode(encoding))
        assert read(tmp_path / name) == [TEXTS[1]]


LATIN = ("Ein Text mit Umlauten: Äpfel, Öl, Übung, Straße.\n" * 50).encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", LATIN, ["the first at byte 23", "convert the file to UTF-8"]),
        ("a.csv", b"text\n" + LATIN, ["the first at byte 28", "convert the file to UTF-8"]),
        ("a.txt", ("no mark " * 50).encode("utf-16-le"), ["400 of 800 bytes are NUL", "convert the file to UTF-8"]),
        ("a.txt", bytes(range(256)) * 20, ["not valid UTF-8"]),
    ],
)
def test_text_in_another_encoding_is_refused(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, parts)


def test_a_few_wrong_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    tally = Tally()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \\ud83d of it"}\n{"text": "\\ud83d\\ude42 whole"}\n')
    assert read(tmp_path / "a.txt", tmp_path / "b.jsonl", tally=tally) == [
        "caf\ufffd au lait",
        "half \ufffd of it",
        "🙂 whole",
    ]
    assert (tally.replaced_bytes, tally.replaced_surrogates) == (1, 1)
    assert [remark.split()[0] for remark in tally.remarks()] == ["1", "1"]


# ---------------------------------------------------------------------------------------------------- wrong records


def test_records_without_text_are_skipped_and_counted(tmp_path: Path) -> None:
    tally = Tally()
    lines = ['{"text": null}', '{"text": ""}', "", '{"other": "x"}', *['{"text": "t"}'] * 30]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl", tally=tally) == ["t"] * 30
    assert (tally.records, tally.without_text) == (33, 3)
    assert tally.remarks() == ["3 of 33 records have no text and were skipped"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"body": "x", "id": 1}\n' * 3, ["3 of 3 records", "line 1 has body, id", "set data.text_field"]),
        ("a.jsonl", '{"text": "x"}\n\n{"text": 5}\n', ["line 3", "holds a number", "set data.text_field"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ["a"]}\n', ["line 2", "holds a list", "set data.text_field"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "cut', ["line 2", "no JSON, or the line is cut"]),
        ("a.jsonl", '{"text": "x"}\n["a"]\n', ["line 2", "a list and no record"]),
        ("a.json", '[{"text": "x"}, {"text": "cut', ["record 2", "no JSON, or the file is cut"]),
        ("a.json", '{\n"text": "x"}', ["line 1", "no JSON", "array of records"]),
        ("a.csv", "id,body\n1,x\n", ["no column 'text'", "it has id, body", "set data.text_field"]),
        ("a.csv", 'id,text\n1,"open\n', ["a.csv, line", "the table cannot be read", "written twice"]),
        ("a.csv", "", ["a.csv is empty", "names of its columns"]),
    ],
)
def test_a_wrong_record_is_named_with_its_place(tmp_path: Path, name: str, content: str, parts: list[str]) -> None:
    (tmp_path / name).write_text(content)
    assert_refused(tmp_path / name, parts)


def test_a_wrong_text_field_is_noticed_before_the_end_of_a_long_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 5000)
    with pytest.raises(CorpusError, match=r"1,000 of 1,000 records"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_cut_columnar_file_is_named(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CorpusError, match=rf"{name} cannot be read as {name.partition('.')[2]}"):
        read(tmp_path / name)


def test_text_in_another_encoding_is_refused_in_an_array_too(tmp_path: Path) -> None:
    records = [{"text": "Gr\u00fc\u00dfe aus K\u00f6ln"}] * 300
    (tmp_path / "a.json").write_bytes(json.dumps(records, ensure_ascii=False).encode("latin-1"))
    assert_refused(tmp_path / "a.json", ["not valid UTF-8", "iconv"])


@pytest.mark.parametrize("more", ['[{"text": "b"}]', "x"])
def test_text_after_an_array_is_not_lost_silently(tmp_path: Path, more: str) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}]\n' + more)
    assert_refused(tmp_path / "a.json", ["goes on after its JSON array", ".jsonl"])
    (tmp_path / "a.json").write_text('[{"text": "a"}]\n \n')
    assert read(tmp_path / "a.json") == ["a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_is_nested_too_deeply_is_named(tmp_path: Path, name: str) -> None:
    record = '{"text": "a", "more": ' + "[" * 200_000
    (tmp_path / name).write_text(record if name == "a.jsonl" else f"[{record}")
    assert_refused(tmp_path / name, ["1"])


def test_a_table_names_the_line_of_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,b\nfine,1\n"He said hi,1\nsecond\n"third" line\n')
    assert_refused(tmp_path / "a.csv", ["line 5"])
