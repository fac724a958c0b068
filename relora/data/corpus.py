"""Prepare corpora, find them again, and check them when they are loaded.

A corpus is a folder with one memory-mapped token file for each split, the tokenizer, and a meta.json with the digests
of both. It is built under a lock and gets its name only when it is complete.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from relora.common import signals
from relora.common.errors import ConfigError, DamagedFile, RunError
from relora.common.files import (
    check_crc32,
    crc32_of,
    naming,
    publish,
    publishing,
    read_json,
    reason,
    system_error,
    write_json,
)
from relora.common.tables import in_units
from relora.config.data import SEQUENCE_KEYS, DataConfig, HubConfig, TextConfig, TokensConfig
from relora.config.groups import LARGEST_MODEL
from relora.config.mixture import MixtureConfig, data_config
from relora.data.building import FORMAT, LARGE_BYTES, Build, crc32_of_values, needed_disk_bytes
from relora.data.decoding import CorpusError, Unfinished
from relora.data.mixture import MixedSequences, counts, digest, shared_tokenizer
from relora.data.overlap import described
from relora.data.sequences import PaddedSequences, Sequences, TokenSequences
from relora.data.source import SPLITS, Source
from relora.data.text import StdlibSource, TextSource
from relora.data.tokenizer import tokenizer_identity
from relora.data.tokens import TokensSource

USER_ERROR = 3
"""Exit code of the process that builds a corpus when its stderr is an error message for the user."""
REMEDY = "remove its folder, and the next launch prepares the corpus again"
"""The remedy in messages about a damaged corpus that the run does not repair by itself."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus on disk."""

    folder: Path
    corpus_digest: str
    """Digest of the text of all splits."""
    tokenizer_digest: str
    vocab_size: int
    end_of_text_id: int
    dtype: str
    splits: dict[str, dict[str, int]]
    parts: "dict[str, Corpus]" = field(default_factory=dict)
    """The corpora of a mixture, by the name of their source."""
    shares: dict[str, int] = field(default_factory=dict)
    """Of each part: its sequences among MIXTURE_CYCLE."""

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json. tokenizer_config.json is in the same folder. None for token ids without a tokenizer."""
        file = self.folder / "tokenizer.json"
        return file if file.exists() else None

    @property
    def identity(self) -> dict[str, str]:
        """The digests that identify this corpus."""
        return {"corpus_digest": self.corpus_digest, "tokenizer_digest": self.tokenizer_digest}

    def sequences(self, split: str, config: DataConfig) -> Sequences:
        """Return one split as the sequences that `config` describes.

        Raises:
            CorpusError: The split is shorter than one sequence.
            DamagedFile: A file is missing.
        """
        if self.parts:
            parts = {name: (part.sequences(split, config), self.shares[name]) for name, part in self.parts.items()}
            try:
                return MixedSequences(parts, held_out=split != "train")
            except ValueError as error:
                raise CorpusError(f"the {split} split is too short: {error}") from error
        path, starts = self.folder / f"{split}.bin", self.folder / f"{split}.starts"
        length = config.sequence_length_tokens
        try:
            if config.packing == "pad":
                return PaddedSequences(path, self.dtype, length, starts=starts)
            needed = None if config.attend_across_documents else starts
            return TokenSequences(path, self.dtype, length, starts=needed)
        except ValueError as error:
            raise CorpusError(f"the {split} split is too short: {error}") from error
        except FileNotFoundError as error:
            raise DamagedFile(Path(error.filename), "it is missing", REMEDY) from error


def prepare(
    config: DataConfig, corpora: Path, log_line: Callable[[str], None], *, workers: int | None = None
) -> Corpus:
    """Load the corpus that `config` describes. Build it first if it is missing or damaged.

    Args:
        config: The text, its splits and its tokenizer.
        corpora: The folder that holds all prepared corpora.
        log_line: Called with each message about the building.
        workers: Processes that encode; None for one for each CPU.

    Raises:
        CorpusError: The text cannot be read or is too little.
    """
    source = None if isinstance(config, MixtureConfig) else source_of(config)
    folder = folder_of(config, corpora, source)
    corpus = _prepared(folder, lambda message: None)
    if corpus is None:
        corpora.mkdir(parents=True, exist_ok=True)
        with _locked(corpora / f"{folder.name}.lock", log_line):
            corpus = _prepared(folder, log_line)
            if corpus is None:
                if isinstance(config, MixtureConfig):
                    _build_mixture(config, folder, log_line, workers)
                else:
                    assert source is not None
                    _build(source, folder, log_line, workers)
                corpus = load(folder)
    return corpus


@contextmanager
def _locked(path: Path, log_line: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a corpus. Log it if another process has the lock, which may be for hours."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log_line(f"another process prepares the corpus {path.stem}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def source_of(config: DataConfig) -> Source:
    """Return the source of the documents. Raises CorpusError if it has none."""
    if isinstance(config, TextConfig):
        return TextSource(config)
    if isinstance(config, TokensConfig):
        return TokensSource(config)
    if isinstance(config, HubConfig):
        from relora.data.hub import HubSource

        return HubSource(config)
    assert not isinstance(config, MixtureConfig)
    return StdlibSource(config)


def load(folder: Path) -> Corpus:
    """Load a prepared corpus. Raises DamagedFile if a file does not match meta.json.

    Every byte is read at the first time, which takes about a second for each GB that is cached in memory, and the
    disk's time for the rest. This costs little compared with training on a damaged token. Later, only the sizes, the
    times and the inodes of the files are compared with those of the first time.
    """
    meta = read_json(folder / "meta.json")
    names = ("corpus_digest", "tokenizer_digest", "vocab_size", "end_of_text_id", "dtype", "splits")
    try:
        own = meta.pop("own_crc32", None)
        if own not in (None, crc32_of_values(meta)):
            raise DamagedFile(folder / "meta.json", "its values differ from those that were written", REMEDY)
        parts = {name: load(folder.with_name(own)) for name, own in meta.get("parts", {}).items()}
        values = {name: meta[name] for name in names}
        corpus = Corpus(folder=folder, **values, parts=parts, shares=meta.get("shares", {}))
        for split in () if parts else SPLITS:
            wanted = corpus.splits[split]["tokens"] * np.dtype(corpus.dtype).itemsize
            file = folder / f"{split}.bin"
            if (found := file.stat().st_size) != wanted:
                raise DamagedFile(file, f"it has {found} bytes and should have {wanted}", REMEDY)
        _check_sums(folder, meta.get("crc32", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(folder / "meta.json", f"a value is missing or wrong: {error}", REMEDY) from error
    except OSError as error:
        raise DamagedFile(Path(error.filename or folder), reason(error), REMEDY) from error
    return corpus


def _check_sums(folder: Path, crc32: dict[str, str]) -> None:
    """Compare the files with their checksums, unless that was done since they last changed. Raises DamagedFile."""
    stamps = {name: _stamp(folder / name) for name in sorted(crc32)}
    checked = folder.with_name(f"{folder.name}.checked")
    with suppress(DamagedFile):
        if read_json(checked) == {"crc32": crc32, "stamps": stamps}:
            return
    with ThreadPoolExecutor() as threads:
        for each in [threads.submit(check_crc32, folder / name, wanted, REMEDY) for name, wanted in crc32.items()]:
            each.result()
    with suppress(OSError):  # a corpus of other people is checked each time
        write_json(checked, {"crc32": crc32, "stamps": stamps})


def _stamp(path: Path) -> list[int]:
    """Values that change when a file changes. Nobody can set the time of the last change of the inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _prepared(folder: Path, log_line: Callable[[str], None]) -> Corpus | None:
    """The corpus in `folder`. None if it is missing or damaged. A damaged corpus is logged."""
    if not (folder / "meta.json").exists():
        return None
    try:
        return load(folder)
    except DamagedFile as error:
        log_line(f"{error.path} cannot be read: {error.why}; the corpus is prepared again")
        return None


