"""Estimate how many held-out documents are near-duplicates of training text, by their n-grams of tokens."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relora.data.source import SPLITS

GRAM_TOKENS = 13
"""As in the contamination studies since GPT-3 (Brown et al. 2020, appendix C)."""
MOST_DOCUMENTS = 1000
"""So many documents of each held-out split are looked at."""
SAMPLED = np.uint64(8)
"""One n-gram of so many is compared: the same ones in all documents, by their hash."""
NEAR_SHARE = 0.5
"""A document is a near-duplicate if at least this share of its n-grams is in the training text."""
BLOCK_TOKENS = 1 << 16
_BASE = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(folder: Path, dtype: str) -> dict[str, dict[str, float]]:
    """Return, for each held-out split, the share of near-duplicates and the number of documents it was estimated on.

    Args:
        folder: It has SPLIT.bin and SPLIT.starts of all splits.
        dtype: The type of the token ids.
    """
    documents = {split: _sampled_documents(folder, split, dtype) for split in SPLITS[1:]}
    grams = [_sampled(_hashes(ids)) for found in documents.values() for ids in found]
    known = np.unique(np.concatenate([*grams, np.empty(0, np.uint64)]))
    seen = np.zeros(len(known), bool)
    if len(known):
        for block in _blocks(_tokens(folder / "train.bin", dtype)):
            found = _sampled(_hashes(block))
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            seen[places[known[places] == found]] = True
    result: dict[str, dict[str, float]] = {}
    for split, found in documents.items():
        shares = [seen[np.searchsorted(known, grams.pop(0))] for _ in found]
        shares = [float(share.mean()) for share in shares if len(share)]
        near = sum(share >= NEAR_SHARE for share in shares) / len(shares) if shares else 0.0
        result[split] = {"share": near, "documents": len(shares)}
    return result


def described(found: dict[str, dict[str, float]]) -> str:
    """Describe the result on one line."""
    return ", ".join(f"{split} {values['share']:.1%}" for split, values in found.items())


def _tokens(path: Path, dtype: str) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _sampled_documents(folder: Path, split: str, dtype: str) -> list[NDArray[Any]]:
    """Return documents at equal distances, those of them that have an n-gram."""
    tokens = _tokens(folder / f"{split}.bin", dtype)
    starts = np.fromfile(folder / f"{split}.starts", dtype=np.uint64).astype(np.int64)
    ends = np.append(starts[1:], len(tokens))
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(len(starts), MOST_DOCUMENTS)).astype(np.int64))
    cut = [tokens[starts[number] : ends[number]] for number in chosen]
    return [ids for ids in cut if len(ids) >= GRAM_TOKENS]


def _blocks(tokens: NDArray[Any]) -> Any:
    """Yield overlapping blocks, so that each n-gram is in one of them."""
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS + GRAM_TOKENS - 1]
        if len(block) >= GRAM_TOKENS:
            yield block


def _hashes(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the hash of the n-gram at each place: a polynomial in the ids, modulo 2**64, whose bits are then mixed.

    The sums over 2, 4, 8 and 12 ids are made from each other, so that 5 multiplications are enough for 13 ids.
    """
    one = ids.astype(np.uint64) + np.uint64(1)
    powers = {1: _BASE}
    with np.errstate(over="ignore"):
        for length in (2, 4, 8):
            powers[length] = powers[length // 2] * powers[length // 2]
        sums = {1: one}
        for length in (2, 4, 8):
            half = sums[length // 2]
            sums[length] = half[: -(length // 2)] * powers[length // 2] + half[length // 2 :]
        twelve = sums[8][:-4] * powers[4] + sums[4][8:]
        whole = twelve[:-1] * powers[1] + one[12:]
        whole ^= whole >> np.uint64(31)
        whole *= np.uint64(0xBF58476D1CE4E5B9)
        return whole ^ (whole >> np.uint64(29))


def _sampled(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return hashes[hashes % SAMPLED == 0]
