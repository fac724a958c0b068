"""Write the files of a corpus: read, split, encode and write, in bounded memory, and go on after a kill.

The work folder has a state file. It is written every few seconds, after the files are on the disk. A process that goes
on cuts the files to the sizes in the state, and reads on from the place in the state. So the result has the same bytes
as without the kill.
"""

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from relora.common.errors import DamagedFile
from relora.common.files import READ_BYTES, crc32_of, read_json, write_json
from relora.common.tables import in_units
from relora.data.decoding import CorpusError, Tally
from relora.data.overlap import near_duplicates
from relora.data.source import SPLITS, Source, Vocabulary
from relora.data.splitting import Assignment, Piece, assign, held_out_shares, training_texts
from relora.data.tokenizer import TOKENIZER_TRAINING_CHARACTERS, copy_tokenizer, train_tokenizer, vocabulary
from relora.data.workers import Encoder, Ids, usable_cpus
from relora.data.writer import PIECES, SplitFiles

FORMAT = 4
"""The format of a prepared corpus."""
BATCH_PIECES = 512
BATCH_CHARACTERS = 1 << 20
COMMIT_SECONDS = 5.0
"""A killed preparation repeats at most the work of this time, and what was read since the last cursor."""
LOG_SECONDS = 10.0
STATE = "state.json"


@dataclass(kw_only=True)
class _Place:
    """A place in the reading of a part."""

    cursor: Any = None
    item: int = 0
    """Number of the first item at the cursor."""
    tally: dict[str, int] = field(default_factory=lambda: asdict(Tally()))
    """The counts at the cursor."""
    pieces_after: int = 0
    """Pieces from the cursor to this place."""
    is_end: bool = False
    """Whether the part is complete."""


@dataclass(kw_only=True)
class _Batch:
    pieces: list[Piece]
    end: _Place
    """The place after the last piece."""

    @property
    def texts(self) -> list[str]:
        return [piece.content for piece in self.pieces if isinstance(piece.content, str)]