def prepared_with(config: DataConfig, corpora: Path, tokenizer_digest: str) -> Corpus | None:
    """Return the prepared corpus of `config` if its tokenizer has this digest; None if there is none."""
    try:
        corpus = _prepared(folder_of(config, corpora), lambda message: None)
    except CorpusError:
        return None
    return corpus if corpus is not None and corpus.tokenizer_digest == tokenizer_digest else None


def prepare_apart(
    config: DataConfig, corpora: Path, log_line: Callable[[str], None], *, folder: Path | None = None
) -> Corpus:
    """As `prepare`, but a missing corpus is built by another process, so that its memory is not used in this one.

    An allocator does not return all freed memory to the system. The peak memory of the run that builds the corpus would
    include that memory. `folder` is what `folder_of` returns, if it was asked already.
    """
    corpus = _prepared(folder or folder_of(config, corpora), lambda message: None)
    if corpus is None:
        command = [sys.executable, "-m", "relora.data.corpus", json.dumps(asdict(config)), str(corpora)]
        with tempfile.TemporaryFile("w+") as errors:
            # Ctrl-C and SLURM's warning reach the whole process group. The child blocks them and gets a SIGTERM.
            with signals.blocked((signal.SIGINT, signal.SIGUSR2)):
                started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            with started as child, signals.raising():  # building a large corpus may take hours
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
        if child.returncode == USER_ERROR:
            raise CorpusError(problem.strip())
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            cause = " (the machine may be out of memory)" if name == "SIGKILL" else ""
            raise CorpusError(f"the process that prepared the corpus was ended by {name}{cause}; launch the run again")
        if child.returncode:
            raise RuntimeError(f"preparing the corpus ended with {child.returncode}:\n{problem}")
        corpus = prepare(config, corpora, log_line)
    return corpus


