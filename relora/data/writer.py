"""The files of a corpus that grow while it is built: tokens, starts of pieces, and the pieces' digests."""

import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relora.common.errors import DamagedFile
from relora.data.source import SPLITS, Vocabulary, digest_of, size_of
from relora.data.splitting import Piece

PIECES = "pieces.log"


@dataclass(kw_only=True)
class SplitCounts:
    """What is written of one split."""

    tokens: int = 0
    pieces: int = 0
    bytes: int = 0
    """Of the text, in UTF-8, without the end-of-text tokens."""
    characters: int = 0
    tokens_crc32: int = 0
    starts_crc32: int = 0

    def counts(self) -> dict[str, int]:
        """The counts for meta.json."""
        return {"tokens": self.tokens, "pieces": self.pieces, "bytes": self.bytes}


class SplitFiles:
    """Appends to SPLIT.bin (token ids) and SPLIT.starts (uint64: the position of each piece's first token).

    A log has the split, the digest and the end of every piece. The digest of the corpus is that of the log.
    """

    def __init__(self, folder: Path, known: Vocabulary, state: dict[str, Any] | None) -> None:
        """Open the files. With the `state` of an earlier process, the files are first cut to the sizes in it."""
        self._dtype, self._end_of_text_id = np.dtype(known.dtype), known.end_of_text_id
        saved = state or {"splits": {}, "log_bytes": 0}
        self.splits = {name: SplitCounts(**saved["splits"].get(name, {})) for name in SPLITS}
        self._log_bytes: int = saved["log_bytes"]
        sizes = {folder / PIECES: self._log_bytes}
        for name, split in self.splits.items():
            sizes[folder / f"{name}.bin"] = split.tokens * self._dtype.itemsize
            sizes[folder / f"{name}.starts"] = split.pieces * 8
        self._handles = {path.name: path.open("ab") for path in sizes}
        for path, size_bytes in sizes.items():
            if self._handles[path.name].tell() < size_bytes:
                self.close()
                raise DamagedFile(
                    path, "it is shorter than when the preparation stopped", "the same command begins anew"
                )
            self._handles[path.name].truncate(size_bytes)
        self._ids: dict[str, list[NDArray]] = {name: [] for name in SPLITS}
        self._starts: dict[str, list[int]] = {name: [] for name in SPLITS}
        self._log: list[bytes] = []

    def add(self, piece: Piece, ids: NDArray[np.uint32]) -> None:
        """Add a piece. `write` writes it."""
        split = self.splits[piece.split]
        self._starts[piece.split].append(split.tokens)
        self._ids[piece.split].append(ids)
        if piece.ends_document:
            self._ids[piece.split].append(np.asarray([self._end_of_text_id]))
        split.tokens += len(ids) + piece.ends_document
        split.pieces += 1
        split.bytes += size_of(piece.content)
        split.characters += len(piece.content)
        self._log.append(piece.split.encode() + digest_of(piece.content) + bytes([piece.ends_document]))

    def write(self) -> None:
        """Append all pieces that were added to the files."""
        for name, split in self.splits.items():
            if not self._starts[name]:
                continue
            tokens = np.concatenate(self._ids[name]).astype(self._dtype).tobytes()
            starts = np.asarray(self._starts[name], dtype=np.uint64).tobytes()
            self._handles[f"{name}.bin"].write(tokens)
            self._handles[f"{name}.starts"].write(starts)
            split.tokens_crc32 = zlib.crc32(tokens, split.tokens_crc32)
            split.starts_crc32 = zlib.crc32(starts, split.starts_crc32)
            self._ids[name], self._starts[name] = [], []
        log = b"".join(self._log)
        self._handles[PIECES].write(log)
        self._log_bytes += len(log)
        self._log = []

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for handle in self._handles.values():
            handle.flush()
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles.values():
            handle.close()

    def state(self) -> dict[str, Any]:
        """Return the sizes and checksums of what is written, as JSON values."""
        return {"splits": {name: asdict(split) for name, split in self.splits.items()}, "log_bytes": self._log_bytes}

    def checksums(self) -> dict[str, int]:
        """The CRC-32 of each token file and each file of starts."""
        found = {f"{name}.bin": split.tokens_crc32 for name, split in self.splits.items()}
        return found | {f"{name}.starts": split.starts_crc32 for name, split in self.splits.items()}
