"""Datasets of the hub: from a folder in its layout, and from a hub on this machine whose connection breaks."""

import gzip
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub_server import REVISION, Hub, like_c4, serving, texts_of, with_hub
from tokenizers import Tokenizer

from relora.config.data import HubConfig
from relora.config.mixture import data_config
from relora.data import building, workers
from relora.data.corpus import Corpus, load, prepare
from relora.data.decoding import CorpusError, Tally, Unfinished
from relora.data.hub import HubSource
from relora.data.json_stream import JsonStream
from relora.data.source import SPLITS
from relora.data.writer import SplitFiles

pytestmark = pytest.mark.slow


def settings(dataset: Path | str, **changes: Any) -> HubConfig:
    values = {"name": "hub", "dataset": str(dataset), "config": "en", "vocab_size": 300, "sequence_length_tokens": 16}
    made = data_config(values | {"validation_fraction": 0.1, "test_fraction": 0.1} | changes)
    assert isinstance(made, HubConfig)
    return made


def silent(message: str) -> None:
    """Ignore the message."""


def texts_in(corpus: Corpus, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokens = np.fromfile(corpus.folder / f"{split}.bin", dtype=corpus.dtype)
    ends = np.flatnonzero(tokens == corpus.end_of_text_id)
    return [tokenizer.decode(ids.tolist()[:-1]) for ids in np.split(tokens, ends + 1)[:-1]]


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir() if path.suffix in (".bin", ".starts")}


# --------------------------------------------------------------------------------------------------------- a folder


def test_the_own_validation_split_is_held_out_and_half_of_it_is_for_the_test(tmp_path: Path) -> None:
    texts = like_c4(tmp_path / "c4")
    messages: list[str] = []
    corpus = prepare(settings(tmp_path / "c4"), tmp_path / "corpora", messages.append)
    found = {split: texts_in(corpus, split) for split in SPLITS}
    assert found["train"] == texts["train"]
    assert sorted(found["validation"] + found["test"]) == sorted(texts["validation"])
    assert 0.35 < len(found["test"]) / len(texts["validation"]) < 0.65
    assert "splits train, validation" in messages[0]


