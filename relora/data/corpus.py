"""Text into token files, once: the one importer of datasets and tokenizers.

A corpus is a folder with one memory-mapped token file a split, the tokenizer, and a meta.json that identifies both by
digest. It is built under a lock and appears under its name only when it is complete.
"""

import codecs
import glob
import hashlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from relora.common import signals
from relora.common.errors import DamagedFile, RunError
from relora.common.files import check_crc32, crc32_of, publishing, read_json, reason
from relora.config.groups import RECORD_SUFFIXES, DataConfig, text_files, tokenizer_file
from relora.data.sequences import TokenSequences

FORMAT = 2
SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"
FEW_DOCUMENTS = 100
"""Below this many documents, documents are split by pieces, or the held-out sets would be one document or none."""
LONGEST_LINE_PIECES = 4
"""A line longer than this many pieces is cut inside."""
TOKENIZER_TRAINING_BYTES = 200_000_000
"""A BPE vocabulary does not change any more beyond this much text."""
BATCH_PIECES = 512
TOLD = 3
"""Exit code of a process that says on stderr what a person can mend."""
MADE_AGAIN = "remove its folder, and the next launch prepares the corpus anew"
"""What mends a corpus that its run cannot mend by itself."""
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class CorpusError(RunError):
    """The text cannot be read or is too little."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    corpus_digest: str
    """Of the text of every split."""
    tokenizer_digest: str
    vocab_size: int
    end_of_text_id: int
    dtype: str
    splits: dict[str, dict[str, int]]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json; tokenizer_config.json stands beside it."""
        return self.folder / "tokenizer.json"

    @property
    def identity(self) -> dict[str, str]:
        """What tells this corpus from any other."""
        return {"corpus_digest": self.corpus_digest, "tokenizer_digest": self.tokenizer_digest}

    def sequences(self, split: str, sequence_length_tokens: int) -> TokenSequences:
        """One split, cut. Raises CorpusError where it is shorter than one sequence."""
        try:
            return TokenSequences(self.folder / f"{split}.bin", self.dtype, sequence_length_tokens)
        except ValueError as error:
            raise CorpusError(f"the {split} split is too short: {error}") from error


def prepare(config: DataConfig, corpora: Path, log_line: Callable[[str], None]) -> Corpus:
    """The corpus that `config` describes, built in the folder `corpora` unless it stands there already.

    Raises CorpusError for text that cannot be read or is too little.
    """
    files = _source_files(config)
    folder = _folder(config, files, corpora)
    corpus = _standing(folder, lambda message: None)
    if corpus is None:
        corpora.mkdir(parents=True, exist_ok=True)
        with FileLock(corpora / f"{folder.name}.lock"):
            corpus = _standing(folder, log_line)
            if corpus is None:
                _build(config, files, folder, log_line)
                corpus = load(folder)
    return corpus


def load(folder: Path) -> Corpus:
    """A corpus that stands already. Raises DamagedFile where a file of it is not what meta.json tells of it.

    Every byte is read, so a start pays about a second for each GB of tokens that memory holds, and the disk's time for
    the rest: little beside training on a flipped token. A corpus of before there were checksums has its sizes checked.
    """
    meta = read_json(folder / "meta.json")
    names = ("corpus_digest", "tokenizer_digest", "vocab_size", "end_of_text_id", "dtype", "splits")
    try:
        corpus = Corpus(folder=folder, **{name: meta[name] for name in names})
        for split in SPLITS:
            wanted = corpus.splits[split]["tokens"] * np.dtype(corpus.dtype).itemsize
            file = folder / f"{split}.bin"
            if (found := file.stat().st_size) != wanted:
                raise DamagedFile(file, f"it has {found} bytes and should have {wanted}", MADE_AGAIN)
        for name, wanted in meta.get("crc32", {}).items():
            check_crc32(folder / name, wanted, MADE_AGAIN)
        own = meta.pop("own_crc32", None)
        if own not in (None, _crc32_of_values(meta)):
            raise DamagedFile(folder / "meta.json", "its values are not those that were written", MADE_AGAIN)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(folder / "meta.json", f"it lacks or garbles {error}", MADE_AGAIN) from error
    except OSError as error:
        raise DamagedFile(Path(error.filename or folder), reason(error), MADE_AGAIN) from error
    return corpus


