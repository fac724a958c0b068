"""Prepare corpora, find them again, and check them when they are loaded.

A corpus is a folder with one memory-mapped token file for each split, the tokenizer, and a meta.json with the digests
of both. It is built under a lock and gets its name only when it is complete.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from relora.common import signals
from relora.common.errors import DamagedFile
from relora.common.files import check_crc32, crc32_of, publishing, read_json, reason
from relora.config.data import DataConfig, data_config
from relora.config.sources import survey
from relora.data.documents import fingerprint, source_files, split_documents
from relora.data.encoding import SPLITS, copy_tokenizer, train_tokenizer, write_tokens
from relora.data.readers import CorpusError, Tally
from relora.data.sequences import PaddedSequences, Sequences, TokenSequences

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

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json. tokenizer_config.json is in the same folder."""
        return self.folder / "tokenizer.json"

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


def prepare(config: DataConfig, corpora: Path, log_line: Callable[[str], None]) -> Corpus:
    """Load the corpus that `config` describes. Build it first if it is missing or damaged.

    Args:
        config: The text, its splits and its tokenizer.
        corpora: The folder that holds all prepared corpora.
        log_line: Called with each message about the building.

    Raises:
        CorpusError: The text cannot be read or is too little.
    """
    files = source_files(config)
    folder = _folder(config, files, corpora)
    corpus = _prepared(folder, lambda message: None)
    if corpus is None:
        corpora.mkdir(parents=True, exist_ok=True)
        with FileLock(corpora / f"{folder.name}.lock"):
            corpus = _prepared(folder, log_line)
            if corpus is None:
                _build(config, files, folder, log_line)
                corpus = load(folder)
    return corpus


def load(folder: Path) -> Corpus:
    """Load a prepared corpus. Raises DamagedFile if a file does not match meta.json.

    Every byte is read. A start takes about a second for each GB of tokens that is cached in memory, and the disk's time
    for the rest. This costs little compared with training on a damaged token. A corpus from before checksums were
    written has only its sizes checked.
    """
    meta = read_json(folder / "meta.json")
    names = ("corpus_digest", "tokenizer_digest", "vocab_size", "end_of_text_id", "dtype", "splits")
    try:
        corpus = Corpus(folder=folder, **{name: meta[name] for name in names})
        for split in SPLITS:
            wanted = corpus.splits[split]["tokens"] * np.dtype(corpus.dtype).itemsize
            file = folder / f"{split}.bin"
            if (found := file.stat().st_size) != wanted:
                raise DamagedFile(file, f"it has {found} bytes and should have {wanted}", REMEDY)
        for name, wanted in meta.get("crc32", {}).items():
            check_crc32(folder / name, wanted, REMEDY)
        own = meta.pop("own_crc32", None)
        if own not in (None, _crc32_of_values(meta)):
            raise DamagedFile(folder / "meta.json", "its values differ from those that were written", REMEDY)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(folder / "meta.json", f"a value is missing or wrong: {error}", REMEDY) from error
    except OSError as error:
        raise DamagedFile(Path(error.filename or folder), reason(error), REMEDY) from error
    return corpus


def _crc32_of_values(meta: dict[str, Any]) -> str:
    """The checksum of the values of a meta.json, without the checksum itself."""
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _prepared(folder: Path, log_line: Callable[[str], None]) -> Corpus | None:
    """The corpus in `folder`. None if it is missing or damaged. A damaged corpus is logged."""
    if not (folder / "meta.json").exists():
        return None
    try:
        return load(folder)
    except DamagedFile as error:
        log_line(f"{error.path} cannot be read: {error.why}; the corpus is prepared again")
        return None


def prepare_apart(config: DataConfig, corpora: Path, log_line: Callable[[str], None]) -> Corpus:
    """As `prepare`, but a missing corpus is built by another process, so that its memory is not used in this one.

    An allocator does not return all freed memory to the system. The peak memory of the run that builds the corpus would
    include that memory.
    """
    corpus = _prepared(folder_of(config, corpora), lambda message: None)
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


def folder_of(config: DataConfig, corpora: Path) -> Path:
    """The folder of the corpus, prepared or not. The corpus is prepared if the folder has a meta.json."""
    return _folder(config, source_files(config), corpora)


def _folder(config: DataConfig, files: list[Path], corpora: Path) -> Path:
    return corpora / f"{config.name}-{fingerprint(config, files)}"


def _build(config: DataConfig, files: list[Path], folder: Path, log_line: Callable[[str], None]) -> None:
    started = time.perf_counter()
    content = survey(Path(config.path)).described() if config.path else f"{len(files)} files"
    log_line(f"preparing the corpus {folder.name}: {content}")
    tally = Tally()
    splits = split_documents(config, files, tally)
    for remark in tally.remarks():
        log_line(f"note: {remark}")
    with publishing(folder) as temporary:
        end_of_text = (
            train_tokenizer(config, files, splits, temporary)
            if config.tokenizer is None
            else copy_tokenizer(config.tokenizer, temporary, log_line)
        )
        meta = write_tokens(config, files, splits, temporary, end_of_text)
        meta["crc32"] = {path.name: crc32_of(path) for path in sorted(temporary.iterdir())}
        meta["own_crc32"] = _crc32_of_values(meta)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    counts = ", ".join(f"{name} {meta['splits'][name]['tokens']:,}" for name in SPLITS)
    log_line(
        f"corpus ready in {time.perf_counter() - started:.0f} s: tokens {counts}; vocabulary {meta['vocab_size']:,}"
    )


def _main(settings: str, corpora: str) -> int:
    """Run `prepare` in this process and return the exit code."""
    try:
        prepare(data_config(json.loads(settings)), Path(corpora), lambda message: print(message, flush=True))
    except (CorpusError, OSError) as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
