"""Measure the preparation and the reading of corpora.

    python benchmarks/data.py [--mib 24] [--rounds 3] [PART ...]     # parts: encode, processes, memory, open, batches

The text is that of the standard library, in records of about 2 kB. Ratios are made within one round, so that a change
of the machine's speed does not change them.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from relora.config.mixture import data_config
from relora.data.corpus import Corpus, load, prepare
from relora.data.decoding import Tally
from relora.data.sequences import TokenSequences
from relora.data.source import SPLITS
from relora.data.text import StdlibSource
from relora.data.tokenizer import load_tokenizer
from relora.data.workers import encode, usable_cpus

RECORD_CHARACTERS = 2000
TEXT = data_config({"name": "stdlib", "sequence_length_tokens": 256})
LARGE_TOKENS = 10_000_000_000


def texts() -> Iterator[str]:
    """Yield records without end. No two are equal."""
    source = StdlibSource(data_config({"name": "stdlib"}))
    for turn in itertools.count():
        for document in source.documents("train", Tally()):
            whole = "".join(str(chunk) for chunk in document.chunks)
            for start in range(0, len(whole), RECORD_CHARACTERS):
                yield f"{turn} {whole[start : start + RECORD_CHARACTERS]}"


def write_records(path: Path, mib: float) -> int:
    """Write a .jsonl of about so many MiB of text. Return the bytes of the text."""
    written = 0
    with path.open("w") as file:
        for text in texts():
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= mib * 2**20:
                return written
    raise AssertionError("texts() has no end")


def settings(path: Path, tokenizer: Path) -> dict[str, Any]:
    """Return the settings of a corpus with a given tokenizer."""
    return {"name": "text", "path": str(path), "tokenizer": str(tokenizer)}


def seconds_of(action: Callable[[], object]) -> float:
    """Return the wall-clock seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def spread(values: list[float], digits: int = 2) -> str:
    """Format the median with the least and the largest value."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def silent(message: str) -> None:
    """Ignore the message."""


def measure_encode(folder: Path, path: Path, size_bytes: int, tokenizer: Path, rounds: int) -> None:
    """One core: the bare tokenizer, the whole preparation, and datasets.map with the same tokenizer."""
    import datasets

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    loaded = load_tokenizer(tokenizer / "tokenizer.json", None)
    records = [json.loads(line)["text"] for line in path.open()]
    found: dict[str, list[float]] = {"bare": [], "prepare": [], "map": []}
    for number in range(rounds):

        def bare() -> None:
            for start in range(0, len(records), 512):
                encode(loaded, records[start : start + 512])

        def mapped(turn: int) -> None:
            rows = datasets.load_dataset(
                "json", data_files=str(path), split="train", cache_dir=str(folder / f"c{turn}")
            )
            rows.map(
                lambda batch: {"input_ids": [each.ids for each in loaded.encode_batch_fast(batch["text"])]},
                batched=True,
                remove_columns=["text"],
                new_fingerprint=f"turn{turn}",
            )

        found["bare"].append(seconds_of(bare))
        own = partial(prepare, data_config(settings(path, tokenizer)), folder / f"e{number}", silent, workers=1)
        found["prepare"].append(seconds_of(own))
        found["map"].append(seconds_of(partial(mapped, number)))
    for name, values in found.items():
        print(f"{name}: {spread([size_bytes / 2**20 / value for value in values])} MiB/s on one core")
    for name in ("prepare", "map"):
        ratios = [bare / own for bare, own in zip(found["bare"], found[name], strict=True)]
        print(f"{name} / bare tokenizer: {spread(ratios)}")
    del os.environ["TOKENIZERS_PARALLELISM"]


def measure_processes(folder: Path, path: Path, size_bytes: int, tokenizer: Path, rounds: int) -> None:
    """The preparation by number of processes."""
    counts = sorted({1, 2, usable_cpus()})
    found: dict[int, list[float]] = {count: [] for count in counts}
    for number, count in itertools.product(range(rounds), counts):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process; the workers never use threads
        corpora = folder / f"p{number}-{count}"
        own = partial(prepare, data_config(settings(path, tokenizer)), corpora, silent, workers=count)
        found[count].append(seconds_of(own))
    for count, values in found.items():
        print(f"{count} processes: {spread([size_bytes / 2**20 / value for value in values])} MiB/s")


MEMORY = """
import json, sys
from pathlib import Path
from relora.config.mixture import data_config
from relora.data.corpus import prepare
prepare(data_config(json.loads(sys.argv[1])), Path(sys.argv[2]), lambda message: None, workers=1)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def measure_memory(folder: Path, mib: float, tokenizer: Path) -> None:
    """Peak memory of a preparation, and of one with 10 times the text."""
    peaks = []
    for size in (mib / 4, 10 * mib / 4):
        path = folder / f"{size}.jsonl"
        size_bytes = write_records(path, size)
        command = [sys.executable, "-c", MEMORY, json.dumps(settings(path, tokenizer)), str(folder / f"m{size}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024)
        print(f"{size_bytes / 2**20:.0f} MiB of text: peak {peaks[-1] / 2**20:.0f} MiB")
    print(f"10 times the text takes {peaks[1] / peaks[0]:.2f} times the memory")


def large_corpus(folder: Path, tokenizer: Path) -> Corpus:
    """Return a corpus of 10B training tokens, in sparse files, whose checksums count as checked."""
    from relora.common.files import write_json
    from relora.data.building import crc32_of_values
    from relora.data.corpus import _stamp

    made = load(tokenizer)
    large = folder / "large"
    large.mkdir()
    for split in SPLITS:
        for kind, item_bytes in (("bin", 2), ("starts", 8)):
            with (large / f"{split}.{kind}").open("wb") as file:
                count = LARGE_TOKENS if split == "train" else 1_000_000
                file.truncate(count * item_bytes if kind == "bin" else count // 500 * item_bytes)
    counts = {
        split: {"tokens": LARGE_TOKENS if split == "train" else 1_000_000, "pieces": 1, "bytes": 1} for split in SPLITS
    }
    crc32 = {path.name: "0" for path in sorted(large.iterdir())}
    values = {**made.identity, "vocab_size": 2048, "end_of_text_id": 0, "dtype": "uint16", "splits": counts}
    meta = {**values, "crc32": crc32}
    write_json(large / "meta.json", {**meta, "own_crc32": crc32_of_values(meta)})
    write_json(folder / "large.checked", {"crc32": crc32, "stamps": {name: _stamp(large / name) for name in crc32}})
    return load(large)


def measure_open(folder: Path, tokenizer: Path) -> None:
    """Milliseconds to open a corpus of 10B tokens, after its first use."""
    large = large_corpus(folder, tokenizer)
    values = [1000 * seconds_of(lambda: load(large.folder).sequences("train", TEXT)) for _ in range(20)]
    print(f"opening {LARGE_TOKENS:,} tokens: {spread(values)} ms")


def measure_batches(folder: Path, tokenizer: Path) -> None:
    """Tokens per second of reading batches, from a small corpus and from one of 10B tokens."""
    large = folder / "large"
    corpora = {
        "small": load(tokenizer),
        "10B tokens": load(large) if large.exists() else large_corpus(folder, tokenizer),
    }
    for name, corpus in corpora.items():
        sequences = TokenSequences(corpus.folder / "train.bin", corpus.dtype, 256)

        def read(sequences: TokenSequences = sequences) -> None:
            for step in range(50):
                sequences.training_batch(step, 512, 0)

        read()
        values = [50 * 512 * 256 / seconds_of(read) / 1e6 for _ in range(5)]
        print(f"batches of 512 x 256 from {name}: {spread(values, 1)}M tokens/s")


def main() -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("parts", nargs="*", default=["encode", "processes", "memory", "open", "batches"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = prepare(data_config({"name": "stdlib"}), folder / "stdlib", silent).folder
        path = folder / "records.jsonl"
        size_bytes = write_records(path, arguments.mib)
        parts: dict[str, Callable[[], None]] = {
            "encode": lambda: measure_encode(folder, path, size_bytes, tokenizer, arguments.rounds),
            "processes": lambda: measure_processes(folder, path, size_bytes, tokenizer, arguments.rounds),
            "memory": lambda: measure_memory(folder, arguments.mib, tokenizer),
            "open": lambda: measure_open(folder, tokenizer),
            "batches": lambda: measure_batches(folder, tokenizer),
        }
        for part in arguments.parts:
            parts[part]()


if __name__ == "__main__":
    main()
