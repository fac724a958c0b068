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
LARGE_BYTES = 100 << 20
"""For less text, stages that take seconds and the need of disk are not logged."""
MANY_TOKENS = 50_000_000
"""For fewer training tokens, the estimate of near-duplicates takes seconds."""
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

    def begin(self, name: str) -> None:
        """Find the state of an earlier process, and log what is prepared. Nothing is lost if this fails.

        Args:
            name: The name of the corpus, for the message.

        Raises:
            CorpusError: The source cannot be found.
        """
        self._state = self._earlier_state()
        self.source.pin(self._state.get("source"))  # first: the description names the revision
        self.log_line(f"preparing the corpus {name}: {self.source.described()}")
        if self._state:
            tokens = sum(split["tokens"] for split in self._state["files"]["splits"].values())
            self.log_line(f"going on with a preparation that was stopped after {tokens:,} tokens")

    def run(self) -> None:
        """Write all files that belong to the corpus, after `begin`. meta.json is the last of them.

        Raises:
            CorpusError: The text or the tokenizer cannot be read, or the text is too little.
            OSError: The files cannot be written.
        """
        state = self._state
        self.work.mkdir(parents=True, exist_ok=True)
        known = self._given_vocabulary()
        self._log_disk(self.config.vocab_size if known is None else known.vocab_size)
        assignments: dict[str, Assignment] = {"train": self._assignment("train")}
        known = known or self._trained_vocabulary(assignments["train"])
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
        if (self.source.size_bytes or 0) > LARGE_BYTES:
            self.log_line("computing the digests of the files")
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
            limit = self.limits[name]
            if limit is not None and split.tokens < limit:
                key = "limit_tokens" if name == "train" else "held_out_tokens"
                self.log_line(
                    f"note: {name} has {split.tokens:,} tokens, less than data.{key}={limit:,}: no more text was for it"
                )

    # ------------------------------------------------------------------------------------------------------- stages

    def _earlier_state(self) -> dict[str, Any]:
        """The state of an earlier process; empty if there is none that can be used."""
        try:
            state = read_json(self.work / STATE)
        except DamagedFile:
            state = {}
        if not state and self.work.exists() and not (self.work / "meta.json").exists():
            shutil.rmtree(self.work)
        return state

    def _assignment(self, part: str) -> Assignment:
        file = self.work / f"assignment-{part}.json"
        saved = read_json(file)
        if saved:
            numbers = {number: split for split, of_split in saved.pop("held_out").items() for number in of_split}
            return Assignment(**saved, held_out=numbers)
        tally = Tally()
        if self.source.is_read_twice and (self.source.size_bytes or 0) > LARGE_BYTES:
            self.log_line(f"reading the {part} text once to decide which documents are held out")
        made = assign(self.source, part, held_out_shares(self.source, part), tally)
        for remark in tally.remarks():
            self.log_line(f"note: {remark}")
        by_split: dict[str, list[int]] = {}
        for number, split in made.held_out.items():
            by_split.setdefault(split, []).append(number)
        write_json(file, {**asdict(made), "held_out": by_split})
        return made

    @property
    def _has_tokenizer(self) -> bool:
        return (self.work / "tokenizer_config.json").exists()  # the last of its files

    def _given_vocabulary(self) -> Vocabulary | None:
        """Return the vocabulary of the source or of data.tokenizer, which is copied. None if one is to be trained."""
        own, given = self.source.vocabulary(self.work, self.log_line), self.config.tokenizer
        if own is not None or given is None:
            return own
        if not self._has_tokenizer:
            copy_tokenizer(given, self.work, self.log_line)
        return vocabulary(self.work, given)

    def _trained_vocabulary(self, assignment: Assignment) -> Vocabulary:
        """Train a tokenizer, if it is not there yet, and return its vocabulary."""
        if not self._has_tokenizer:
            if self.source.size_bytes is None or self.source.size_bytes > LARGE_BYTES:
                self.log_line(f"training a tokenizer with {self.config.vocab_size:,} ids")
            texts = training_texts(self.source, assignment, TOKENIZER_TRAINING_CHARACTERS)
            train_tokenizer(texts, self.config.vocab_size, self.work)
        return vocabulary(self.work, None)

    def _log_disk(self, vocab_size: int) -> None:
        """Log how much of the disk a large corpus needs."""
        needed_bytes, free_bytes = needed_disk_bytes(self.source, vocab_size), shutil.disk_usage(self.work).free
        if needed_bytes is None:
            self.log_line(f"the size of the source is unknown; {in_units(free_bytes)} of the disk are free")
        elif needed_bytes > min(LARGE_BYTES, free_bytes):
            self.log_line(
                f"the corpus needs at most about {in_units(needed_bytes)} of the {in_units(free_bytes)} that are free"
            )

    # ------------------------------------------------------------------------------------------------ encode and write

    def _write_part(self, part: str, assignment: Assignment, place: _Place) -> None:
        tally = Tally(**place.tally)
        progress = _Progress(self, part, assignment.total_characters)
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
        if self.files.splits["train"].tokens > MANY_TOKENS:
            self.log_line("estimating the near-duplicates of held-out text in the training text")
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


