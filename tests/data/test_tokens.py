"""Token ids of other programs: each form of file gives the same documents as a plain reading of the ids."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.config.data import TokensConfig
from relora.config.mixture import data_config
from relora.data import tokens
from relora.data.corpus import Corpus, prepare
from relora.data.decoding import CorpusError
from relora.data.source import SPLITS
from relora.data.tokens import _documents

END = 99
CHANCE = np.random.default_rng(0)
DOCUMENTS = [CHANCE.integers(0, END, CHANCE.integers(1, 60)).tolist() for _ in range(300)]
STREAM = [token for ids in DOCUMENTS for token in (*ids, END)]


def settings(path: Path, **changes: Any) -> TokensConfig:
    values = {"name": "tokens", "path": str(path), "vocab_size": 300, "end_of_text_id": END}
    made = data_config(
        values | {"sequence_length_tokens": 16, "validation_fraction": 0.1, "test_fraction": 0.1} | changes
    )
    assert isinstance(made, TokensConfig)
    return made


def silent(message: str) -> None:
    """Ignore the message."""


def documents_in(corpus: Corpus, *splits: str) -> list[list[int]]:
    found = []
    for split in splits or SPLITS:
        ids = np.fromfile(corpus.folder / f"{split}.bin", dtype=corpus.dtype).astype(int)
        ends = np.flatnonzero(ids == corpus.end_of_text_id)
        found += [each.tolist()[:-1] for each in np.split(ids, ends + 1)[:-1]]
    return found


def as_raw(folder: Path) -> None:
    np.asarray(STREAM, dtype=np.uint16).tofile(folder / "all.bin")


def as_numpy(folder: Path) -> None:
    np.save(folder / "all.npy", np.asarray(STREAM, dtype=np.int32))


def as_rows(folder: Path) -> None:
    pq.write_table(pa.table({"input_ids": DOCUMENTS, "other": [0] * len(DOCUMENTS)}), folder / "all.parquet")


def as_packed_rows(folder: Path) -> None:
    rows = [STREAM[start : start + 64] for start in range(0, len(STREAM), 64)]
    pq.write_table(pa.table({"input_ids": rows}), folder / "all.parquet")


def as_saved_dataset(folder: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": DOCUMENTS}).save_to_disk(folder / "saved")


def as_rows_of_one_length(folder: Path) -> None:
    rows = [STREAM[start : start + 64] for start in range(0, len(STREAM) - 63, 64)]
    rest = [*STREAM[len(rows) * 64 :]]
    rows = [*rows, rest + [END] * (64 - len(rest))]
    kind = pa.list_(pa.int32(), 64)
    pq.write_table(pa.table({"input_ids": pa.array(rows, type=kind)}), folder / "all.parquet")


FORMS: dict[str, Callable[[Path], None]] = {
    "raw": as_raw,
    "numpy": as_numpy,
    "rows": as_rows,
    "packed rows": as_packed_rows,
    "rows of one length": as_rows_of_one_length,
    "save_to_disk": as_saved_dataset,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    FORMS[form](folder)
    corpus = prepare(settings(folder), tmp_path / "corpora", silent)
    assert Counter(map(tuple, documents_in(corpus))) == Counter(map(tuple, DOCUMENTS))
    assert (corpus.vocab_size, corpus.end_of_text_id, corpus.tokenizer_file) == (300, END, None)
    held_out = len(documents_in(corpus, "validation")), len(documents_in(corpus, "test"))
    assert all(0.05 * len(DOCUMENTS) < count < 0.15 * len(DOCUMENTS) for count in held_out)


def test_the_files_of_nanogpt_are_read_with_their_own_validation(tmp_path: Path) -> None:
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    cut = sum(len(ids) + 1 for ids in DOCUMENTS[:250])
    np.asarray(STREAM[:cut], dtype=np.uint16).tofile(folder / "train.bin")
    np.asarray(STREAM[cut:], dtype=np.uint16).tofile(folder / "val.bin")
    corpus = prepare(settings(folder), tmp_path / "corpora", silent)
    assert documents_in(corpus, "train") == DOCUMENTS[:250]
    held_out = [token for ids in documents_in(corpus, "validation", "test") for token in ids]
    assert sorted(held_out) == sorted(token for ids in DOCUMENTS[250:] for token in ids)


def test_own_held_out_files_may_be_elsewhere(tmp_path: Path) -> None:
    for name, ids in (("a", DOCUMENTS[:200]), ("b", DOCUMENTS[200:250]), ("c", DOCUMENTS[250:])):
        (tmp_path / name).mkdir()
        np.asarray([token for each in ids for token in (*each, END)], dtype=np.uint32).tofile(tmp_path / name / "x.bin")
    config = settings(
        tmp_path / "a",
        validation_path=str(tmp_path / "b"),
        test_path=str(tmp_path / "c"),
        token_type="uint32",
    )
    corpus = prepare(config, tmp_path / "corpora", silent)
    for split, expected in (("train", DOCUMENTS[:200]), ("validation", DOCUMENTS[200:250]), ("test", DOCUMENTS[250:])):
        assert documents_in(corpus, split) == expected


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_documents_do_not_depend_on_the_blocks(ids: list[int], size: int) -> None:
    stream = np.asarray(ids, dtype=np.uint32)
    blocks = (stream[start : start + size] for start in range(0, len(stream), size))
    found = [np.concatenate(list(chunks)).tolist() for chunks in _documents(blocks, 3)]
    expected: list[list[int]] = [[]]
    for token in ids:
        expected.append([]) if token == 3 else expected[-1].append(token)
    assert found == [each for each in expected if each]


def test_a_tokenizer_gives_the_vocabulary(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(120):
        (text / f"{number}.txt").write_text(f"document {number} has some words " * 5)
    values = {"name": "text", "path": str(text), "vocab_size": 300, "validation_fraction": 0.1, "test_fraction": 0.1}
    made = prepare(data_config(values), tmp_path / "corpora", silent)
    own = tmp_path / "own"
    own.mkdir()
    for split, name in (("train", "train"), ("validation", "val")):
        (own / f"{name}.bin").write_bytes((made.folder / f"{split}.bin").read_bytes())
    corpus = prepare(settings(own, tokenizer=str(made.folder)), tmp_path / "corpora", silent)
    assert (corpus.vocab_size, corpus.end_of_text_id) == (made.vocab_size, made.end_of_text_id)
    assert corpus.tokenizer_digest == made.tokenizer_digest
    assert documents_in(corpus, "train") == documents_in(made, "train")


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], list[str]]] = {
    "too large": (
        lambda folder: np.asarray([5, 400, END] * 9, dtype=np.uint16).tofile(folder / "a.bin"),
        {},
        ["the token id 400 at position 1 ", "the vocabulary of 300 ids"],
    ),
    "another type": (
        lambda folder: np.asarray(STREAM * 2, dtype=np.uint16).tofile(folder / "a.bin"),
        {"token_type": "uint32"},
        ["is not in the vocabulary of 300 ids", "data.token_type"],
    ),
    "cut": (lambda folder: (folder / "a.bin").write_bytes(b"abc"), {}, ["3 bytes", "data.token_type=uint16"]),
    "no numpy": (lambda folder: (folder / "a.npy").write_bytes(b"abc"), {}, ["cannot be read as token ids"]),
    "floats": (lambda folder: np.save(folder / "a.npy", np.zeros(9)), {}, ["float64", "not a row of token ids"]),
    "no column": (as_rows, {"tokens_field": "ids"}, ["no column 'ids'", "input_ids, other", "data.tokens_field"]),
    "no lists": (as_rows, {"tokens_field": "other"}, ["int64", "not lists", "data.tokens_field"]),
    "a null": (
        lambda folder: pq.write_table(pa.table({"input_ids": [[1, 2], [1, None, 3]]}), folder / "a.parquet"),
        {},
        ["row 2", "input_ids", "null"],
    ),
    "fractions": (
        lambda folder: pq.write_table(pa.table({"input_ids": [[1.5, 2.0]]}), folder / "a.parquet"),
        {},
        ["double", "not lists of token ids"],
    ),
    "no parquet": (lambda folder: (folder / "a.parquet").write_bytes(b"abcd" * 9), {}, ["as parquet"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_token_ids_are_refused(tmp_path: Path, case: str) -> None:
    write, changes, parts = REFUSED[case]
    folder = tmp_path / "tokens"
    folder.mkdir()
    write(folder)
    with pytest.raises(CorpusError) as raised:
        prepare(settings(folder, **changes), tmp_path / "corpora", silent)
    for part in (str(folder), *parts):
        assert part in str(raised.value)


def test_a_long_document_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BLOCK_TOKENS", 100)
    folder = tmp_path / "tokens"
    folder.mkdir()
    as_raw(folder)
    small = prepare(settings(folder), tmp_path / "small", silent)
    monkeypatch.undo()
    large = prepare(settings(folder), tmp_path / "large", silent)
    assert small.identity == large.identity
    assert json.loads((small.folder / "meta.json").read_text())["splits"]["train"]["bytes"] == 0


def test_a_small_vocabulary_is_accepted(tmp_path: Path) -> None:
    """nanoGPT's characters of Shakespeare are 65."""
    ids = np.random.default_rng(0).integers(0, 64, 20_000)
    ids[::50] = 64
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    config = settings(tmp_path / "a.bin", vocab_size=65, end_of_text_id=64)
    assert prepare(config, tmp_path / "corpora", silent).vocab_size == 65