def _crc32_of_values(meta: dict[str, Any]) -> str:
    """The checksum of a meta.json without its own."""
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _standing(folder: Path, log_line: Callable[[str], None]) -> Corpus | None:
    """The undamaged corpus that stands there; a damaged one is told of, and is to be built anew."""
    if not (folder / "meta.json").exists():
        return None
    try:
        return load(folder)
    except DamagedFile as error:
        log_line(f"{error.path} cannot be read: {error.why}; the corpus is prepared anew")
        return None


def prepare_apart(config: DataConfig, corpora: Path, log_line: Callable[[str], None]) -> Corpus:
    """As `prepare`, but what is built is built by another process: its memory is none of this one's.

    What a process has once held, its allocator does not give back whole, and the peak memory of the run that happens
    to build the corpus would be measured on top of it.
    """
    corpus = _standing(folder_of(config, corpora), lambda message: None)
    if corpus is None:
        command = [sys.executable, "-m", "relora.data.corpus", json.dumps(asdict(config)), str(corpora)]
        with tempfile.TemporaryFile("w+") as errors:
            # Ctrl-C and SLURM's warning come to all processes of a group: this one answers for both, by SIGTERM.
            with signals.blocked((signal.SIGINT, signal.SIGUSR2)):
                started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            with started as child, signals.raising():  # a text may take hours
                try:
                    assert child.stdout is not None
                    for line in child.stdout:
                        log_line(line.rstrip("\n"))
                    child.wait()
                except BaseException:
                    child.terminate()
                    raise
            errors.seek(0)
            problem = errors.read()
        if child.returncode:
            signals.check()
        if child.returncode == TOLD:
            raise CorpusError(problem.strip())
        if child.returncode:
            raise RuntimeError(f"preparing the corpus ended with {child.returncode}:\n{problem}")
        corpus = prepare(config, corpora, log_line)
    return corpus


def folder_of(config: DataConfig, corpora: Path) -> Path:
    """Where the corpus stands or will stand; it is prepared when its meta.json is there."""
    return _folder(config, _source_files(config), corpora)


def _folder(config: DataConfig, files: list[Path], corpora: Path) -> Path:
    return corpora / f"{config.name}-{_fingerprint(config, files)}"


# ---------------------------------------------------------------------------------------------------- documents


def _source_files(config: DataConfig) -> list[Path]:
    if config.name == "text":
        assert config.path is not None
        files = text_files(Path(config.path))
        if not files:
            raise CorpusError(f"data.path={config.path} holds no text any more")
        return files
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_EXCLUDED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise CorpusError(f"the standard library in {root} has no sources; use data=text data.path=...")
    return files


def _fingerprint(config: DataConfig, files: list[Path]) -> str:
    """Finds a prepared corpus without reading the text: settings, and each file's path, size and time."""
    settings = {key: value for key, value in asdict(config).items() if key != "sequence_length_tokens"}
    tokenizer = tokenizer_file(config.tokenizer).read_bytes() if config.tokenizer else b""
    stats = ((path, path.stat()) for path in files)
    listing = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = json.dumps([FORMAT, settings, listing, hashlib.sha256(tokenizer).hexdigest()])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _documents(files: list[Path], text_field: str) -> Iterator[str]:
    """Every non-empty document: a text file is one, a jsonl or parquet file has one a record."""
    for path in files:
        if path.suffix in RECORD_SUFFIXES:
            yield from filter(None, _records(path, text_field))
        elif text := path.read_bytes().decode("utf-8", errors="replace"):  # read_text would change line ends
            yield text