def test_without_an_own_split_documents_are_held_out_by_their_hash(tmp_path: Path) -> None:
    texts = like_c4(tmp_path / "c4")
    corpus = prepare(settings(tmp_path / "c4", validation_split=None), tmp_path / "corpora", silent)
    found = {split: texts_in(corpus, split) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(texts["train"])
    for split in ("validation", "test"):
        assert 0.06 < len(found[split]) / len(texts["train"]) < 0.14


def test_limits_end_the_splits_at_a_document(tmp_path: Path) -> None:
    like_c4(tmp_path / "c4")
    whole = prepare(settings(tmp_path / "c4"), tmp_path / "corpora", silent)
    corpus = prepare(
        settings(tmp_path / "c4", limit_tokens="20k", held_out_tokens=2000, tokenizer=str(whole.folder)),
        tmp_path / "corpora",
        silent,
    )
    for split, limit in (("train", 20_000), ("validation", 2000), ("test", 2000)):
        tokens = np.fromfile(corpus.folder / f"{split}.bin", dtype=corpus.dtype)
        assert limit <= len(tokens) < limit + 1000
        assert tokens.tolist() == np.fromfile(whole.folder / f"{split}.bin", whole.dtype)[: len(tokens)].tolist()
        assert tokens[-1] == corpus.end_of_text_id
        *_, last = np.flatnonzero(tokens == corpus.end_of_text_id)[:-1]
        assert last + 1 < limit, "the document before did not reach the limit"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"split": "training"}, ["no split training", "train, validation", "data.split"]),
        ({"test_split": "test"}, ["no split test", "train, validation", "data.test_split"]),
        ({"config": "de"}, ["cannot be opened", "de"]),
        ({"text_field": "body"}, ["no text in the field 'body'", "text, timestamp, url", "data.text_field"]),
    ],
)
def test_a_wrong_setting_gives_one_message(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    like_c4(tmp_path / "c4", rows=1200)
    with pytest.raises(CorpusError) as raised:
        prepare(settings(tmp_path / "c4", **changes), tmp_path / "corpora", silent)
    for part in parts:
        assert part in str(raised.value)
    assert not list((tmp_path / "corpora").glob("*.partial"))


def test_a_damaged_file_of_a_folder_is_named(tmp_path: Path) -> None:
    like_c4(tmp_path / "c4")
    damaged = tmp_path / "c4" / "en" / "c4-train.00001-of-00003.json.gz"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    with pytest.raises(CorpusError, match=r"c4 cannot be read: .*; correct or replace its files"):
        prepare(settings(tmp_path / "c4"), tmp_path / "corpora", silent)


def test_only_the_text_field_of_json_has_to_have_one_type(tmp_path: Path) -> None:
    """datasets takes the types from the first file, and fails at fields that nobody asked for."""
    folder = tmp_path / "c4"
    like_c4(folder)
    metas: list[Any] = [None, 1, "one", {"deep": [1.5]}, [None]]
    texts = texts_of("train", 9, 400)
    for number, name in enumerate(("c4-train.00000-of-00003.json.gz", "c4-train.00002-of-00003.json.gz")):
        own = texts[200 * number : 200 * (number + 1)]
        records = [{"text": text, "meta": metas[row % 5], f"new{row % 7}": row} for row, text in enumerate(own)]
        lines = "\n".join(map(json.dumps, records))
        (folder / "en" / name).write_bytes(gzip.compress(lines.encode()))
    corpus = prepare(settings(folder), tmp_path / "corpora", silent)
    assert texts_in(corpus, "train") == [*texts[:200], *texts_of("train", 1, 400), *texts[200:]]


def test_a_stream_of_json_goes_on_at_any_record_and_counts_each_once(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number}.jsonl") for number in range(4)]
    for number, name in enumerate(names):
        lines = [json.dumps({"text": f"{number}/{row}"}).encode() + b"\n" for row in range(0 if number == 1 else 3)]
        Path(name).write_bytes(b"".join(lines) + b'{"text": "\xff"}\n' * (number == 2))
    whole = Tally()
    stream = JsonStream(names, whole)
    places, records = [stream.state_dict()], []
    for record in stream:
        records.append(record)
        places.append(stream.state_dict())
    assert len(records) == 10
    assert whole.replaced_bytes == 1
    assert [place["file"] for place in places] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4]
    for done, place in enumerate(places):
        tally = Tally()
        stream = JsonStream(names, tally)
        stream.load_state_dict(json.loads(json.dumps(place)))
        assert list(stream) == records[done:]
        assert tally.replaced_bytes == (place["file"] <= 2), "a file that is read again counts again, from its start"


def test_a_stream_of_json_does_not_go_on_in_another_file(tmp_path: Path) -> None:
    stream = JsonStream(["a.json", "b.json"], Tally())
    with pytest.raises(Unfinished, match=r"stopped in b\.json.*\.partial"):
        JsonStream(["a.json", "c.json"], Tally()).load_state_dict({"file": 1, "name": "b.json", "record": 5})
    with pytest.raises(Unfinished, match="other files now"):
        JsonStream(["a.json"], Tally()).load_state_dict({"file": 1, "name": "b.json", "record": 5})
    with pytest.raises(CorpusError, match="earlier version of relora"):
        stream.load_state_dict({"examples_iterable": {}})


