"""Batches from a memory-mapped token file, as a pure function of (seed, step).

There is no iterator. So a resumed run replays nothing, and the micro-batch and the world size do not change the order.

A file of starts has the position of the first token of each document. A piece of a document that was cut counts as a
document here.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""The target of a position that predicts nothing. It is also the default of torch.nn.functional.cross_entropy."""
PADDING = 0
"""The token id of padding. No real token attends to padding, so any id gives the same results."""
STARTS_AT_A_TIME = 2**20
"""How many documents are looked at together when a file of starts is surveyed. It may have hundreds of millions."""

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


class Batch(NamedTuple):
    """Some sequences, as int64 tensors of one device."""

    inputs_BxT: "Tensor"
    targets_BxT: "Tensor"
    """The token after each input. IGNORED where nothing is predicted."""
    positions_BxT: "Tensor | None"
    """The place of each input in its document. Attention stays within the document then. With None, the positions are
    0 .. T-1 and attention covers the whole sequence."""

    def split(self, sequences: int) -> "list[Batch]":
        """Return the batch in parts of this many sequences. The last part may have fewer."""
        inputs, targets = self.inputs_BxT.split(sequences), self.targets_BxT.split(sequences)
        positions = [None] * len(inputs) if self.positions_BxT is None else self.positions_BxT.split(sequences)
        return [Batch(*part) for part in zip(inputs, targets, positions, strict=True)]

    def to(self, device: "torch.device") -> "Batch":
        """Copy the batch to a device. From pinned memory, the copy runs while a GPU still computes earlier work."""

        def copied(tensor: "Tensor") -> "Tensor":
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.contiguous().pin_memory().to(device, non_blocking=True)

        positions = None if self.positions_BxT is None else copied(self.positions_BxT)
        return Batch(copied(self.inputs_BxT), copied(self.targets_BxT), positions)

    @property
    def target_tokens(self) -> int:
        """The number of targets that are not IGNORED."""
        return int((self.targets_BxT != IGNORED).sum())


