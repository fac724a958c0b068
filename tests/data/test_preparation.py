"""A preparation with several processes, with limits, on a full disk, and of a text that changes or is damaged."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import fill

from relora.common.errors import DamagedFile
from relora.config.data import DataConfig
from relora.config.mixture import data_config
from relora.data import building, workers
from relora.data.corpus import Corpus, prepare
from relora.data.decoding import CHUNK_BYTES, CorpusError, Unfinished
from relora.data.source import SPLITS, Vocabulary
from relora.data.writer import SplitFiles

WORDS = ["ball", "cat", "dog", "elephant", "fish", "green", "house", "ink", "jolly", "king", "long", "moon", "night"]


def document(number: int, words: int = 60) -> str:
    return f"{number}: " + " ".join(random.Random(number).choices(WORDS, k=words)) + "\n"


def write_records(path: Path, count: int, words: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document(number, words)}) + "\n" for number in range(count)))
    return path


def settings(path: Path, **changes: Any) -> DataConfig:
    values = {"name": "text", "path": str(path), "vocab_size": 300, "sequence_length_tokens": 16}
    return data_config(values | {"validation_fraction": 0.1, "test_fraction": 0.1} | changes)


def silent(message: str) -> None:
    """Ignore the message."""


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- workers


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(write_records(tmp_path / "a.jsonl", 3000), limit_tokens=200_000)
    monkeypatch.setattr(workers, "TEXT_BEFORE_WORKERS", 50_000)
    monkeypatch.setattr(building, "BATCH_PIECES", 50)
    made = [prepare(config, tmp_path / str(count), silent, workers=count) for count in (1, 2, 5)]
    assert files_of(made[0]) == files_of(made[1]) == files_of(made[2])


@pytest.mark.slow
def test_a_worker_that_dies_stops_the_preparation_which_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(write_records(tmp_path / "a.jsonl", 3000))
    monkeypatch.setattr(workers, "TEXT_BEFORE_WORKERS", 50_000)
    monkeypatch.setattr(building, "BATCH_PIECES", 50)
    monkeypatch.setattr(building, "COMMIT_SECONDS", 0.0)
    encode = workers._Worker.encode
    calls = 0

    def dies(self: Any, texts: list[str]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            self._process.kill()
        return encode(self, texts)

    monkeypatch.setattr(workers._Worker, "encode", dies)
    with pytest.raises(Unfinished, match=r"fewer --workers"):
        prepare(config, tmp_path / "corpora", silent, workers=2)
    messages: list[str] = []
    corpus = prepare(config, tmp_path / "corpora", messages.append, workers=2)
    assert any(re.search(r"stopped after [\d,]{5,} tokens", message) for message in messages)
    assert files_of(corpus) == files_of(prepare(config, tmp_path / "other", silent))


def descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(entry.parent.name), *descendants(int(entry.parent.name))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_worker_survives_the_preparation(tmp_path: Path, name: str) -> None:
    write_records(tmp_path / "a.jsonl", 60_000)
    overrides = ["data=text", f"data.path={tmp_path / 'a.jsonl'}", "data.vocab_size=300", f"runs_dir={tmp_path}"]
    command = [sys.executable, "-m", "relora", "data", "prepare", "--workers", "2", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while len(found := descendants(process.pid)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        errors = process.communicate(timeout=60)[1]
    assert "Traceback" not in errors
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found):
        assert time.monotonic() < until
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------- limits and messages


@pytest.mark.parametrize("limits", [{"limit_tokens": "5k"}, {"held_out_tokens": 700}, {"limit_tokens": 1}])
def test_limits_cut_the_splits_and_move_no_document(tmp_path: Path, limits: dict[str, Any]) -> None:
    path = write_records(tmp_path / "a.jsonl", 400)
    whole = prepare(settings(path), tmp_path / "corpora", silent)
    corpus = prepare(settings(path, **limits), tmp_path / "corpora", silent)
    for split in SPLITS:
        limit = limits.get("limit_tokens" if split == "train" else "held_out_tokens")
        tokens, of_whole = (np.fromfile(each.folder / f"{split}.bin", np.uint16) for each in (corpus, whole))
        assert tokens.tolist() == of_whole[: len(tokens)].tolist()
        if limit is None:
            assert len(tokens) == len(of_whole)
        else:
            number = 5000 if limit == "5k" else limit
            assert number <= len(tokens) < number + 500
            assert tokens[-1] == corpus.end_of_text_id


def test_the_progress_says_how_fast_it_is_and_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(building, "BATCH_PIECES", 100)
    messages: list[str] = []
    prepare(settings(write_records(tmp_path / "a.jsonl", 1000)), tmp_path / "corpora", messages.append)
    progress = [message for message in messages if "tokens/s" in message]
    assert len(progress) >= 9
    for message in progress[:-1]:
        assert re.search(
            r"train: [\d,]+ tokens of [\d.]+ KiB, [\d.]+ MiB/s, [\d,]+ tokens/s, \d+%, [\d.]+ (s|min) left", message
        )
    shares = [int(found[1]) for message in progress if (found := re.search(r"(\d+)%", message))]
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_the_need_of_disk_is_said_before_a_large_corpus_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "LARGE_BYTES", 1000)
    messages: list[str] = []
    prepare(settings(write_records(tmp_path / "a.jsonl", 400)), tmp_path / "corpora", messages.append)
    assert re.search(r"needs at most about [\d.]+ KiB of the [\d.]+ \w+ that are free", messages[1])


def test_a_preparation_that_lost_a_file_does_not_go_on_with_zeros(tmp_path: Path) -> None:
    state = {"splits": {"train": {"tokens": 10, "pieces": 1}}, "log_bytes": 0}
    with pytest.raises(DamagedFile, match=r"train.bin.*shorter than when the preparation stopped"):
        SplitFiles(tmp_path, Vocabulary(vocab_size=300, end_of_text_id=0), state)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_records(tmp_path / "a.jsonl", 400)
    write = SplitFiles.write

    def appending(self: SplitFiles) -> None:
        write(self)
        with path.open("a") as file:
            file.write(json.dumps({"text": "more"}) + "\n")

    monkeypatch.setattr(SplitFiles, "write", appending)
    with pytest.raises(CorpusError, match=r"a\.jsonl changed while it was read; prepare the corpus again"):
        prepare(settings(path), tmp_path / "corpora", silent)
    assert not list((tmp_path / "corpora").glob("*/meta.json"))


@pytest.mark.slow
def test_a_full_disk_gives_one_message_and_then_the_preparation_goes_on(tmp_path: Path, small_disk: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", 2000)
    filler = fill(small_disk, 64 * 1024)
    with pytest.raises(OSError, match="No space left on device") as raised:
        prepare(settings(path), small_disk / "corpora", silent)
    assert str(small_disk) in str(raised.value)
    filler.unlink()
    corpus = prepare(settings(path), small_disk / "corpora", silent)
    assert files_of(corpus) == files_of(prepare(settings(path), tmp_path / "corpora", silent))


@pytest.mark.slow
def test_a_very_long_line_is_read_in_little_memory(tmp_path: Path) -> None:
    """A text of one line of 60 MB. Reading it whole took 11 bytes of memory a byte."""
    path = tmp_path / "long.txt"
    block = " ".join(random.Random(0).choices(WORDS, k=200_000))
    with path.open("w") as file:
        for number in range(60_000_000 // len(block)):
            file.write(f"{number} {block} ")
    script = (
        "import json, sys\nfrom pathlib import Path\n"
        "from relora.config.mixture import data_config\nfrom relora.data.corpus import prepare\n"
        "prepare(data_config(json.loads(sys.argv[1])), Path(sys.argv[2]), print, workers=1)\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
    )
    tokenizer = prepare(settings(write_records(tmp_path / "a.jsonl", 400)), tmp_path / "corpora", silent).folder
    values = {"name": "text", "path": str(path), "tokenizer": str(tokenizer)}
    command = [sys.executable, "-c", script, json.dumps(values), str(tmp_path / "corpora")]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout.splitlines()[-1]) / 1024 < 350, "MiB at most, of which Python and its libraries take 100"


def test_characters_at_the_border_of_chunks_are_whole(tmp_path: Path) -> None:
    text = "".join(f"é🙂日 {number}\r\n" for number in range(CHUNK_BYTES // 9))
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = prepare(settings(tmp_path / "a.txt", vocab_size=257), tmp_path / "corpora", silent)
    found = sum(np.fromfile(corpus.folder / f"{split}.bin", np.uint16).size for split in SPLITS)
    assert found == len(text.encode()) + 1, "a token for each byte, and the end of the text"


def test_a_corpora_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", 400)
    (tmp_path / "corpora").write_text("a file")
    with pytest.raises(OSError, match="corpora"):
        prepare(settings(path), tmp_path / "corpora", silent)
