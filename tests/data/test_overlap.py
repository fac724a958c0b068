"""The share of near-duplicates is that of a plain program with sets of n-grams."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.data import overlap
from relora.data.overlap import GRAM_TOKENS, near_duplicates

SMALL = st.lists(st.lists(st.integers(0, 2), max_size=40), max_size=6)


def write(folder: Path, split: str, documents: list[list[int]]) -> None:
    np.asarray([token for ids in documents for token in ids], dtype=np.uint16).tofile(folder / f"{split}.bin")
    starts = np.cumsum([0, *map(len, documents)])[: len(documents)]
    starts.astype(np.uint64).tofile(folder / f"{split}.starts")


def grams(ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[place : place + GRAM_TOKENS]) for place in range(len(ids) - GRAM_TOKENS + 1)]


@given(SMALL, SMALL)
def test_the_share_is_that_of_sets(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], held_out: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("overlap")
    for split, documents in (("train", train), ("validation", held_out), ("test", [])):
        write(folder, split, documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "SAMPLED", np.uint64(1))
        patch.setattr(overlap, "BLOCK_TOKENS", 17)
        found = near_duplicates(folder, "uint16")
    known = set(grams([token for ids in train for token in ids]))
    shares = [sum(gram in known for gram in grams(ids)) / len(grams(ids)) for ids in held_out if grams(ids)]
    near = sum(share >= 0.5 for share in shares) / len(shares) if shares else 0.0
    assert found == {
        "validation": {"share": near, "documents": len(shares)},
        "test": {"share": 0.0, "documents": 0},
    }


def test_a_sample_of_the_n_grams_estimates_the_share(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    held_out = [chance.integers(0, 30_000, 300).tolist() for _ in range(200)]
    copies = [[*ids[:250], *chance.integers(0, 30_000, 50)] for ids in held_out[:50]]
    train = copies + [chance.integers(0, 30_000, 300).tolist() for _ in range(500)]
    for split, documents in (("train", train), ("validation", held_out), ("test", held_out[150:])):
        write(tmp_path, split, documents)
    assert near_duplicates(tmp_path, "uint16") == {
        "validation": {"share": 0.25, "documents": 200},
        "test": {"share": 0.0, "documents": 50},
    }
