"""Documents are cut and held out as a plain program does that holds all of them in memory."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.config.mixture import data_config
from relora.data import splitting
from relora.data.decoding import CorpusError, Tally
from relora.data.source import Content, Document, Source, digest_of
from relora.data.splitting import LONGEST_LINE_PIECES, Assignment, Piece, assign, cut

TEXTS = st.text(st.sampled_from("ab \n\r\x0b\x85\u2028é🙂"), max_size=200)


def cut_whole(document: str, piece_characters: int) -> Iterator[str]:
    """The rule of `cut`, for a document in memory."""
    longest = LONGEST_LINE_PIECES * piece_characters
    piece = ""
    for line in document.splitlines(keepends=True):
        for start in range(0, len(line), longest):
            piece += line[start : start + longest]
            if len(piece) >= piece_characters:
                yield piece
                piece = ""
    if piece:
        yield piece


@given(TEXTS, st.integers(1, 30), st.lists(st.integers(0, 200)))
@settings(max_examples=300)
def test_a_document_in_chunks_is_cut_like_a_whole_one(document: str, length: int, places: list[int]) -> None:
    ends = [0, *sorted(place for place in places if place <= len(document)), len(document)]
    chunks = [document[start:end] for start, end in itertools.pairwise(ends) if start < end]
    assert list(cut(chunks, length)) == list(cut_whole(document, length))


@given(st.lists(st.integers(0, 40)), st.integers(1, 30))
def test_token_ids_are_cut_into_equal_pieces(lengths: list[int], length: int) -> None:
    chunks = [np.arange(count, dtype=np.uint32) for count in lengths]
    pieces = list(cut(chunks, length))
    assert np.concatenate([*pieces, []]).tolist() == np.concatenate([*chunks, []]).tolist()
    assert all(length <= len(piece) < 2 * length for piece in pieces[:-1])


def test_only_long_documents_are_cut_when_whole_documents_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "LONG_DOCUMENT", 40)
    assert list(cut(("x" * 40,), None)) == ["x" * 40]
    assert list(cut(("a\n" * 10,), None)) == ["a\n" * 10]
    assert list(cut(["a\n" * 15, "b\n" * 10], None)) == ["a\n" * 15 + "b\n" * 5, "b\n" * 5]
    assert list(cut(("x" * 90,), None)) == ["x" * 40, "x" * 40, "x" * 10]


class Documents(Source):
    """Documents in memory."""

    def __init__(self, contents: list[str], **values: Any) -> None:
        self.config = data_config({"name": "stdlib", **values})
        self.contents = contents

    @property
    def parts(self) -> tuple[str, ...]:
        return ("train",)

    @property
    def identity(self) -> Any:
        return None

    def described(self) -> str:
        return ""

    def documents(self, part: str, tally: Tally, cursor: Any = None) -> Iterator[Document]:
        for content in self.contents:
            yield Document(chunks=(content,))


def held_out(contents: list[Content], shares: dict[str, float]) -> dict[str, list[Content]]:
    """The rule of `assign`, with all contents in memory."""
    sizes: dict[bytes, int] = {}
    for content in contents:
        sizes[digest_of(content)] = sizes.get(digest_of(content), 0) + len(content)
    total, chosen = sum(map(len, contents)), {}
    for split, share in shares.items():
        room = target = share * total
        for digest in sorted(sizes):
            if digest not in chosen and sizes[digest] <= room:
                chosen[digest], room = split, room - sizes[digest]
            if room < 0.02 * target:
                break
    return {split: [each for each in contents if chosen.get(digest_of(each)) == split] for split in shares}


SHARES = {"validation": 0.05, "test": 0.1}


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("many", [20, 1000, 10**6])
def test_the_same_documents_are_held_out_if_few_are_kept_in_memory(
    many: int, unequal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unequal: a few documents have most of the text, so that too few are kept at the first reading."""
    chance = random.Random(many)
    contents = [f"{number} " + "x" * chance.randrange(100) for number in range(3000)] + ["twice"] * 40
    if unequal:
        contents = [text + "y" * (50_000 if number % 100 == 0 else 0) for number, text in enumerate(contents)]
    chance.shuffle(contents)
    monkeypatch.setattr(splitting, "MANY_ITEMS", many)
    made = assign(Documents(contents), "train", SHARES, Tally())
    found: dict[str, list[Content]] = {split: [] for split in (*SHARES, "train")}
    for _, _, piece in made.pieces(Documents(contents).documents("train", Tally())):
        found[piece.split].append(piece.content)
    assert {split: found[split] for split in SHARES} == held_out(list(contents), SHARES)
    assert sum(map(len, found.values())) == len(contents)


