"""A mixture of corpora: one tokenizer for all, and the sequences of each in fixed shares."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from relora.common.files import publishing
from relora.config.mixture import MIXTURE_CYCLE, MixtureConfig
from relora.data.decoding import Tally
from relora.data.sequences import Batch, Sequences, permuted
from relora.data.source import SPLITS, Source
from relora.data.splitting import assign, held_out_shares, training_texts
from relora.data.tokenizer import TOKENIZER_TRAINING_CHARACTERS, train_tokenizer


def shared_tokenizer(config: MixtureConfig, sources: dict[str, Source], corpora: Path) -> str:
    """Return data.tokenizer, or the folder of a BPE that is trained on the training text of all sources.

    Args:
        config: The mixture.
        sources: The sources, by name.
        corpora: The folder that holds all prepared corpora, and gets the tokenizer.

    Raises:
        CorpusError: The text of a source cannot be read, or is too little.
    """
    if config.tokenizer is not None:
        return config.tokenizer
    key = json.dumps([config.vocab_size, config.written_out(), {name: each.identity for name, each in sources.items()}])
    folder = corpora / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    corpora.mkdir(parents=True, exist_ok=True)
    with FileLock(corpora / f"{folder.name}.lock"):
        if not (folder / "tokenizer_config.json").exists():
            with publishing(folder) as temporary:
                texts = (
                    text
                    for name, source in sources.items()
                    for text in training_texts(
                        source,
                        assign(source, "train", held_out_shares(source, "train"), Tally()),
                        config.shares()[name] / MIXTURE_CYCLE * TOKENIZER_TRAINING_CHARACTERS,
                    )
                )
                train_tokenizer(texts, config.vocab_size, temporary)
    return str(folder)


def counts(shares: dict[str, int], splits: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Return tokens, pieces and bytes of each split of a mixture.

    Args:
        shares: Source -> sequences among MIXTURE_CYCLE.
        splits: Source -> split -> its counts. Training text counts whole. Of held-out text, so much counts as fits the
            shares.
    """
    found: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        most = min(splits[name][split]["tokens"] / share for name, share in shares.items())
        used = {name: most * share / splits[name][split]["tokens"] for name, share in shares.items()}
        if split == "train":
            used = dict.fromkeys(shares, 1.0)
        names = ("tokens", "pieces", "bytes")
        found[split] = {key: round(sum(used[name] * splits[name][split][key] for name in shares)) for key in names}
        if not all(splits[name][split]["bytes"] for name in shares):  # a source of token ids
            found[split]["bytes"] = 0
    return found


def digest(shares: dict[str, int], digests: dict[str, str]) -> str:
    """Return the digest of a mixture of texts with these digests."""
    return hashlib.blake2b(json.dumps([shares, digests], sort_keys=True).encode(), digest_size=16).hexdigest()


_OWN_SEED = 0x6D69787475726573
"""Makes the order of the sources another one than the orders within the sources."""


@dataclass(frozen=True)
class _Part:
    name: str
    sequences: Sequences
    share: int


class MixedSequences(Sequences):
    """The sequences of several corpora.

    In training, MIXTURE_CYCLE positions in a row have the same number of sequences of each source, in an order that
    changes from cycle to cycle. Each source is read in its own order, as if it were alone. A held-out split has so many
    sequences of each source as fit the shares.
    """

    def __init__(self, parts: Mapping[str, tuple[Sequences, int]], *, held_out: bool) -> None:
        """Join the sequences of all sources.

        Args:
            parts: The name of each source, its sequences, and their number among MIXTURE_CYCLE.
            held_out: Whether the split is evaluated, and not trained on.

        Raises:
            ValueError: A held-out split is too short for the shares.
        """
        self._parts = [_Part(name, *part) for name, part in parts.items()]
        self.sequence_length_tokens = self._parts[0].sequences.sequence_length_tokens
        own = [part.sequences.count for part in self._parts]
        if held_out:
            limits = list(zip(own, self._parts, strict=True))
            own = [min(count * part.share // other.share for count, other in limits) for part in self._parts]
            if min(own) < 1:
                raise ValueError("a source has less than one sequence there; use more held-out text, or other weights")
        self._ends = np.cumsum(own)
        self._share_ends = np.cumsum([part.share for part in self._parts])
        self.count = int(self._ends[-1])
        self.target_tokens = self.targets_of(np.arange(self.count)) if held_out else self._all_targets()

    def _all_targets(self) -> int:
        return sum(part.sequences.target_tokens for part in self._parts)

    def _by_part(
        self, sequences: NDArray[np.int64]
    ) -> Iterator[tuple[Sequences, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (sequences of a source, the places of its numbers in `sequences`, its own numbers)."""
        of_part = self._ends.searchsorted(sequences, side="right")
        for number, part in enumerate(self._parts):
            places = np.flatnonzero(of_part == number)
            if len(places):
                first = int(self._ends[number - 1]) if number else 0
                yield part.sequences, places, sequences[places] - first

    def batch(self, sequences: NDArray[np.int64]) -> Batch:
        """Return the sequences with these numbers, on the CPU."""
        import torch

        found = [(places, part.batch(numbers)) for part, places, numbers in self._by_part(sequences)]
        order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in found]), kind="stable"))
        joined = [None if any(each is None for each in parts) else torch.cat(parts)[order] for parts in _columns(found)]
        return Batch(*joined)  # type: ignore[arg-type]

    def targets_of(self, sequences: NDArray[np.int64]) -> int:
        """Return the number of targets in the sequences with these numbers."""
        return sum(part.targets_of(numbers) for part, _, numbers in self._by_part(sequences))

    def epochs(self, sequences: int) -> str:
        """Describe how often the text of each source is read by so many sequences of training."""
        each = (
            f"{sequences * part.share / MIXTURE_CYCLE / part.sequences.count:.2f} of {part.name}"
            for part in self._parts
        )
        return f"epochs of the training text: {', '.join(each)}"

    def _numbers(self, first: int, count: int, seed: int) -> NDArray[np.int64]:
        positions = np.arange(first, first + count, dtype=np.int64)
        slots = permuted(positions, MIXTURE_CYCLE, seed ^ _OWN_SEED)
        of_part = self._share_ends.searchsorted(slots, side="right")
        result = np.empty_like(positions)
        for number, part in enumerate(self._parts):
            places = np.flatnonzero(of_part == number)
            begin = int(self._share_ends[number - 1]) if number else 0
            own = positions[places] // MIXTURE_CYCLE * part.share + slots[places] - begin
            first_number = int(self._ends[number - 1]) if number else 0
            result[places] = first_number + permuted(own, part.sequences.count, seed)
        return result


def _columns(found: list[tuple[Any, Batch]]) -> Iterator[list[Any]]:
    """Yield the inputs of all batches, then the targets, then the positions."""
    yield from (list(column) for column in zip(*(batch for _, batch in found), strict=True))