class Build:
    """Builds one corpus in a work folder."""

    def __init__(
        self, source: Source, work: Path, log_line: Callable[[str], None], *, workers: int | None = None
    ) -> None:
        """Prepare a build, or the rest of one that was killed.

        Args:
            source: The documents.
            work: The work folder. It may have the files of an earlier process.
            log_line: Called with each message for the user.
            workers: Processes that encode; None for one for each CPU.
        """
        self.source, self.work, self.log_line = source, work, log_line
        self.workers = usable_cpus() if workers is None else workers
        self.config = source.config
        self.limits = {"train": self.config.limit("limit_tokens")}
        self.limits |= dict.fromkeys(SPLITS[1:], self.config.limit("held_out_tokens"))

    def run(self) -> None:
        """Write all files that belong to the corpus. meta.json is the last of them.

        Raises:
            CorpusError: The text or the tokenizer cannot be read, or the text is too little.
            OSError: The files cannot be written.
        """
        state = self._earlier_state()
        self.source.pin(state.get("source"))
        self.work.mkdir(parents=True, exist_ok=True)
        assignments: dict[str, Assignment] = {"train": self._assignment("train")}
        known = self._vocabulary(assignments["train"])
        self.files = SplitFiles(self.work, known, state.get("files"))
        try:
            for part in self.source.parts[self.source.parts.index(state.get("part", "train")) :]:
                place = _Place(**state.pop("place", {}))
                if place.is_end:
                    continue
                assignments[part] = assignments.get(part) or self._assignment(part)
                self._write_part(part, assignments[part], place)
                place.is_end = True
                self._commit(part, place)
        finally:
            self.files.close()
        self.source.check_unchanged()
        self._check_splits()
        write_json(self.work / "source.json", self.source.provenance())
        meta = self._meta(known)
        write_json(self.work / "meta.json", {**meta, "own_crc32": crc32_of_values(meta)})

    def remove_state(self) -> None:
        """Remove the files that a complete corpus does not need."""
        for name in (STATE, PIECES, *(f"assignment-{part}.json" for part in SPLITS)):
            (self.work / name).unlink(missing_ok=True)

    def _check_splits(self) -> None:
        """Raise CorpusError if a split is empty."""
        for name, split in self.files.splits.items():
            if split.tokens == 0:
                remedy = "use more text"
                if name not in self.source.parts:
                    remedy += f", or a larger data.{name}_fraction={getattr(self.config, f'{name}_fraction')}"
                raise CorpusError(f"the text leaves none for {name}; {remedy}")

    # ------------------------------------------------------------------------------------------------------- stages

    def _earlier_state(self) -> dict[str, Any]:
        """The state of an earlier process; empty if there is none that can be used."""
        try:
            state = read_json(self.work / STATE)
        except DamagedFile:
            state = {}
        if state:
            tokens = sum(split["tokens"] for split in state["files"]["splits"].values())
            self.log_line(f"going on with a preparation that was stopped after {tokens:,} tokens")
        elif self.work.exists():
            shutil.rmtree(self.work)
        return state

    def _assignment(self, part: str) -> Assignment:
        file = self.work / f"assignment-{part}.json"
        saved = read_json(file)
        if saved:
            numbers = {number: split for split, of_split in saved.pop("held_out").items() for number in of_split}
            return Assignment(**saved, held_out=numbers)
        tally = Tally()
        made = assign(self.source, part, held_out_shares(self.source, part), tally)
        for remark in tally.remarks():
            self.log_line(f"note: {remark}")
        by_split: dict[str, list[int]] = {}
        for number, split in made.held_out.items():
            by_split.setdefault(split, []).append(number)
        write_json(file, {**asdict(made), "held_out": by_split})
        return made

    def _vocabulary(self, assignment: Assignment) -> Vocabulary:
        """Make the tokenizer of the corpus, if it is not there yet, and return its vocabulary."""
        own = self.source.vocabulary(self.work, self.log_line)
        if own is not None:
            return own
        given, done = self.config.tokenizer, self.work / "tokenizer_config.json"
        if not done.exists():  # the last of its files
            if given is None:
                texts = training_texts(self.source, assignment, TOKENIZER_TRAINING_CHARACTERS)
                train_tokenizer(texts, self.config.vocab_size, self.work)
            else:
                copy_tokenizer(given, self.work, self.log_line)
        return vocabulary(self.work, given)

    # ------------------------------------------------------------------------------------------------ encode and write

    def _write_part(self, part: str, assignment: Assignment, place: _Place) -> None:
        tally = Tally(**place.tally)
        progress = _Progress(self, part, assignment.total_characters if part == "train" else 0)
        committed = time.monotonic()
        batches = self._batches(part, assignment, place, tally)
        try:
            for batch, encoded in self._encoded(batches):
                texts = iter(encoded)
                is_enough = False
                for piece in batch.pieces:
                    ids = next(texts) if isinstance(piece.content, str) else piece.content
                    # The reading is ahead of the writing. So the end is decided here, in the order of the pieces.
                    is_enough = is_enough or self._is_enough(part, piece.split)
                    if not is_enough and not self._is_full(piece.split):
                        self.files.add(piece, ids)
                self.files.write()
                if is_enough:
                    break
                vars(place).update(vars(batch.end))
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit(part, place)
                    committed = time.monotonic()
                progress.log()
        finally:
            batches.close()
        if not (self.source.is_read_twice and held_out_shares(self.source, part)):  # else they are logged already
            for remark in tally.remarks():
                self.log_line(f"note: {remark}")

    def _encoded(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, list[Ids]]]:
        if not self.source.is_text:
            return ((batch, []) for batch in batches)
        encoder = Encoder[_Batch](self.work / "tokenizer.json", self.config.tokenizer, self.workers)
        return encoder.encoded(batches)

    def _batches(self, part: str, assignment: Assignment, begin: _Place, tally: Tally) -> Generator[_Batch]:
        """Yield the pieces of a part from a place on, in batches. Pieces of full splits are left out."""
        skip = begin.pieces_after
        now = _Place(cursor=begin.cursor, item=begin.item, tally=begin.tally)
        item, last, characters = begin.item, None, 0
        pieces: list[Piece] = []
        splits = (part, *held_out_shares(self.source, part))
        documents = self.source.documents(part, tally, begin.cursor)
        for document, next_item, piece in assignment.pieces(documents, begin.item):
            if document is not last and document.cursor is not None and last is not None:
                now = _Place(cursor=document.cursor, item=item, tally=document.counts)
            last, item = document, next_item
            now.pieces_after += 1
            if skip > 0:
                skip -= 1
                continue
            if self._is_full(piece.split):
                if self._is_enough(part, piece.split) or all(map(self._is_full, splits)):
                    break
                continue
            pieces.append(piece)
            characters += len(piece.content)
            if len(pieces) == BATCH_PIECES or characters >= BATCH_CHARACTERS:
                yield _Batch(pieces=pieces, end=_Place(**vars(now)))
                pieces, characters = [], 0
        yield _Batch(pieces=pieces, end=_Place(**vars(now)))

    def _is_full(self, split: str) -> bool:
        limit = self.limits[split]
        return limit is not None and self.files.splits[split].tokens >= limit

    def _is_enough(self, part: str, split: str) -> bool:
        """Whether a part ends at a piece of this split: a source that is read once ends when its own split is full."""
        return part == split == "train" and not self.source.is_read_twice and self._is_full(split)

    def _commit(self, part: str, place: _Place) -> None:
        """Write the state, after all that it describes is on the disk."""
        self.files.sync()
        place_and_files = {"place": asdict(place), "files": self.files.state()}
        write_json(self.work / STATE, {**place_and_files, "part": part, "source": self.source.pinned()})

    def _meta(self, known: Vocabulary) -> dict[str, Any]:
        """Return the values of meta.json."""
        corpus_digest = hashlib.blake2b(digest_size=16)
        with (self.work / PIECES).open("rb") as file:
            while piece := file.read(READ_BYTES):
                corpus_digest.update(piece)
        tokenizer = self.work / "tokenizer.json"
        near = near_duplicates(self.work, known.dtype)
        settled = tokenizer.read_bytes() if tokenizer.exists() else json.dumps(asdict(known)).encode()
        small = [self.work / name for name in ("tokenizer.json", "tokenizer_config.json", "source.json")]
        return {
            "format": FORMAT,
            "source": asdict(self.config),
            "corpus_digest": corpus_digest.hexdigest(),
            "tokenizer_digest": hashlib.blake2b(settled, digest_size=16).hexdigest(),
            "vocab_size": known.vocab_size,
            "end_of_text_id": known.end_of_text_id,
            "dtype": known.dtype,
            "splits": {name: split.counts() for name, split in self.files.splits.items()},
            "near_duplicates": near,
            "crc32": {
                **{name: f"{value:08x}" for name, value in self.files.checksums().items()},
                **{path.name: crc32_of(path) for path in small if path.exists()},
            },
        }