def test_few_items_are_kept_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "MANY_ITEMS", 500)
    kept = splitting._Smallest(0.1)
    most = 0
    for number in range(20_000):
        kept.add(digest_of(str(number)), 100)
        most = max(most, len(kept._digests))
    assert most <= 0.35 * 20_000
    assert kept.total == 2_000_000


def test_a_source_that_is_read_once_holds_out_by_the_hash() -> None:
    contents = [f"document {number}" for number in range(4000)]
    assignment = Assignment(rest="train", shares=SHARES)

    def splits(texts: list[str]) -> dict[Content, str]:
        pieces: list[Piece] = [piece for _, _, piece in assignment.pieces(Documents(texts).documents("train", Tally()))]
        return {piece.content: piece.split for piece in pieces}  # type: ignore[misc]

    found = splits(contents)
    for split, share in SHARES.items():
        assert 0.8 * share < list(found.values()).count(split) / len(contents) < 1.2 * share
    assert splits(contents[::-1][:1000]) == {text: found[text] for text in contents[::-1][:1000]}


# ------------------------------------------------------------------------------------------------- splits of the user


def folder_with(tmp_path: Path, names: list[str]) -> Path:
    for name in names:
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the text of {name}\n" * 40)
    return tmp_path / "texts"


NAMED = {
    "by file": (["train.txt", "val.txt", "test.txt"], ("train", "validation", "test")),
    "C4": (["en/c4-train.00000-of-01024.txt", "en/c4-validation.00000-of-00008.txt"], ("train", "validation")),
    "by folder": (["training/a.txt", "dev/a.txt"], ("train", "validation")),
    "only a held-out name": (["val.txt", "b.txt"], ("train", "validation")),
    "a held-out folder": (["test/a.txt", "b.txt"], ("train", "test")),
    "words without training": (["my_val.txt", "test-results.txt", "b.txt"], ("train",)),
    "only held-out files": (["val.txt", "test.txt"], ("train",)),
    "no held-out": (["train.txt", "b.txt"], ("train",)),
    "programs": (["train.py", "test.py"], ("train",)),
    "words": (["training.md", "latest.txt", "retrain.txt"], ("train",)),
}


@pytest.mark.parametrize("case", NAMED)
def test_files_named_after_splits_are_those_splits(tmp_path: Path, case: str) -> None:
    from relora.data.text import TextSource

    names, parts = NAMED[case]
    source = TextSource(data_config({"name": "text", "path": str(folder_with(tmp_path, names))}))  # type: ignore[arg-type]
    assert source.parts == parts
    for part in parts[1:]:
        assert all(any(word in str(path) for word in (part[:3], "dev")) for path in source.files[part])
    assert sum(map(len, source.files.values())) == len(names)


def test_a_file_without_a_split_is_left_out_beside_named_ones(tmp_path: Path) -> None:
    from relora.data.text import TextSource

    folder = folder_with(tmp_path, ["train.txt", "val.txt", "notes.txt"])
    source = TextSource(data_config({"name": "text", "path": str(folder)}))  # type: ignore[arg-type]
    assert sorted(path.name for files in source.files.values() for path in files) == ["train.txt", "val.txt"]
    assert "notes.txt (not named after a split" in source.described()
    assert "1 for train, 1 for validation" in source.described()


def test_held_out_paths_below_the_text_are_not_trained_on(tmp_path: Path) -> None:
    from relora.data.text import TextSource

    folder = folder_with(tmp_path, ["a.txt", "test.txt", "val/v.txt", "more/b.txt"])
    values = {"name": "text", "path": str(folder), "validation_path": str(folder / "val")}
    source = TextSource(data_config(values))  # type: ignore[arg-type]
    found = {part: [path.name for path in paths] for part, paths in source.files.items()}
    assert found == {"train": ["a.txt", "b.txt"], "validation": ["v.txt"], "test": ["test.txt"]}
    with pytest.raises(CorpusError, match=r"data\.path=.* has only held-out files"):
        TextSource(data_config({**values, "path": str(folder / "val")}))  # type: ignore[arg-type]


def test_most_bytes_without_a_split_are_refused(tmp_path: Path) -> None:
    from relora.data.text import TextSource

    folder = folder_with(tmp_path, ["train.txt", "test.txt"])
    (folder / "war.txt").write_text("peace " * 5000)
    with pytest.raises(CorpusError, match=r"war\.txt \(not named after a split.*move or convert"):
        TextSource(data_config({"name": "text", "path": str(folder)}))  # type: ignore[arg-type]