def located(config: DataConfig, corpora: Path) -> Path:
    """Return the folder of the corpus. If it is not prepared, check at once that its sources can be reached.

    Raises CorpusError. It needs neither torch nor datasets, so it tells a user in a second what fails in any case.
    """
    folder = folder_of(config, corpora)
    if not (folder / "meta.json").exists():
        for source in _sources(config).values() if isinstance(config, MixtureConfig) else (source_of(config),):
            source.check_reachable()
    return folder


def folder_of(config: DataConfig, corpora: Path, source: Source | None = None) -> Path:
    """Return the folder of the corpus, prepared or not. The corpus is prepared if the folder has a meta.json.

    Args:
        config: The text, its splits and its tokenizer.
        corpora: The folder that holds all prepared corpora.
        source: The source of the documents, if it is made already.

    Raises:
        CorpusError: The files of the text cannot be found or listed.
    """
    # The name has a digest of settings, tokenizer, and each file's path, size and time. No text is read for it.
    not_hashed = {*SEQUENCE_KEYS, "tokenizer", *config.without_effect()}
    settings = {**asdict(config), **config.written_out()}
    settings = {key: value for key, value in settings.items() if key not in not_hashed}
    if isinstance(config, MixtureConfig):
        identity = {name: source.identity for name, source in _sources(config).items()}
    else:
        identity = (source or source_of(config)).identity
    key = json.dumps([FORMAT, settings, identity, tokenizer_identity(config.tokenizer)])
    return corpora / f"{config.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _sources(config: MixtureConfig) -> dict[str, Source]:
    return {name: source_of(part) for name, part in config.parts().items()}


def _build_mixture(config: MixtureConfig, folder: Path, log_line: Callable[[str], None], workers: int | None) -> None:
    """Prepare the corpora of a mixture with one tokenizer, and write a folder that names them."""
    shares = config.shares()
    log_line(
        f"preparing the mixture {folder.name}: {', '.join(f'{share / 10:g}% {name}' for name, share in shares.items())}"
    )
    sources = _sources(config)
    vocab_size = config.vocab_size if config.tokenizer is None else LARGEST_MODEL["vocab_size"]
    needed = [needed_disk_bytes(source, vocab_size) for source in sources.values()]
    known_bytes, free_bytes = sum(filter(None, needed)), shutil.disk_usage(folder.parent).free
    if known_bytes > min(LARGE_BYTES, free_bytes):
        unknown = f", without the sources of unknown size ({needed.count(None)})" if None in needed else ""
        log_line(
            f"the mixture needs at most about {in_units(known_bytes)} of the {in_units(free_bytes)} that are "
            f"free{unknown}"
        )
    tokenizer = shared_tokenizer(config, sources, folder.parent)
    parts = {
        name: prepare(replace(part, tokenizer=tokenizer), folder.parent, log_line, workers=workers)
        for name, part in config.parts().items()
    }
    first = next(iter(parts.values()))
    meta = {
        "format": FORMAT,
        "source": asdict(config),
        "parts": {name: part.folder.name for name, part in parts.items()},
        "shares": shares,
        "corpus_digest": digest(shares, {name: part.corpus_digest for name, part in parts.items()}),
        "tokenizer_digest": first.tokenizer_digest,
        "vocab_size": first.vocab_size,
        "end_of_text_id": first.end_of_text_id,
        "dtype": first.dtype,
        "splits": counts(shares, {name: part.splits for name, part in parts.items()}),
    }
    with publishing(folder) as temporary:
        names = ("tokenizer.json", "tokenizer_config.json")
        for name in names:
            shutil.copyfile(first.folder / name, temporary / name)
        meta["crc32"] = {name: crc32_of(temporary / name) for name in names}
        write_json(temporary / "meta.json", {**meta, "own_crc32": crc32_of_values(meta)})


def _build(source: Source, folder: Path, log_line: Callable[[str], None], workers: int | None) -> None:
    """Build a corpus in a folder beside its own, and rename that. After a kill, the next call goes on with it."""
    started = time.perf_counter()
    work = folder.with_name(f"{folder.name}.partial")
    build = Build(source, work, log_line, workers=workers)
    build.begin(folder.name)
    try:
        if not (work / "meta.json").exists():
            build.run()
        build.remove_state()
        publish(work, folder)
    except Exception as error:
        if (found := system_error(error)) is not None:
            raise naming(found, folder) from error
        if not isinstance(error, Unfinished):  # the text must change first
            shutil.rmtree(work, ignore_errors=True)
        raise
    meta = read_json(folder / "meta.json")
    counts = ", ".join(f"{name} {meta['splits'][name]['tokens']:,}" for name in SPLITS)
    log_line(
        f"corpus ready in {time.perf_counter() - started:.0f} s: tokens {counts}; vocabulary {meta['vocab_size']:,}; "
        f"near-duplicates of training text: {described(meta['near_duplicates'])}"
    )


def _main(settings: str, corpora: str) -> int:
    """Run `prepare` in this process and return the exit code."""
    try:
        prepare(data_config(json.loads(settings)), Path(corpora), lambda message: print(message, flush=True))
    except (RunError, ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