def crc32_of_values(meta: dict[str, Any]) -> str:
    """The checksum of the values of a meta.json, without the checksum itself."""
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


class _Progress:
    """Logs how far a part is, every few seconds."""

    def __init__(self, build: Build, part: str, total_characters: int) -> None:
        self.build, self.part, self.total_characters = build, part, total_characters
        self.began = self.logged = time.monotonic()
        self.first = self._done()

    def _done(self) -> tuple[int, int, int]:
        splits = self.build.files.splits.values()
        return (
            sum(split.bytes for split in splits),
            sum(split.tokens for split in splits),
            sum(split.characters for split in splits),
        )

    def log(self) -> None:
        """Log a line if the last one is some seconds old."""
        now = time.monotonic()
        if now - self.logged < LOG_SECONDS:
            return
        self.logged = now
        done, seconds = self._done(), now - self.began
        mib_per_second = (done[0] - self.first[0]) / seconds / 2**20
        tokens_per_second = (done[1] - self.first[1]) / seconds
        text = (
            f"{done[1]:,} tokens of {in_units(done[0])}, {mib_per_second:.1f} MiB/s, {tokens_per_second:,.0f} tokens/s"
        )
        share = self._share(done)
        if share is not None and share > 0:
            begun = self._share(self.first) or 0.0
            left = seconds * (1 - share) / (share - begun) if share > begun else 0.0
            text += f", {share:.0%}, {_duration(left)} left"
        self.build.log_line(text)

    def _share(self, done: tuple[int, int, int]) -> float | None:
        limit = self.build.limits["train"] if self.part == "train" else None
        by_tokens = done[1] / limit if limit else None
        by_characters = done[2] / self.total_characters if self.total_characters else None
        shares = [share for share in (by_tokens, by_characters) if share is not None]
        return min(1.0, max(shares)) if shares else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