class Sequences:
    """Sequences of T tokens, numbered from 0, and the batches of a training run."""

    count: int
    """The number of sequences."""
    sequence_length_tokens: int
    target_tokens: int
    """The number of targets in all sequences together."""

    def batch(self, sequences: NDArray[np.int64]) -> Batch:
        """Return the sequences with these numbers, on the CPU."""
        raise NotImplementedError

    def training_batch(
        self, step: int, sequences_per_step: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
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
        return self.batch(self._numbers(step * sequences_per_step + rank * share, share, seed))

    def targets_of(self, sequences: NDArray[np.int64]) -> int:
        """Return the number of targets in the sequences with these numbers. Padding does not count."""
        raise NotImplementedError

    def epochs(self, sequences: int) -> str:
        """Describe how often the text is read by so many sequences of training."""
        return f"{sequences / self.count:.2f} epochs of the training text"

    def step_target_tokens(self, step: int, sequences_per_step: int, seed: int) -> int:
        """Return the number of targets in one optimizer step's whole batch, over all processes.

        The arguments are as in `training_batch`.
        """
        return self.targets_of(self._numbers(step * sequences_per_step, sequences_per_step, seed))

    def _numbers(self, first: int, count: int, seed: int) -> NDArray[np.int64]:
        """Return the numbers of the sequences at `count` positions of the endless order, from `first` on."""
        return permuted(np.arange(first, first + count, dtype=np.int64), self.count, seed)


class TokenSequences(Sequences):
    """A token file cut into sequences of T tokens.

    Sequence i reads tokens iT .. (i+1)T. These are T + 1 tokens, so that every token except the first is predicted
    exactly once.
    """

    def __init__(self, path: Path, dtype: str, sequence_length_tokens: int, *, starts: Path | None = None) -> None:
        """Open a token file.

        Args:
            path: The tokens.
            dtype: The type of a token in the file.
            sequence_length_tokens: T.
            starts: The file of starts, if attention stays within a document. Then positions begin at 0 in each
                document, and at the beginning of each sequence.

        Raises:
            ValueError: The file is shorter than one sequence.
        """
        self.tokens = np.memmap(path, dtype=np.dtype(dtype), mode="r")
        self.starts = None if starts is None else _read_starts(starts)
        self.sequence_length_tokens = sequence_length_tokens
        self.count = (len(self.tokens) - 1) // sequence_length_tokens
        self.target_tokens = self.count * sequence_length_tokens
        if self.count < 1:
            raise ValueError(
                f"{path} holds {len(self.tokens)} tokens, fewer than one sequence of "
                f"data.sequence_length_tokens={sequence_length_tokens}; use more text or shorter sequences"
            )

    def batch(self, sequences: NDArray[np.int64]) -> Batch:
        """Return the sequences with these numbers, on the CPU. Targets are one token ahead."""
        import torch  # imported here, because preparing a corpus does not need it

        firsts = sequences * self.sequence_length_tokens
        offsets = firsts[:, None] + np.arange(self.sequence_length_tokens + 1)
        window_BxT1 = torch.from_numpy(self.tokens[offsets].astype(np.int64))
        positions_BxT = None if self.starts is None else torch.from_numpy(self._positions(self.starts, firsts))
        return Batch(window_BxT1[:, :-1], window_BxT1[:, 1:], positions_BxT)

    def _positions(self, starts: NDArray[np.uint64], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return positions_BxT of the sequences that begin at the tokens `firsts`."""
        length = self.sequence_length_tokens
        begins_BxT = np.zeros((len(firsts), length), dtype=np.int64)
        # Keys of another type would make searchsorted convert the whole file.
        lows = starts.searchsorted(firsts.astype(np.uint64))
        highs = starts.searchsorted((firsts + length).astype(np.uint64))
        for row, (first, low, high) in enumerate(zip(firsts, lows, highs, strict=True)):
            within = starts[low:high].astype(np.int64) - first
            begins_BxT[row, within] = within
        return np.arange(length) - np.maximum.accumulate(begins_BxT, axis=1)

    def targets_of(self, sequences: NDArray[np.int64]) -> int:
        """Return the number of targets in the sequences with these numbers: all their tokens."""
        return len(sequences) * self.sequence_length_tokens


class PaddedSequences(Sequences):
    """The documents of a token file, one in each sequence, cut to T + 1 tokens or padded.

    The inputs are the first T tokens of the document, and the targets are one token ahead. A document of one token has
    nothing to predict and gets no number.
    """

    def __init__(self, path: Path, dtype: str, sequence_length_tokens: int, *, starts: Path) -> None:
        """Open a token file.

        Args:
            path: The tokens.
            dtype: The type of a token in the file.
            sequence_length_tokens: T.
            starts: The file of starts.

        Raises:
            ValueError: No document has two tokens.
        """
        self.tokens = np.memmap(path, dtype=np.dtype(dtype), mode="r")
        self.starts = _read_starts(starts)
        self.sequence_length_tokens = sequence_length_tokens
        skipped: list[NDArray[np.int64]] = []
        self.target_tokens = 0
        for first, lengths in self._lengths():
            skipped.append(first + np.flatnonzero(lengths < 2))
            self.target_tokens += int((lengths.clip(1, sequence_length_tokens + 1) - 1).sum())
        without_number = np.concatenate(skipped)
        self._numbered_before = without_number - np.arange(len(without_number))
        """For each document without a number: how many documents before it have one."""
        self.count = len(self.starts) - len(without_number)
        if self.count < 1:
            raise ValueError(
                f"{path} holds no document of two or more tokens, which data.packing=pad needs; use more text or "
                "data.packing=packed"
            )

    def _lengths(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the lengths of all documents in parts, each with the number of its first document."""
        for first in range(0, len(self.starts), STARTS_AT_A_TIME):
            yield first, self._lengths_of(np.arange(first, min(first + STARTS_AT_A_TIME, len(self.starts))))

    def _lengths_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        is_last = documents == len(self.starts) - 1
        ends = self.starts[np.where(is_last, documents, documents + 1)].astype(np.int64)
        return np.where(is_last, len(self.tokens), ends) - self.starts[documents].astype(np.int64)

    def _documents(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the documents of sequences: the number of a sequence plus the skipped documents before it."""
        return sequences + self._numbered_before.searchsorted(sequences, side="right")

    def batch(self, sequences: NDArray[np.int64]) -> Batch:
        """Return the sequences with these numbers, on the CPU."""
        import torch

        documents, length = self._documents(sequences), self.sequence_length_tokens
        window_BxT1 = np.full((len(documents), length + 1), IGNORED, dtype=np.int64)
        used = np.minimum(self._lengths_of(documents), length + 1)
        for row, (start, count) in enumerate(zip(self.starts[documents].tolist(), used.tolist(), strict=True)):
            window_BxT1[row, :count] = self.tokens[start : start + count]
        inputs_BxT = np.where(window_BxT1[:, :-1] == IGNORED, PADDING, window_BxT1[:, :-1])
        return Batch(torch.from_numpy(inputs_BxT), torch.from_numpy(window_BxT1[:, 1:]), None)

    def targets_of(self, sequences: NDArray[np.int64]) -> int:
        """Return the number of targets in the sequences with these numbers. Padding does not count."""
        lengths = self._lengths_of(self._documents(sequences))
        return int(np.minimum(lengths - 1, self.sequence_length_tokens).sum())


def _read_starts(path: Path) -> NDArray[np.uint64]:
    """Map a file of starts into memory."""
    return np.memmap(path, dtype="<u8", mode="r")
