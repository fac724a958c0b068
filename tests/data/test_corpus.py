import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged import flip
from tokenizers import Tokenizer, models, pre_tokenizers

from relora.common.errors import DamagedFile
from relora.config.data import DataConfig
from relora.config.mixture import data_config
from relora.data import building
from relora.data.corpus import Corpus, load, prepare, prepare_apart
from relora.data.decoding import CorpusError
from relora.data.source import SPLITS
from relora.data.text import StdlibSource
from relora.data.writer import SplitFiles

WORDS = ["alpha", "naïve", "straße", "日本語", "über", "тест", "🙂", "the", "of", "and", "run", "x1", "=", "foo(bar)"]


def document(number: int, words: int = 40) -> str:
    chance = random.Random(number)
    return f"document {number}: {' '.join(chance.choices(WORDS, k=words))}\n"


def lines(count: int, seed: int = 0) -> str:
    return "".join(document(1_000_000 * seed + number, words=8) for number in range(count))


def write_documents(folder: Path, documents: list[str], suffix: str = ".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (folder / f"{number:05}{suffix}").write_bytes(text.encode())
    return folder


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(path: Path | None, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"vocab_size": 300, "sequence_length_tokens": 16}
    values |= {"validation_fraction": 0.1, "test_fraction": 0.1} | changes
    return data_config({"name": "text", "path": str(path), **values})


def silent(message: str) -> None:
    """Ignore the message."""


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    return tmp_path / "corpora"


def token_ids(corpus: Corpus, split: str) -> list[int]:
    return np.fromfile(corpus.folder / f"{split}.bin", dtype=corpus.dtype).tolist()


def texts(corpus: Corpus, split: str) -> list[str]:
    """The text of a split, one string up to each end-of-text token."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    found: list[list[int]] = [[]]
    for token in token_ids(corpus, split):
        if token == corpus.end_of_text_id:
            found.append([])
        else:
            found[-1].append(token)
    tail = [found[-1]] if found[-1] else []
    return [tokenizer.decode(ids) for ids in found[:-1] + tail]


def all_texts(corpus: Corpus) -> list[str]:
    return [text for split in SPLITS for text in texts(corpus, split)]


def split_of_each(corpus: Corpus) -> dict[str, str]:
    return {text: split for split in SPLITS for text in texts(corpus, split)}


TOKEN_FILES = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "starts")]
DOCUMENTS = [document(number) for number in range(150)]


# --------------------------------------------------------------------------------------------------------- sources


def test_all_text_files_of_a_folder_are_read_and_no_other_files(tmp_path: Path, corpora: Path) -> None:
    folder = tmp_path / "texts"
    write_documents(folder / "a", DOCUMENTS[:50], ".txt")
    write_documents(folder / "b" / "deep", DOCUMENTS[50:100], ".md")
    write_documents(folder, DOCUMENTS[100:], ".py")
    write_documents(folder, ["not for training"], ".html")
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "folder.txt").mkdir()
    (folder / "empty.txt").write_text("")
    assert Counter(all_texts(prepare(settings(folder), corpora, silent))) == Counter(DOCUMENTS)


@pytest.mark.slow
def test_the_same_documents_give_the_same_corpus_in_every_format(tmp_path: Path, corpora: Path) -> None:
    records = [{"id": number, "text": text, "more": {"x": [1]}} for number, text in enumerate(DOCUMENTS)]
    sources = [write_documents(tmp_path / "texts", DOCUMENTS), write_jsonl(tmp_path / "r.jsonl", records)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet", row_group_size=40)
    sources.append(tmp_path / "r.parquet")
    built = [prepare(settings(source), corpora, silent) for source in sources]
    assert len({corpus.folder for corpus in built}) == 3
    assert len({json.dumps(corpus.identity) for corpus in built}) == 1
    for corpus in built:
        assert token_ids(corpus, "train") == token_ids(built[0], "train")


def test_files_of_several_formats_in_one_folder_are_all_read(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS[:60])
    write_jsonl(folder / "r.jsonl", [{"text": text} for text in DOCUMENTS[60:100]])
    pq.write_table(pa.table({"text": DOCUMENTS[100:]}), folder / "r.parquet")
    assert Counter(all_texts(prepare(settings(folder), corpora, silent))) == Counter(DOCUMENTS)


def test_the_text_field_can_be_named(tmp_path: Path, corpora: Path) -> None:
    records = [{"text": "no", "content": text} for text in DOCUMENTS]
    source = write_jsonl(tmp_path / "r.jsonl", records)
    corpus = prepare(settings(source, text_field="content"), corpora, silent)
    assert Counter(all_texts(corpus)) == Counter(DOCUMENTS)


@pytest.mark.parametrize(("name", "content"), [("e.txt", ""), ("e.jsonl", ""), ("e.jsonl", "\n"), ("e.txt", "\n")])
def test_a_folder_may_contain_a_file_without_text(tmp_path: Path, corpora: Path, name: str, content: str) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    (folder / name).write_text(content)
    found = Counter(all_texts(prepare(settings(folder), corpora, silent)))
    assert found == Counter(DOCUMENTS + ([content] if name == "e.txt" and content else []))


def test_empty_records_are_left_out(tmp_path: Path, corpora: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", [{"text": text} for text in ["", *DOCUMENTS, ""]])
    assert Counter(all_texts(prepare(settings(source), corpora, silent))) == Counter(DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "lookalike"),
    [
        ("part[1].jsonl", "part1.jsonl"),
        ("a*b.jsonl", "a-b.jsonl"),
        ("who?.jsonl", "whom.jsonl"),
        ("ä b.jsonl", "ab.jsonl"),
    ],
)
def test_a_file_may_have_any_name(tmp_path: Path, corpora: Path, name: str, lookalike: str) -> None:
    write_jsonl(tmp_path / lookalike, [{"text": "another file"}])
    source = write_jsonl(tmp_path / name, [{"text": text} for text in DOCUMENTS])
    assert Counter(all_texts(prepare(settings(source), corpora, silent))) == Counter(DOCUMENTS)


def test_what_reading_leaves_out_or_changes_is_logged(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    write_jsonl(folder / "r.jsonl", [{"text": text} for text in [*DOCUMENTS, None, ""]])
    (folder / "latin1.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    (folder / "README.md").write_text("This describes the data.")
    messages: list[str] = []
    corpus = prepare(settings(folder), corpora, messages.append)
    first, *notes, _ = messages
    assert re.search(r"1 \.jsonl, 151 \.txt, .*left out: README\.md \(describes the data", first)
    assert [note.split()[1] for note in notes] == ["2", "1"]
    assert "describes" not in " ".join(all_texts(corpus))


def test_a_wrong_text_field_is_refused(tmp_path: Path, corpora: Path) -> None:
    source = write_jsonl(tmp_path / "r.jsonl", [{"content": "x", "id": 1}])
    with pytest.raises(CorpusError, match=r"r\.jsonl: .*'text'.*line 1 has content, id; set data\.text_field"):
        prepare(settings(source), corpora, silent)
    assert not list(corpora.glob("*/meta.json"))


@pytest.mark.parametrize("text", ["", "too short"])
def test_too_little_text_is_refused(tmp_path: Path, corpora: Path, text: str) -> None:
    source = tmp_path / "t.txt"
    source.write_text(text)
    with pytest.raises(CorpusError, match=r"none for validation .*data\.validation_fraction=0\.1; use more text"):
        prepare(settings(source), corpora, silent)


def test_a_folder_that_lost_its_text_is_refused(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    config = settings(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(CorpusError, match=r"data\.path=.*texts contains no text"):
        prepare(config, corpora, silent)


def test_a_split_shorter_than_a_sequence_is_named(tmp_path: Path, corpora: Path) -> None:
    corpus = prepare(settings(write_documents(tmp_path / "texts", DOCUMENTS)), corpora, silent)
    assert corpus.sequences("validation", settings(tmp_path / "texts")).count > 0
    with pytest.raises(CorpusError, match=r"validation split is too short: .*data\.sequence_length_tokens=9999999"):
        corpus.sequences("validation", settings(tmp_path / "texts", sequence_length_tokens=9_999_999))


def test_the_standard_library_is_read_without_its_tests() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = StdlibSource(data_config({"name": "stdlib"})).files["train"]
    names = [path.relative_to(root).as_posix() for path in files]
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py", "typing.py"} <= set(names)
    forbidden = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [name for name in names if forbidden & set(name.split("/"))]
    assert all(name.endswith(".py") for name in names)
    assert names == sorted(names, key=lambda name: Path(name))


@pytest.mark.slow
def test_the_standard_library_makes_a_corpus(tmp_path: Path) -> None:
    messages: list[str] = []
    corpus = prepare(data_config({"name": "stdlib"}), tmp_path, messages.append)
    tokens = {split: corpus.splits[split]["tokens"] for split in SPLITS}
    total = sum(tokens.values())
    assert total > 2_000_000
    assert 0.006 < tokens["validation"] / total < 0.014
    assert 0.014 < tokens["test"] / total < 0.026
    assert corpus.vocab_size == 2048
    assert json.loads((corpus.folder / "source.json").read_text())["python"] == sys.version.split()[0]
    assert messages[0].startswith("preparing the corpus stdlib-")
    assert "near-duplicates of training text" in messages[-1]  # a slow machine shows its progress between them


# ---------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.02, 0.05), (0.4, 0.4)])
def test_splits_have_the_requested_size(tmp_path: Path, corpora: Path, fractions: tuple[float, float]) -> None:
    documents = [document(number, words=10 + number % 60) for number in range(800)]
    folder = write_documents(tmp_path / "texts", documents)
    config = settings(folder, validation_fraction=fractions[0], test_fraction=fractions[1])
    corpus = prepare(config, corpora, silent)
    total = sum(map(len, documents))
    for split, fraction in zip(("validation", "test"), fractions, strict=True):
        share = sum(map(len, texts(corpus, split))) / total
        assert 0.97 * fraction < share <= fraction


def test_no_document_is_in_two_splits(tmp_path: Path, corpora: Path) -> None:
    documents = DOCUMENTS + DOCUMENTS[:40] + DOCUMENTS[20:40]
    corpus = prepare(settings(write_documents(tmp_path / "texts", documents)), corpora, silent)
    found = {split: Counter(texts(corpus, split)) for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not found[one].keys() & found[other].keys()
    assert sum(found.values(), Counter()) == Counter(documents)
    assert any(number > 1 for split in ("validation", "test") for number in found[split].values())


def test_duplicates_do_not_enlarge_a_held_out_set(tmp_path: Path, corpora: Path) -> None:
    for seed in range(6):
        documents = [document(1000 * seed + number) for number in range(150)] + [document(7000 + seed)] * 150
        corpus = prepare(settings(write_documents(tmp_path / f"texts{seed}", documents)), corpora, silent)
        total = sum(map(len, documents))
        for split in ("validation", "test"):
            assert sum(map(len, texts(corpus, split))) <= 0.1 * total


def test_the_split_of_a_document_does_not_depend_on_names_and_order(tmp_path: Path, corpora: Path) -> None:
    one = prepare(settings(write_documents(tmp_path / "one", DOCUMENTS)), corpora, silent)
    other = prepare(settings(write_documents(tmp_path / "other", DOCUMENTS[::-1], ".md")), corpora, silent)
    assert split_of_each(one) == split_of_each(other)


def test_two_builds_are_equal_to_the_byte(tmp_path: Path) -> None:
    config = settings(write_documents(tmp_path / "texts", DOCUMENTS))
    one, other = (prepare(config, tmp_path / name, silent) for name in ("one", "other"))
    assert one.identity == other.identity
    assert one.folder.name == other.folder.name
    files = sorted(path.name for path in one.folder.iterdir())
    assert files == sorted(["meta.json", *FILES])
    for name in files:
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


@pytest.mark.slow
def test_a_new_document_moves_few_others(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", [document(number, words=12) for number in range(1500)])
    before = split_of_each(prepare(settings(folder), corpora, silent))
    for added in range(5):
        (folder / "new.txt").write_text(document(5000 + added, words=12 + 40 * added))
        after = split_of_each(prepare(settings(folder), corpora, silent))
        moved = [text for text, split in before.items() if after[text] != split]
        assert len(moved) <= 0.02 * len(before)
        assert len(after) == len(before) + 1


# ---------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("files", [1, 3])
def test_few_documents_are_split_by_pieces_at_line_ends(tmp_path: Path, corpora: Path, files: int) -> None:
    documents = [lines(800 // files, seed) for seed in range(files)]
    corpus = prepare(settings(write_documents(tmp_path / "texts", documents)), corpora, silent)
    found = {split: "".join(texts(corpus, split)).splitlines(keepends=True) for split in SPLITS}
    every_line = "".join(documents).splitlines(keepends=True)
    assert sorted(line for split in SPLITS for line in found[split]) == sorted(every_line)
    total = sum(map(len, documents))
    for split in ("validation", "test"):
        assert 0.08 < sum(map(len, found[split])) / total <= 0.1
        assert corpus.splits[split]["pieces"] > 5
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(found[one]) & set(found[other])
    for split in SPLITS:
        kept = set(found[split])
        assert found[split] == [line for line in every_line if line in kept], "the lines keep the order of the text"


def test_a_text_of_one_long_line_is_split_too(tmp_path: Path, corpora: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text(" ".join(document(number).strip() for number in range(500)))
    corpus = prepare(settings(source), corpora, silent)
    assert sorted("".join(all_texts(corpus))) == sorted(source.read_text())
    assert all(corpus.splits[split]["tokens"] > 1000 for split in SPLITS)


def test_every_document_ends_with_one_end_of_text(tmp_path: Path, corpora: Path) -> None:
    for name, documents in (("many", DOCUMENTS), ("few", [lines(300, seed) for seed in range(4)])):
        corpus = prepare(settings(write_documents(tmp_path / name, documents)), corpora, silent)
        ends = sum(token_ids(corpus, split).count(corpus.end_of_text_id) for split in SPLITS)
        assert ends == len(documents)


# ---------------------------------------------------------------------------------------------------- nothing lost

ODD_TEXTS = {
    "non-ascii": "Ünïcödé 日本語 🙂👩‍👩‍👧 e\u0301 \u200b\u00a0",
    "white space": "  leading\ttabs \n\n\n   trailing   \n",
    "separators": "form\x0cfeed line\u2028separator next\u0085line vertical\x0btab",
    "control": "nul\x00 escape\x1b delete\x7f",
    "byte order mark": "\ufeffmark",
    "line ends": "unix\nwindows\r\nmac\rend",
    "plain": "no line end",
}


@pytest.mark.parametrize("odd", ODD_TEXTS)
@pytest.mark.parametrize("count", [1, 120])
def test_no_byte_is_lost(tmp_path: Path, corpora: Path, odd: str, count: int) -> None:
    documents = [
        f"{number} {ODD_TEXTS[odd]}\n{lines(600 // count, number)}{number} ends in {ODD_TEXTS[odd]}"
        for number in range(count)
    ]
    corpus = prepare(settings(write_documents(tmp_path / "texts", documents)), corpora, silent)
    if count == 1:
        found = Counter(line for text in all_texts(corpus) for line in text.splitlines(keepends=True))
        assert found == Counter(documents[0].splitlines(keepends=True))
    else:
        assert Counter(all_texts(corpus)) == Counter(documents)


def test_only_bytes_that_are_not_utf8_are_replaced(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    (folder / "latin1.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    assert Counter(all_texts(prepare(settings(folder), corpora, silent))) == Counter([*DOCUMENTS, "caf\ufffd au lait"])


# -------------------------------------------------------------------------------------------------------- identity


def test_the_meta_file_describes_the_corpus(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    corpus = prepare(settings(folder), corpora, silent)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["source"]["path"] == str(folder)
    assert meta["vocab_size"] == corpus.vocab_size <= 300
    assert meta["dtype"] == "uint16"
    for split in SPLITS:
        ids = token_ids(corpus, split)
        assert meta["splits"][split]["tokens"] == len(ids)
        assert max(ids) < corpus.vocab_size
    assert sum(meta["splits"][split]["pieces"] for split in SPLITS) == len(DOCUMENTS)
    assert corpus.folder.parent == corpora
    assert corpus.folder.name.startswith("text-")


def test_one_character_changes_the_corpus_digest(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    before = prepare(settings(folder), corpora, silent)
    changed = folder / "00077.txt"
    changed.write_bytes(changed.read_bytes().replace(b"document", b"dokument", 1))
    after = prepare(settings(folder), corpora, silent)
    assert after.folder != before.folder
    assert after.corpus_digest != before.corpus_digest


def test_a_new_file_time_does_not_change_the_corpus(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    before = prepare(settings(folder), corpora, silent)
    os.utime(folder / "00077.txt", (1, 1))
    assert prepare(settings(folder), corpora, silent).identity == before.identity


def test_other_held_out_sets_give_another_corpus(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    before = prepare(settings(folder), corpora, silent)
    assert prepare(settings(folder, test_fraction=0.2), corpora, silent).corpus_digest != before.corpus_digest


@pytest.mark.slow
def test_the_ends_of_documents_are_part_of_the_identity(tmp_path: Path, corpora: Path) -> None:
    text = lines(800)
    whole = prepare(settings(write_documents(tmp_path / "whole", [text])), corpora, silent)
    every_line = text.splitlines(keepends=True)
    for place in range(300, 340):
        halves = ["".join(every_line[:place]), "".join(every_line[place:])]
        cut = prepare(settings(write_documents(tmp_path / f"cut{place}", halves)), corpora, silent)
        assert cut.identity != whole.identity


def test_a_second_prepare_builds_nothing(tmp_path: Path, corpora: Path) -> None:
    config = settings(write_documents(tmp_path / "texts", DOCUMENTS))
    messages: list[str] = []
    first = prepare(config, corpora, messages.append)
    assert len(messages) == 2
    stamps = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(config, corpora, messages.append) == first
    assert len(messages) == 2
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == stamps


def test_the_sequence_length_does_not_change_the_corpus(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", DOCUMENTS)
    one = prepare(settings(folder, sequence_length_tokens=16), corpora, silent)
    assert prepare(settings(folder, sequence_length_tokens=32), corpora, silent).folder == one.folder


# --------------------------------------------------------------------------------------------- a tokenizer of the user


def word_tokenizer(folder: Path, words: int, **config: Any) -> Path:
    """A folder with a tokenizer of whole words w0, w1, ..."""
    folder.mkdir()
    vocabulary = {"[UNK]": 0, "[END]": 1} | {f"w{number}": number + 2 for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def word_texts(folder: Path, highest: int) -> Path:
    return write_documents(folder, [f"w{highest - number} w{number} other" for number in range(120)])


@pytest.mark.parametrize(("words", "dtype"), [(1000, "uint16"), (70_000, "uint32")])
def test_a_tokenizer_of_the_user_is_used_unchanged(tmp_path: Path, corpora: Path, words: int, dtype: str) -> None:
    own = word_tokenizer(tmp_path / "own", words, eos_token="[END]", mine=True)
    folder = word_texts(tmp_path / "texts", highest=words - 1)
    for source in (own, own / "tokenizer.json"):
        corpus = prepare(settings(folder, tokenizer=str(source)), corpora, silent)
        assert corpus.tokenizer_file is not None
        assert corpus.tokenizer_file.read_bytes() == (own / "tokenizer.json").read_bytes()
        kept = json.loads((corpus.folder / "tokenizer_config.json").read_text())
        assert kept["mine"] is True
        assert kept["eos_token"] == "[END]"
        assert (corpus.vocab_size, corpus.end_of_text_id, corpus.dtype) == (words + 2, 1, dtype)
        read = [tuple(ids) for split in SPLITS for ids in np.reshape(token_ids(corpus, split), (-1, 4)).tolist()]
        assert sorted(read) == sorted((words + 1 - number, number + 2, 0, 1) for number in range(120))


def test_an_end_of_text_token_may_be_written_as_an_object(tmp_path: Path, corpora: Path) -> None:
    own = word_tokenizer(tmp_path / "own", 1000, eos_token={"content": "[END]", "lstrip": False})
    corpus = prepare(settings(word_texts(tmp_path / "t", 999), tokenizer=str(own)), corpora, silent)
    assert corpus.end_of_text_id == 1


def test_the_tokenizer_of_a_corpus_can_be_used_for_another_corpus(tmp_path: Path, corpora: Path) -> None:
    first = prepare(settings(write_documents(tmp_path / "one", DOCUMENTS)), corpora, silent)
    others = [document(number) for number in range(500, 700)]
    folder = write_documents(tmp_path / "other", others)
    second = prepare(settings(folder, tokenizer=str(first.folder)), corpora, silent)
    assert second.tokenizer_digest == first.tokenizer_digest
    assert second.end_of_text_id == first.end_of_text_id
    assert Counter(all_texts(second)) == Counter(others)


def test_another_tokenizer_at_the_same_path_is_noticed(tmp_path: Path, corpora: Path) -> None:
    own = word_tokenizer(tmp_path / "own", 1000, eos_token="[END]")
    config = settings(word_texts(tmp_path / "t", 999), tokenizer=str(own))
    before = prepare(config, corpora, silent)
    shutil.rmtree(own)
    word_tokenizer(own, 1001, eos_token="[END]")
    after = prepare(config, corpora, silent)
    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.vocab_size == before.vocab_size + 1


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_a_saved_truncation_or_padding_does_not_change_the_corpus(tmp_path: Path, corpora: Path, setting: str) -> None:
    """transformers leaves these settings in a tokenizer.json after a call with truncation=True or padding=True."""
    own = word_tokenizer(tmp_path / "own", 1000, eos_token="[END]")
    folder = word_texts(tmp_path / "texts", highest=999)
    expected = prepare(settings(folder, tokenizer=str(own)), corpora, silent)
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    if setting == "truncation":
        tokenizer.enable_truncation(3)
    else:
        tokenizer.enable_padding(length=64)
    tokenizer.save(str(own / "tokenizer.json"))
    messages: list[str] = []
    corpus = prepare(settings(folder, tokenizer=str(own)), corpora, messages.append)
    assert corpus.folder != expected.folder
    for split in SPLITS:
        assert token_ids(corpus, split) == token_ids(expected, split)
    assert any(f"saved {setting}" in message and "does not use" in message for message in messages)
    assert corpus.tokenizer_file is not None
    assert json.loads(corpus.tokenizer_file.read_text())[setting] is None


def test_a_special_token_in_the_text_is_text(tmp_path: Path, corpora: Path) -> None:
    documents = [f"{text}<|endoftext|>{text}" for text in DOCUMENTS]
    corpus = prepare(settings(write_documents(tmp_path / "texts", documents)), corpora, silent)
    ends = sum(token_ids(corpus, split).count(corpus.end_of_text_id) for split in SPLITS)
    assert ends == len(documents)
    assert Counter(all_texts(corpus)) == Counter(documents)


def test_a_vocabulary_with_holes_is_as_large_as_its_largest_id(tmp_path: Path, corpora: Path) -> None:
    own = word_tokenizer(tmp_path / "own", 1000, eos_token="[END]")
    made = json.loads((own / "tokenizer.json").read_text())
    word = "w999" if "w999" in made["model"]["vocab"] else sorted(made["model"]["vocab"])[-1]
    made["model"]["vocab"][word] = 5000
    (own / "tokenizer.json").write_text(json.dumps(made))
    corpus = prepare(settings(word_texts(tmp_path / "texts", 999), tokenizer=str(own)), corpora, silent)
    assert corpus.vocab_size == 5001
    assert max(max(token_ids(corpus, split)) for split in SPLITS) <= 5000


def test_another_end_of_text_token_gives_another_corpus(tmp_path: Path, corpora: Path) -> None:
    own = word_tokenizer(tmp_path / "own", 1000, eos_token="[END]")
    config = settings(word_texts(tmp_path / "texts", 999), tokenizer=str(own))
    before = prepare(config, corpora, silent)
    other = sorted(json.loads((own / "tokenizer.json").read_text())["model"]["vocab"])[5]
    (own / "tokenizer_config.json").write_text(json.dumps({"eos_token": other}))
    after = prepare(config, corpora, silent)
    assert after.folder != before.folder
    assert after.end_of_text_id != before.end_of_text_id


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path, corpora: Path) -> None:
    own = word_tokenizer(tmp_path / "own", 1000)
    with pytest.raises(CorpusError, match=r"no end-of-text token; set eos_token .*tokenizer_config\.json"):
        prepare(settings(word_texts(tmp_path / "t", 999), tokenizer=str(own)), corpora, silent)


def test_an_end_of_text_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path, corpora: Path) -> None:
    own = word_tokenizer(tmp_path / "own", 1000, eos_token="<eos>")
    with pytest.raises(CorpusError, match=r"does not know .*end-of-text token '<eos>'; set eos_token"):
        prepare(settings(word_texts(tmp_path / "t", 999), tokenizer=str(own)), corpora, silent)


# -------------------------------------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_a_corpus_built_in_another_process_is_the_same_and_loads_no_tokenizers(tmp_path: Path, corpora: Path) -> None:
    config = settings(write_documents(tmp_path / "texts", [lines(300)]))
    alone = prepare(config, tmp_path / "other", silent)
    script = (
        "import json, sys; from pathlib import Path\n"
        "from relora.config.mixture import data_config; from relora.data import corpus\n"
        "corpus._build = None\n"
        "made = corpus.prepare_apart(data_config(json.loads(sys.argv[1])), Path(sys.argv[2]), print)\n"
        "print(made.corpus_digest, 'tokenizers' in sys.modules)"
    )
    command = [sys.executable, "-c", script, json.dumps(asdict(config)), str(corpora)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in output[:2]] == ["preparing", "corpus"]
    assert output[2:] == [f"{alone.corpus_digest} False"]


@pytest.mark.slow
def test_an_error_of_the_other_process_is_reported(tmp_path: Path, corpora: Path, monkeypatch) -> None:
    config = settings(write_documents(tmp_path / "texts", ["a"]))
    with pytest.raises(CorpusError, match="leave none for validation"):
        prepare_apart(config, corpora, silent)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the corpus ended with 1"):
        prepare_apart(config, corpora, silent)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cause"), [("TERM", ""), ("KILL", r" \(.*out of memory\)")])
def test_a_signal_to_the_process_that_prepares_a_corpus_gives_one_line(
    name: str, cause: str, tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SIGTERM to that process alone once gave a traceback."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nkill -{name} $$\n")
    python.chmod(0o755)
    folder = write_documents(tmp_path / "texts", ["a", "b"])
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CorpusError, match=f"by SIG{name}{cause}; launch the run again"):
        prepare_apart(settings(folder), corpora, silent)


PREPARE_AT_ONCE = """
import json, os, sys
from pathlib import Path
from relora.config.mixture import data_config
from relora.data.corpus import prepare

config, corpora, results = data_config(json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
waiting, starting = os.pipe()
children = []
for number in range(6):
    children.append(os.fork())
    if children[-1] == 0:
        os.close(starting)
        os.read(waiting, 1)
        messages = []
        corpus = prepare(config, corpora, messages.append)
        result = {"messages": messages, "identity": corpus.identity, "train": corpus.sequences("train", config).count}
        (results / f"{number}.json").write_text(json.dumps(result))
        os._exit(0)
os.close(starting)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def arguments(folder: Path) -> str:
    values = {"name": "text", "path": str(folder), "vocab_size": 300, "sequence_length_tokens": 16}
    return json.dumps(values | {"validation_fraction": 0.1, "test_fraction": 0.1})


@pytest.mark.slow
def test_processes_that_prepare_together_build_once(tmp_path: Path, corpora: Path) -> None:
    folder = write_documents(tmp_path / "texts", [lines(3000)])
    results = tmp_path / "results"
    results.mkdir()
    command = [sys.executable, "-c", PREPARE_AT_ONCE, arguments(folder), str(corpora), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    children = [json.loads(path.read_text()) for path in results.iterdir()]
    (built,) = [child["messages"] for child in children if any("corpus ready" in each for each in child["messages"])]
    assert len(built) == 2
    waiting = [message for child in children for message in child["messages"] if message not in built]
    assert all("another process prepares the corpus text-" in message for message in waiting)
    assert len(waiting) <= 5
    assert len({json.dumps(child["identity"]) for child in children}) == 1
    assert {child["train"] for child in children} == {
        prepare(settings(folder), corpora, silent).sequences("train", settings(folder)).count
    }
    assert len(list(corpora.glob("*/meta.json"))) == 1
    assert not list(corpora.glob("*.partial"))


KILL_AND_PREPARE = """
import json, os, random, signal, sys, time
from pathlib import Path
from relora.config.mixture import data_config
from relora.data import building
from relora.data.corpus import prepare

config, corpora, kills = data_config(json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
building.COMMIT_SECONDS = 0.0
building.BATCH_PIECES = 7
chance, killed, reached, seconds = random.Random(0), 0, [], 0.05
while killed < kills:
    child = os.fork()
    if child == 0:
        messages = []
        prepare(config, corpora, messages.append)
        os._exit(0)
    time.sleep(seconds * chance.random())
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status != signal.SIGKILL:
        break
    killed += 1
    assert not list(corpora.glob("*/meta.json")) or list(corpora.glob("*.partial/meta.json"))
    sizes = [path.stat().st_size for path in corpora.glob("*.partial/train.bin")]
    reached.append(sizes[0] if sizes else 0)
    if len(reached) > 1 and reached[-1] == reached[-2]:
        seconds *= 1.3  # as long as it takes to come further than the last time
messages = []
corpus = prepare(config, corpora, messages.append)
print(json.dumps({"messages": messages, "folder": str(corpus.folder), "killed": killed, "reached": reached}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one text", "files of records", "splits of the user"])
def test_a_preparation_that_is_killed_twenty_times_has_the_same_bytes(tmp_path: Path, corpora: Path, kind: str) -> None:
    folder = tmp_path / "texts"
    if kind == "one text":
        write_documents(folder, [lines(20_000)])
    else:
        folder.mkdir()
        records = [{"text": document(number, words=5 + number % 300)} for number in range(2000)]
        names = ["train-1", "train-2", "validation-1"] if kind == "splits of the user" else ["a", "b", "c"]
        for number, name in enumerate(names):
            write_jsonl(folder / f"{name}.jsonl", records[number::3])
    command = [sys.executable, "-c", KILL_AND_PREPARE, arguments(folder), str(corpora), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["killed"] >= 10
    assert max(result["reached"]) > 0, "no process was killed while it wrote tokens"
    clean = prepare(settings(folder), tmp_path / "clean", silent)
    assert clean.folder.name == Path(result["folder"]).name
    files = {path.name: path.read_bytes() for path in clean.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in Path(result["folder"]).iterdir()} == files
    assert not list(corpora.glob("*.partial"))


@pytest.mark.slow
def test_a_preparation_goes_on_and_says_so(tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(write_documents(tmp_path / "texts", [lines(4000)]))
    monkeypatch.setattr(building, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(building, "BATCH_PIECES", 100)
    write = SplitFiles.write

    def fails_at_last(self: SplitFiles) -> None:
        write(self)
        if self.splits["train"].tokens > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SplitFiles, "write", fails_at_last)
    with pytest.raises(OSError, match="No space left on device") as raised:
        prepare(config, corpora, silent)
    assert "text-" in str(raised.value.filename)
    monkeypatch.setattr(SplitFiles, "write", write)
    messages: list[str] = []
    corpus = prepare(config, corpora, messages.append)
    (tokens,) = [
        int(found[1].replace(",", "")) for text in messages if (found := re.search(r"after ([\d,]+) tok", text))
    ]
    assert 10_000 < tokens < 40_000
    assert corpus.corpus_digest == prepare(config, tmp_path / "other", silent).corpus_digest


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "test.bin", "meta.json"])
def test_a_truncated_corpus_is_named_and_prepared_again(tmp_path: Path, corpora: Path, name: str) -> None:
    config = settings(write_documents(tmp_path / "texts", DOCUMENTS))
    folder = prepare(config, corpora, silent).folder
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    os.truncate(folder / name, len(whole[name]) // 2)
    messages: list[str] = []
    prepare(config, corpora, messages.append)
    assert messages[0].startswith(f"{folder / name} cannot be read: ")
    assert messages[0].endswith("the corpus is prepared again")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


FILES = [*TOKEN_FILES, "source.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_a_corpus_is_named_and_the_corpus_is_prepared_again(
    tmp_path: Path, corpora: Path, name: str
) -> None:
    config = settings(write_documents(tmp_path / "texts", DOCUMENTS))
    folder = prepare(config, corpora, silent).folder
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    flip(folder / name, 0.5)
    with pytest.raises(DamagedFile, match=f"{folder / name} .*checksum.*remove its folder"):
        load(folder)
    messages: list[str] = []
    prepare(config, corpora, messages.append)
    assert messages[0].startswith(f"{folder / name} cannot be read: its checksum")
    assert messages[0].endswith("the corpus is prepared again")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


@pytest.mark.parametrize("name", ["vocab_size", "end_of_text_id", "python", "crc32"])
def test_a_changed_value_in_meta_json_is_named_and_the_corpus_is_prepared_again(
    tmp_path: Path, corpora: Path, name: str
) -> None:
    config = settings(write_documents(tmp_path / "texts", DOCUMENTS))
    folder = prepare(config, corpora, silent).folder
    meta = json.loads((folder / "meta.json").read_text())
    changed = {"vocab_size": 301, "end_of_text_id": 1, "python": "2.7", "crc32": {}}[name]
    (folder / "meta.json").write_text(json.dumps({**meta, name: changed}))
    with pytest.raises(DamagedFile, match=f"{folder / 'meta.json'} .*its values differ.*remove its folder"):
        load(folder)
    messages: list[str] = []
    prepare(config, corpora, messages.append)
    assert messages[0].startswith(f"{folder / 'meta.json'} cannot be read: ")
    assert json.loads((folder / "meta.json").read_text()) == meta


def test_an_old_corpus_without_checksums_is_used(tmp_path: Path, corpora: Path) -> None:
    config = settings(write_documents(tmp_path / "texts", DOCUMENTS))
    made = prepare(config, corpora, silent)
    meta = json.loads((made.folder / "meta.json").read_text())
    assert sorted(meta.pop("crc32")) == sorted(FILES)
    del meta["own_crc32"]
    (made.folder / "meta.json").write_text(json.dumps(meta))
    messages: list[str] = []
    assert prepare(config, corpora, messages.append) == made
    assert messages == []
