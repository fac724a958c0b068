"""Batches from a memory-mapped token file, as a pure function of (seed, step).

There is no iterator. So a resumed run replays nothing, and the micro-batch and the world size do not change the order.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 4


def permuted(positions: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Map positions in an endless reading of `size` items to item numbers. Every epoch has its own permutation.

    The permutation is a balanced Feistel network over the next even power of two, keyed by (seed, epoch). It is applied
    until the result is below `size` (Black and Rogaway 2002, "cycle-walking"). It takes O(1) time per position and
    stores nothing.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    epochs, values = np.divmod(positions, size)
    result = np.empty_like(positions)
    for epoch in np.unique(epochs):
        digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        keys = np.frombuffer(digest, dtype=np.uint64)
        here = np.flatnonzero(epochs == epoch)
        walking, state = here, values[here].astype(np.uint64)
        while walking.size:
            left, right = state >> shift, state & mask
            for key in keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            state = (left << shift) | right
            landed = state < size
            result[walking[landed]] = state[landed].astype(np.int64)
            walking, state = walking[~landed], state[~landed]
    return result


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenSequences:
    """A token file cut into sequences of T tokens.

    Sequence i reads tokens iT .. (i+1)T. These are T + 1 tokens, so that every token except the first is predicted
    exactly once. Raises ValueError if the file is shorter than one sequence.
    """

    def __init__(self, path: Path, dtype: str, sequence_length_tokens: int) -> None:
        self.tokens = np.memmap(path, dtype=np.dtype(dtype), mode="r")
        self.sequence_length_tokens = sequence_length_tokens
        self.count = (len(self.tokens) - 1) // sequence_length_tokens
        if self.count < 1:
            raise ValueError(
                f"{path} holds {len(self.tokens)} tokens, fewer than one sequence of "
                f"data.sequence_length_tokens={sequence_length_tokens}; use more text or shorter sequences"
            )

    def batch(self, sequences: NDArray[np.int64]) -> "tuple[Tensor, Tensor]":
        """(inputs_BxT, targets_BxT) of the sequences with these numbers, int64 on CPU. Targets are one token ahead."""
        import torch  # imported here, because preparing a corpus does not need it

        offsets = sequences[:, None] * self.sequence_length_tokens + np.arange(self.sequence_length_tokens + 1)
        window_BxT1 = torch.from_numpy(self.tokens[offsets].astype(np.int64))
        return window_BxT1[:, :-1], window_BxT1[:, 1:]

    def training_batch(
        self, step: int, sequences_per_step: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> "tuple[Tensor, Tensor]":
        """The part of one optimizer step's batch that belongs to one process. It does not depend on earlier calls.

        Args:
            step: Number of the optimizer step, from 0.
            sequences_per_step: Size of the whole batch, over all processes.
            seed: Seed of the order of the sequences.
            rank: This process.
            world_size: The batch is cut into this many equal parts.

        Returns:
            As `batch`.
        """
        share = sequences_per_step // world_size
        first = step * sequences_per_step + rank * share
        positions = np.arange(first, first + share, dtype=np.int64)
        return self.batch(permuted(positions, self.count, seed))