def _records(path: Path, text_field: str) -> Iterator[str]:
    from datasets import load_dataset

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    if kind == "json" and _is_blank(path):
        return
    number = 0
    try:
        for number, record in enumerate(
            load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True), start=1
        ):
            text = record.get(text_field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"{path}, record {number}: field {text_field!r} holds no text; the record has "
                    f"{', '.join(record)}; set data.text_field"
                )
            yield text
    except CorpusError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds
        raise CorpusError(f"{path} cannot be read as {kind} after record {number}: {error}") from error


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(line.strip() for line in file)


def _pieces(document: str, piece_characters: int | None) -> Iterator[str]:
    """The document whole, or cut at line ends into pieces of at least `piece_characters`; longer lines are cut too."""
    if piece_characters is None:
        yield document
        return
    parts: list[str] = []
    length = 0
    for line in document.splitlines(keepends=True):
        for start in range(0, len(line), LONGEST_LINE_PIECES * piece_characters):
            part = line[start : start + LONGEST_LINE_PIECES * piece_characters]
            parts.append(part)
            length += len(part)
            if length >= piece_characters:
                yield "".join(parts)
                parts, length = [], 0
    if parts:
        yield "".join(parts)


def _key(piece: str) -> bytes:
    return hashlib.blake2b(piece.encode("utf-8", "replace"), digest_size=12).digest()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the text is split."""

    piece_characters: int | None
    held_out: dict[bytes, str]
    """Digest of a piece -> "validation" or "test"; the rest is for training."""

    def assign(self, files: list[Path], text_field: str) -> Iterator[tuple[str, str, bool]]:
        """(split, piece, whether a document ends here) of the whole corpus, in its own order."""
        for document in _documents(files, text_field):
            pieces = list(_pieces(document, self.piece_characters))
            for number, piece in enumerate(pieces, start=1):
                yield self.held_out.get(_key(piece), "train"), piece, number == len(pieces)


def _plan(config: DataConfig, files: list[Path]) -> _Plan:
    """Split by document: in the order of their digests, documents fill validation, then test, up to their shares.

    Equal documents have equal digests, so none stands on both sides, and all of them count; adding a document moves
    few others.
    """
    sizes: Counter[bytes] = Counter()
    documents = total_characters = 0
    for document in _documents(files, config.text_field):
        sizes[_key(document)] += len(document)
        documents += 1
        total_characters += len(document)
    piece_characters = None
    if documents < FEW_DOCUMENTS:
        piece_characters = max(256, total_characters // 2000)
        sizes = Counter()
        for document in _documents(files, config.text_field):
            for piece in _pieces(document, piece_characters):
                sizes[_key(piece)] += len(piece)
    held_out: dict[bytes, str] = {}
    order = sorted(sizes)
    for split, share in (("validation", config.validation_fraction), ("test", config.test_fraction)):
        room = target = share * total_characters
        for key in order:
            if key not in held_out and sizes[key] <= room:
                held_out[key] = split
                room -= sizes[key]
            if room < 0.02 * target:
                break
        if room == target:
            raise CorpusError(
                f"{documents} documents of {total_characters} characters leave none for {split} at "
                f"data.{split}_fraction={share}; take more text or a larger fraction"
            )
    return _Plan(piece_characters=piece_characters, held_out=held_out)


# ------------------------------------------------------------------------------------------------ tokens on disk


def _build(config: DataConfig, files: list[Path], folder: Path, log_line: Callable[[str], None]) -> None:
    started = time.perf_counter()
    log_line(f"preparing the corpus {folder.name}: {len(files)} files")
    plan = _plan(config, files)
    with publishing(folder) as temporary:
        end_of_text = (
            _train_tokenizer(config, files, plan, temporary)
            if config.tokenizer is None
            else _copy_tokenizer(config.tokenizer, temporary)
        )
        meta = _write_tokens(config, files, plan, temporary, end_of_text)
        meta["crc32"] = {path.name: crc32_of(path) for path in sorted(temporary.iterdir())}
        meta["own_crc32"] = _crc32_of_values(meta)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    counts = ", ".join(f"{name} {meta['splits'][name]['tokens']:,}" for name in SPLITS)
    log_line(
        f"corpus ready in {time.perf_counter() - started:.0f} s: tokens {counts}; vocabulary {meta['vocab_size']:,}"
    )


def _train_tokenizer(config: DataConfig, files: list[Path], plan: _Plan, folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def training_text() -> Iterator[str]:
        read = 0
        for split, piece, _ in plan.assign(files, config.text_field):
            if split == "train":
                read += len(piece)
                yield piece
                if read >= TOKENIZER_TRAINING_BYTES:
                    return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **special}, indent=2) + "\n")
    return END_OF_TEXT


def _copy_tokenizer(source: str, folder: Path) -> str:
    """Take a tokenizer of one's own; return its end-of-text token."""
    file = tokenizer_file(source)
    # Editors on Windows write a byte-order mark, which the libraries do not read.
    (folder / "tokenizer.json").write_bytes(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    try:
        made = read_json(file)
        settings = read_json(file.with_name("tokenizer_config.json"))
    except DamagedFile as error:
        raise CorpusError(f"data.tokenizer={source} is no tokenizer: {error}") from error
    settings = settings or {"tokenizer_class": "PreTrainedTokenizerFast"}
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        added = [entry["content"] for entry in made.get("added_tokens", [])]
        token = next((known for known in (END_OF_TEXT, "</s>", "<eos>") if known in added), None)
    if token is None:
        raise CorpusError(
            f"the tokenizer {file} names no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}, indent=2) + "\n")
    return token


def _write_tokens(config: DataConfig, files: list[Path], plan: _Plan, folder: Path, end_of_text: str) -> dict[str, Any]:
    """Encode every split into its file; return the meta.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises Exception itself
        raise CorpusError(f"data.tokenizer={config.tokenizer} cannot be read as a tokenizer: {error}") from error
    vocab_size, end_of_text_id = tokenizer.get_vocab_size(), tokenizer.token_to_id(end_of_text)
    if end_of_text_id is None:
        raise CorpusError(f"the tokenizer {config.tokenizer} does not know its own end-of-text token {end_of_text!r}")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts = {name: {"tokens": 0, "pieces": 0} for name in SPLITS}
    digest = hashlib.blake2b(digest_size=16)
    handles = {name: (folder / f"{name}.bin").open("wb") for name in SPLITS}
    pending: list[tuple[str, str, bool]] = []

    def write_pending() -> None:
        encoded = tokenizer.encode_batch_fast([piece for _, piece, _ in pending], add_special_tokens=False)
        for (split, _, ends), encoding in zip(pending, encoded, strict=True):
            ids = [*encoding.ids, end_of_text_id] if ends else encoding.ids
            handles[split].write(np.asarray(ids, dtype=dtype).tobytes())
            counts[split]["tokens"] += len(ids)
            counts[split]["pieces"] += 1
        pending.clear()

    try:
        for split, piece, ends in plan.assign(files, config.text_field):
            digest.update(split.encode() + _key(piece) + bytes([ends]))
            pending.append((split, piece, ends))
            if len(pending) == BATCH_PIECES:
                write_pending()
        write_pending()
    finally:
        for handle in handles.values():
            handle.close()
    return {
        "format": FORMAT,
        "source": asdict(config),
        "python": sys.version.split()[0] if config.name == "stdlib" else None,
        "corpus_digest": digest.hexdigest(),
        "tokenizer_digest": hashlib.blake2b((folder / "tokenizer.json").read_bytes(), digest_size=16).hexdigest(),
        "vocab_size": vocab_size,
        "end_of_text_id": end_of_text_id,
        "dtype": dtype,
        "splits": counts,
    }


def _main(settings: str, corpora: str) -> int:
    """`prepare` in this process; the exit code."""
    try:
        prepare(DataConfig(**json.loads(settings)), Path(corpora), lambda message: print(message, flush=True))
    except (CorpusError, OSError) as error:
        print(error, file=sys.stderr)
        return TOLD
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