def test_the_kind_that_the_user_names_is_read(tmp_path: Path) -> None:
    """A .jsonl file as lines of text."""
    lines = [json.dumps({"text": text}) for text in texts_of("train", 0, 200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = settings("text", config=None, files=[str(tmp_path / "a.jsonl")])
    corpus = prepare(config, tmp_path / "corpora", silent)
    assert sorted(text for split in SPLITS for text in texts_in(corpus, split)) == sorted(lines)


def test_a_copy_without_some_files_is_noted(tmp_path: Path) -> None:
    like_c4(tmp_path / "c4")
    assert "the copy has" not in HubSource(settings(tmp_path / "c4")).described()
    (tmp_path / "c4" / "en" / "c4-train.00001-of-00003.json.gz").unlink()
    assert "the copy has 2 of the 3 files of train" in HubSource(settings(tmp_path / "c4")).described()


def test_the_progress_of_files_of_unknown_size_has_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(building, "BATCH_PIECES", 50)
    like_c4(tmp_path / "c4")
    messages: list[str] = []
    prepare(settings(tmp_path / "c4", held_out_tokens=9_000_000), tmp_path / "corpora", messages.append)
    lines = [message for message in messages if message.startswith("train: ")]
    shares = [int(found[1]) for line in lines if (found := re.search(r"(\d+)%, [\d.]+ (s|min) left", line))]
    assert set(shares) >= {67, 100}
    assert shares == sorted(shares)
    assert [message for message in messages if message.startswith("validation: ")]
    notes = [message for message in messages if "less than data.held_out_tokens=9,000,000" in message]
    assert [note.split()[1] for note in notes] == ["validation", "test"]


def test_a_stream_goes_on_at_the_same_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like_c4(tmp_path / "c4")
    monkeypatch.setattr(building, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(building, "BATCH_PIECES", 90)
    write, stops = SplitFiles.write, iter([200, 500, 900, 1300])
    stop = next(stops)

    def stopping(self: SplitFiles) -> None:
        nonlocal stop
        write(self)
        if sum(split.pieces for split in self.splits.values()) > stop:
            stop = next(stops, 10**9)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(SplitFiles, "write", stopping)
    stopped = 0
    while True:
        try:
            corpus = prepare(settings(tmp_path / "c4"), tmp_path / "corpora", silent)
            break
        except OSError:
            stopped += 1
    assert stopped == 4
    assert files_of(corpus) == files_of(prepare(settings(tmp_path / "c4"), tmp_path / "other", silent))


@pytest.mark.parametrize("count", [2, 4])
def test_a_stream_with_a_limit_has_the_same_bytes_with_any_number_of_processes(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is ahead of writing, by more with more processes. Held-out documents after the limit were once kept."""
    like_c4(tmp_path / "c4")
    tokenizer = str(prepare(settings(tmp_path / "c4"), tmp_path / "corpora", silent).folder)
    config = settings(tmp_path / "c4", validation_split=None, limit_tokens=30_000, tokenizer=tokenizer)
    monkeypatch.setattr(building, "BATCH_PIECES", 16)
    one = prepare(config, tmp_path / "one", silent, workers=1)
    monkeypatch.setattr(workers, "TEXT_BEFORE_WORKERS", 0)
    assert files_of(one) == files_of(prepare(config, tmp_path / "many", silent, workers=count))


@pytest.mark.parametrize("place", ["near_duplicates", "crc32_of_values"])
def test_a_stop_after_the_last_document_adds_nothing(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    like_c4(tmp_path / "c4")
    config = settings(tmp_path / "c4", validation_split=None, limit_tokens=30_000)
    whole = prepare(config, tmp_path / "whole", silent)
    with monkeypatch.context() as patch:

        def stop(*arguments: Any) -> Any:
            raise OSError(5, "Input/output error")

        patch.setattr(building, place, stop)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                prepare(config, tmp_path / "stopped", silent)
    assert files_of(whole) == files_of(prepare(config, tmp_path / "stopped", silent))


def test_a_preparation_that_goes_on_counts_the_records_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record of the last three has no text. Alone they would be refused."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = [{"text": text} for text in texts_of("train", 0, 700)] + [{"text": None}, {"text": "last"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = settings(folder, config=None)
    monkeypatch.setattr(building, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(building, "BATCH_PIECES", 50)
    write = SplitFiles.write

    def stopping(self: SplitFiles) -> None:
        write(self)
        if sum(split.pieces for split in self.splits.values()) >= 699:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(SplitFiles, "write", stopping)
        with pytest.raises(OSError, match="Input/output error"):
            prepare(config, tmp_path / "corpora", silent)
    messages: list[str] = []
    corpus = prepare(config, tmp_path / "corpora", messages.append)
    assert "note: 1 of 702 records have no text and were skipped" in messages
    assert files_of(corpus) == files_of(prepare(config, tmp_path / "other", silent))


def test_a_preparation_goes_on_with_the_same_revision(tmp_path: Path) -> None:
    source = HubSource(settings("allenai/c4"))
    assert source.pinned() is None
    source.pin(REVISION)
    assert source.pinned() == REVISION
    assert HubSource(settings("allenai/c4", revision="main")).pinned() == "main"


def test_the_pinned_revision_is_read_also_after_the_newest_was_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def builder(revision: str, **_: object) -> SimpleNamespace:
        opened.append(revision)
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": [f"{revision}.json"]}))

    monkeypatch.setattr("relora.data.hub.go_offline_if_unreachable", lambda: False)
    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda self, name, revision: SimpleNamespace(sha=revision or "newest")
    )
    source = HubSource(settings("allenai/c4"))
    assert "revision newest" in source.described()
    source.pin("older")
    assert "revision older" in source.described()
    assert opened == ["newest", "older"]


# ------------------------------------------------------------------------------------------ a hub of this machine


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    like_c4(tmp_path / "hub" / "allenai" / "c4", rows=1500)
    with serving(tmp_path / "hub") as server:
        yield server


def prepared(
    tmp_path: Path, address: str, *more: str, dataset: str = "allenai/c4"
) -> "subprocess.CompletedProcess[str]":
    """Run `relora data prepare` with a hub at this address."""
    overrides = [f"data.dataset={dataset}", "data.config=en", "data.vocab_size=300", f"runs_dir={tmp_path / 'runs'}"]
    command = [sys.executable, "-m", "relora", "data", "prepare", "--json", "data=hub", *overrides, *more]
    return subprocess.run(
        command, env=with_hub(tmp_path, address), capture_output=True, text=True, timeout=300, check=False
    )


def test_the_hub_gives_the_same_corpus_as_a_copy_also_if_the_connection_breaks(tmp_path: Path, hub: Hub) -> None:
    copy = tmp_path / "hub" / "allenai" / "c4"
    local = prepared(tmp_path, hub.address, dataset=str(copy))
    assert local.returncode == 0, local.stderr
    hub.breaks = [0, 20_000, 30_000, 0, 10_000]
    done = prepared(tmp_path, hub.address)
    assert done.returncode == 0, done.stderr
    assert not hub.breaks, "every connection of the list was opened and broken"
    folders = [load(Path(json.loads(each.stdout)["folder"])) for each in (local, done)]
    assert files_of(folders[0]) == files_of(folders[1])
    origin = json.loads((folders[1].folder / "source.json").read_text())
    assert (origin["dataset"], origin["revision"]) == ("allenai/c4", REVISION)
    assert f"at revision {REVISION}" in done.stderr


def test_a_hub_that_is_not_there_gives_one_message_in_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    done = prepared(tmp_path, "http://127.0.0.1:9")
    assert time.monotonic() - began < 20
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    for part in (
        "data.dataset=allenai/c4",
        "cannot be reached",
        "HF_HOME",
        "relora data prepare",
        "data.dataset to a folder",
    ):
        assert part in line


def test_without_a_network_the_copy_in_the_cache_is_used(tmp_path: Path, hub: Hub) -> None:
    script = "from huggingface_hub import snapshot_download; snapshot_download('allenai/c4', repo_type='dataset')"
    environment = with_hub(tmp_path, hub.address)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, timeout=300)
    done = prepared(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["pieces"] == 4500


def test_a_dataset_that_the_hub_does_not_have_is_named(tmp_path: Path, hub: Hub) -> None:
    done = prepared(tmp_path, hub.address, dataset="allenai/c5")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "data.dataset=allenai/c5 cannot be opened" in line


# ----------------------------------------------------------------------------------------------- files at any address


def test_files_at_an_address_are_streamed(tmp_path: Path, hub: Hub) -> None:
    names = [f"en/c4-train.{number:05}-of-00003.json.gz" for number in (0, 2)]
    urls = [f"{hub.address}/datasets/allenai/c4/resolve/main/{name}" for name in names]
    own = ["data.config=null", "data.validation_fraction=0.1", "data.test_fraction=0.1"]
    hub.breaks = [0, 15_000]
    done = prepared(tmp_path, hub.address, *own, f"data.files=[{','.join(urls)}]", dataset="json")
    assert done.returncode == 0, done.stderr
    remote = load(Path(json.loads(done.stdout)["folder"]))
    paths = [str(tmp_path / "hub" / "allenai" / "c4" / name) for name in names]
    done = prepared(tmp_path, hub.address, *own, f"data.files=[{','.join(paths)}]", dataset="json")
    assert done.returncode == 0, done.stderr
    local = load(Path(json.loads(done.stdout)["folder"]))
    assert remote.folder != local.folder
    assert files_of(remote) == files_of(local)
    pieces = [split["pieces"] for split in remote.splits.values()]
    assert sum(pieces) == 3000
    assert all(200 < count < 400 for count in pieces[1:])


def test_an_address_without_a_file_gives_one_message(tmp_path: Path, hub: Hub) -> None:
    url = f"{hub.address}/datasets/allenai/c4/resolve/main/nothing.json"
    done = prepared(tmp_path, hub.address, "data.config=null", f"data.files=[{url}]", dataset="json")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("relora: ")]
    assert len(lines) == 1
    assert "data.dataset=json cannot be opened" in lines[0]
    assert "nothing.json" in lines[0]
    assert "Traceback" not in done.stderr
