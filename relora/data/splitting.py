"""Cut documents into pieces, and decide which pieces are held out."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from relora.data.decoding import CorpusError, Tally
from relora.data.source import SPLITS, Content, Document, Source, digest_of

FEW_DOCUMENTS = 100
"""With fewer documents, pieces are held out instead. Otherwise a held-out set would have one document or none."""
LONGEST_LINE_PIECES = 4
"""A line longer than this many pieces is cut within the line."""
LONG_DOCUMENT = 1 << 20
"""A longer document is encoded in pieces of this many characters or tokens, so that memory is bounded."""
MANY_ITEMS = 200_000
"""So many items are kept before those that will hardly be held out are dropped."""
HALF = 0.5
"""The share of a source's own validation split that becomes the test split, if the source has none."""
FILLED = 0.02
"""A held-out split is full when less than this share of its size is free."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, or a part of one."""

    split: str
    content: Content
    ends_document: bool


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which pieces of one part of a source are held out. All others are in the split `rest`."""

    rest: str
    piece_characters: int | None = None
    """The least length of the pieces that are assigned; None if whole documents are assigned."""
    held_out: dict[int, str] = field(default_factory=dict)
    """Number of a document, or with `piece_characters` of a piece -> its split."""
    total_characters: int = 0
    """Of the whole part; 0 if unknown."""
    shares: dict[str, float] = field(default_factory=dict)
    """Split -> share of the documents, for a source that is read once. The hash of a document decides."""

    def pieces(self, documents: Iterable[Document], first_item: int = 0) -> "Iterator[tuple[Document, int, Piece]]":
        """Yield (document, number of the next item, piece) for all pieces.

        Args:
            documents: The documents to cut.
            first_item: The number of the first document, or with `piece_characters` of its first piece.
        """
        item, by_piece = first_item, self.piece_characters is not None
        for document in documents:
            cutting = cut(document.chunks, self.piece_characters)
            waiting = next(cutting, None)
            if waiting is None:
                item += not by_piece
                continue
            split = self._split(item, waiting)
            while waiting is not None:
                content, waiting = waiting, next(cutting, None)
                if by_piece:
                    split = self._split(item, content)
                if by_piece or waiting is None:
                    item += 1
                yield document, item, Piece(split=split, content=content, ends_document=waiting is None)

    def _split(self, item: int, content: Content) -> str:
        if not self.shares:
            return self.held_out.get(item, self.rest)
        place = int.from_bytes(digest_of(content)[:8]) / 2**64
        for split, share in self.shares.items():
            if place < share:
                return split
            place -= share
        return self.rest


def held_out_shares(source: Source, part: str) -> dict[str, float]:
    """Return split -> the share of a part that is held out for it, for the splits that the source does not have."""
    missing = [split for split in SPLITS[1:] if split not in source.parts]
    if part == "train":
        if missing == ["test"]:
            return {}  # the test split is a half of the own validation split
        return {split: getattr(source.config, f"{split}_fraction") for split in missing}
    return {"test": HALF} if part == "validation" and missing == ["test"] else {}


def assign(source: Source, part: str, shares: dict[str, float], tally: Tally) -> Assignment:
    """Decide which pieces of a part are held out.

    In the order of their digests, documents fill the first split of `shares`, then the next. Each split is filled up to
    its share of the characters. Equal documents have equal digests, so they are all in the same split, and each of them
    counts. A new document moves only few other documents to another split. With fewer than FEW_DOCUMENTS documents,
    pieces are held out instead. A source that is read only once has shares of the digests' range instead.

    Args:
        source: The documents.
        part: One of the source's parts.
        shares: Held-out split -> share of the part.
        tally: Gets the counts of what reading changed or left out.

    Raises:
        CorpusError: No document fits into a held-out split, or the documents cannot be read.
    """
    if not source.is_read_twice:
        return Assignment(rest=part, shares=shares)
    if not shares:
        return Assignment(rest=part)
    spare = 2.0
    while True:
        smallest = _Smallest(spare * sum(shares.values()))
        documents = 0
        for document in source.documents(part, tally, None):
            smallest.add(*_digest_and_length(document.chunks))
            documents += 1
        piece_characters = None
        if documents < FEW_DOCUMENTS:
            piece_characters = max(256, smallest.total // 2000)
            smallest = _Smallest(spare * sum(shares.values()))
            for document in source.documents(part, Tally(), None):
                for content in cut(document.chunks, piece_characters):
                    smallest.add(digest_of(content), len(content))
        held_out = smallest.fill(shares)
        if held_out is not None:
            break
        spare, tally = 8 * spare, Tally()  # some sizes are very unequal: read again, and keep more
    for split, share in shares.items():
        if split not in held_out.values():
            raise CorpusError(
                f"{documents} documents of {smallest.total} characters leave none for {split} at "
                f"data.{split}_fraction={share}; use more text or a larger fraction"
                if part == "train"
                else f"the {part} split of {documents} documents and {smallest.total} characters is too short to give "
                f"half of it to {split}; use more text there"
            )
    return Assignment(rest=part, piece_characters=piece_characters, held_out=held_out, total_characters=smallest.total)


def training_texts(source: Source, assignment: Assignment, most_characters: float) -> Iterator[str]:
    """Yield the training text of a source, until it has so many characters. A tokenizer is trained on it."""
    read = 0
    for _, _, piece in assignment.pieces(source.documents("train", Tally())):
        if piece.split == "train":
            assert isinstance(piece.content, str)
            yield piece.content
            read += len(piece.content)
            if read >= most_characters:
                return


class _Smallest:
    """Collects the items with the smallest digests. Memory holds only those that can be held out, and some more."""

    def __init__(self, share: float) -> None:
        self.share = share
        """The share of all characters that is kept at least."""
        self.total = 0
        self._digests: list[bytes] = []
        self._numbers: list[int] = []
        self._lengths: list[int] = []
        self._count = 0
        self._limit = MANY_ITEMS
        self._largest: bytes | None = None
        """Items with larger digests are not kept; None while all are kept."""

    def add(self, digest: bytes, length: int) -> None:
        """Add the next item."""
        if self._largest is None or digest <= self._largest:
            self._digests.append(digest)
            self._numbers.append(self._count)
            self._lengths.append(length)
            if len(self._digests) >= self._limit:
                self._drop()
        self._count += 1
        self.total += length

    def _drop(self) -> None:
        order = sorted(range(len(self._digests)), key=self._digests.__getitem__)
        sums = np.cumsum([self._lengths[place] for place in order])
        last = int(np.searchsorted(sums, self.share * self.total))
        if last + 1 < len(order):
            self._largest = self._digests[order[last]]
            kept = sorted(place for place in order if self._digests[place] <= self._largest)
            self._digests = [self._digests[place] for place in kept]
            self._numbers = [self._numbers[place] for place in kept]
            self._lengths = [self._lengths[place] for place in kept]
        self._limit = max(MANY_ITEMS, 2 * len(self._digests))

    def fill(self, shares: dict[str, float]) -> dict[int, str] | None:
        """Return number -> split of the items that are held out; None if too few items were kept to decide."""
        lengths: dict[bytes, int] = {}
        for digest, length in zip(self._digests, self._lengths, strict=True):
            lengths[digest] = lengths.get(digest, 0) + length
        chosen: dict[bytes, str] = {}
        order = sorted(lengths)
        for split, share in shares.items():
            room = target = share * self.total
            for key in order:
                if key not in chosen and lengths[key] <= room:
                    chosen[key] = split
                    room -= lengths[key]
                if room < FILLED * target:
                    break
            else:
                if self._largest is not None:
                    return None
        numbers = zip(self._numbers, self._digests, strict=True)
        return {number: chosen[digest] for number, digest in numbers if digest in chosen}


def _digest_and_length(chunks: Iterable[Content]) -> tuple[bytes, int]:
    """Return the same digest as `digest_of` the whole document, and its length in characters or tokens."""
    digest, length = hashlib.blake2b(digest_size=12), 0
    for chunk in chunks:
        digest.update(chunk.encode("utf-8", "replace") if isinstance(chunk, str) else chunk.tobytes())
        length += len(chunk)
    return digest.digest(), length


def cut(chunks: Iterable[Content], piece_characters: int | None) -> Iterator[Content]:
    """Cut a document at line ends into pieces of at least `piece_characters`. The last piece may be shorter.

    A line longer than LONGEST_LINE_PIECES pieces is cut too. Token ids have no lines, and are cut anywhere. With None,
    the document is one piece, unless it is longer than LONG_DOCUMENT.
    """
    length, longest_line = piece_characters, LONGEST_LINE_PIECES
    if length is None:
        if isinstance(chunks, tuple) and len(chunks) == 1 and len(chunks[0]) <= LONG_DOCUMENT:
            yield chunks[0]  # the usual record
            return
        length, longest_line = LONG_DOCUMENT, 1
    parts: list[Content] = []
    gathered = 0
    for part in _parts(chunks, longest_line * length, length):
        parts.append(part)
        gathered += len(part)
        if gathered >= length:
            yield _joined(parts)
            parts, gathered = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[Content]) -> Content:
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if texts else np.concatenate([part for part in parts if not isinstance(part, str)])


def _parts(chunks: Iterable[Content], longest_line: int, longest_tokens: int) -> Iterator[Content]:
    """Yield the lines of a text, of any kind of line end. Longer lines are cut. Token ids are cut into equal parts."""
    rest = ""
    for chunk in chunks:
        if not isinstance(chunk, str):
            yield from (chunk[start : start + longest_tokens] for start in range(0, len(chunk), longest_tokens))
            continue
        every = (rest + chunk).splitlines(keepends=True)
        rest = every.pop()  # the next chunk may continue the last line, or its line end
        for line in every:
            yield from (line[start : start + longest_line] for start in range(0, len(line), longest_line))
        if len(rest) > longest_line:
            even = (len(rest) - 1) // longest_line * longest_line
            yield from (rest[start : start + longest_line] for start in range(0, even, longest_line))
            rest = rest[even:]
    yield from (rest[start : start + longest_line] for start in range(0, len(rest), longest_line))