def needed_disk_bytes(source: Source, vocab_size: int) -> int | None:
    """Return about how many bytes a corpus takes at most; None if its size is unknown.

    A token takes 2 or 4 bytes. Text has about 4 bytes for a token, and a compressed file 2.
    """
    token_bytes, limit = 2 if vocab_size <= 1 << 16 else 4, source.config.limit("limit_tokens")
    by_limit = None if limit is None else token_bytes * (limit + 2 * (source.config.limit("held_out_tokens") or 0))
    by_size = None if source.size_bytes is None else source.size_bytes * token_bytes // 2
    known = [needed_bytes for needed_bytes in (by_limit, by_size) if needed_bytes is not None]
    return min(known, default=None)


class _Progress:
    """Logs how far a part is, every few seconds."""

    def __init__(self, build: Build, part: str, total_characters: int) -> None:
        self.build, self.part, self.total_characters = build, part, total_characters
        self._splits = [build.files.splits[name] for name in (part, *held_out_shares(build.source, part))]
        self._began = self._logged = time.monotonic()
        self._first = self._bytes_and_tokens()
        self._begun = {"written": (self._began, self._share_written())}
        """Measure -> the first time at which its share was known, and the share."""

    def _bytes_and_tokens(self) -> tuple[int, int]:
        return sum(split.bytes for split in self._splits), sum(split.tokens for split in self._splits)

    def log(self) -> None:
        """Log a line if the last one is some seconds old."""
        now = time.monotonic()
        shares = {"written": self._share_written(), "read": min(1.0, self.build.source.share_read() or 0.0)}
        for name, share in shares.items():
            self._begun.setdefault(name, (now, share))
        if now - self._logged < LOG_SECONDS:
            return
        self._logged = now
        (first_bytes, first_tokens), (done_bytes, done_tokens) = self._first, self._bytes_and_tokens()
        mib_per_second = (done_bytes - first_bytes) / (now - self._began) / 2**20
        tokens_per_second = (done_tokens - first_tokens) / (now - self._began)
        text = (
            f"{self.part}: {done_tokens:,} tokens of {in_units(done_bytes)}, {mib_per_second:.1f} MiB/s, "
            f"{tokens_per_second:,.0f} tokens/s"
        )
        measure = max(shares, key=shares.__getitem__)
        share, (then, share_then) = shares[measure], self._begun[measure]
        if share > 0:
            text += f", {share:.0%}"
        if share > share_then:
            text += f", {_duration((now - then) * (1 - share) / (share - share_then))} left"
        self.build.log_line(text)

    def _share_written(self) -> float:
        """The share of the part that is written, by what will end it first; 0 if unknown."""
        limit = self.build.limits[self.part]
        by_tokens = self.build.files.splits[self.part].tokens / limit if limit else None
        characters = sum(split.characters for split in self._splits)
        by_characters = characters / self.total_characters if self.total_characters else None
        known = [each for each in (by_tokens, by_characters) if each is not None]
        return min(1.0, max(known, default=0.0))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
