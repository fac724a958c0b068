"""Tokenizers of other forms: a model of sentencepiece, vocab.json with merges.txt, and names on the hub."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hub_server import serving
from test_hub import with_hub
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from relora.config.mixture import data_config
from relora.data import tokenizer as module
from relora.data.corpus import Corpus, prepare
from relora.data.decoding import CorpusError

DOCUMENTS = [
    f"The {number}th document of this text says hello to the world {number % 7} times." for number in range(150)
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS))
    return folder


def settings(text: Path, tokenizer: Path | str | None, **changes: Any):
    values = {"name": "text", "path": str(text), "tokenizer": None if tokenizer is None else str(tokenizer)}
    values |= {"vocab_size": 300, "sequence_length_tokens": 16, "validation_fraction": 0.1, "test_fraction": 0.1}
    return data_config(values | changes)


def silent(message: str) -> None:
    """Ignore the message."""


def documents_in(corpus: Corpus) -> list[list[int]]:
    ids = np.fromfile(corpus.folder / "train.bin", dtype=corpus.dtype).astype(int)
    return [each.tolist()[:-1] for each in np.split(ids, np.flatnonzero(ids == corpus.end_of_text_id) + 1)[:-1]]


def model_of_sentencepiece(folder: Path) -> Path:
    """A folder like that of T5: a model of sentencepiece, and no tokenizer.json."""
    folder.mkdir()
    (folder / "lines.txt").write_text("\n".join(DOCUMENTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=50,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "lines.txt").unlink()
    names = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.mark.slow
def test_a_model_of_sentencepiece_makes_the_tokens_that_sentencepiece_makes(tmp_path: Path, text: Path) -> None:
    folder = model_of_sentencepiece(tmp_path / "t5")
    corpus = prepare(settings(text, folder), tmp_path / "corpora", silent)
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))  # type: ignore[call-arg]
    expected = {tuple(own.encode(each)) for each in DOCUMENTS}  # type: ignore[attr-defined]
    found = documents_in(corpus)
    assert len(found) > 100
    assert {tuple(ids) for ids in found} <= expected
    assert corpus.end_of_text_id == 1
    assert corpus.vocab_size == len(AutoTokenizer.from_pretrained(folder)), "T5's extra ids are part of the vocabulary"


@pytest.mark.slow
def test_without_sentencepiece_the_message_names_the_package(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(b"no model")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r"data\.tokenizer=.*broken .*pip install 'relora\[sentencepiece\]'"):
        prepare(settings(text, folder), tmp_path / "corpora", silent)


@pytest.mark.slow
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(CorpusError, match=r"data\.tokenizer=.*empty cannot be used: transformers cannot load"):
        prepare(settings(text, folder), tmp_path / "corpora", silent)


@pytest.mark.slow
def test_vocab_json_and_merges_txt_are_read(tmp_path: Path, text: Path) -> None:
    made = prepare(settings(text, None), tmp_path / "corpora", silent)
    assert made.tokenizer_file is not None
    trained = json.loads(made.tokenizer_file.read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(trained["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in trained["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    names = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    corpus = prepare(settings(text, folder), tmp_path / "corpora", silent)
    assert documents_in(corpus) == documents_in(made)


# ------------------------------------------------------------------------------------------------- names on the hub


def prepared(tmp_path: Path, address: str, text: Path, tokenizer: str) -> "subprocess.CompletedProcess[str]":
    overrides = [f"data.path={text}", f"data.tokenizer={tokenizer}", f"runs_dir={tmp_path / 'runs'}"]
    overrides += ["data.validation_fraction=0.1", "data.test_fraction=0.1"]
    command = [sys.executable, "-m", "relora", "data", "prepare", "--json", "data=text", *overrides]
    return subprocess.run(
        command, env=with_hub(tmp_path, address), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_tokenizer_of_the_hub_is_used_by_its_name(tmp_path: Path, text: Path) -> None:
    made = prepare(settings(text, None), tmp_path / "corpora", silent)
    assert made.tokenizer_file is not None
    folder = tmp_path / "hub" / "owner" / "tokenizer"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(made.tokenizer_file))
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with serving(tmp_path / "hub") as hub:
        done = prepared(tmp_path, hub.address, text, "owner/tokenizer")
        assert done.returncode == 0, done.stderr
        assert "data.tokenizer=owner/tokenizer has saved truncation" in done.stderr
        again = prepared(tmp_path, hub.address, text, "owner/nothing")
    values = json.loads(done.stdout)
    tokens = np.fromfile(Path(values["folder"]) / "train.bin", dtype=np.uint16)
    assert tokens.tolist() == np.fromfile(made.folder / "train.bin", dtype=np.uint16).tolist()
    assert again.returncode == 1
    (line,) = [line for line in again.stderr.splitlines() if line.startswith("relora: ")]
    assert "data.tokenizer=owner/nothing" in line
    assert "no file or folder here" in line


@pytest.mark.slow
def test_a_name_without_a_network_gives_one_message_in_seconds(tmp_path: Path, text: Path) -> None:
    began = time.monotonic()
    done = prepared(tmp_path, "http://127.0.0.1:9", text, "t5-base")
    assert time.monotonic() - began < 30
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("relora: ")]
    for part in ("data.tokenizer=t5-base", "cannot be reached", "HF_HOME", "null to train one"):
        assert part in line
    assert "Traceback" not in done.stderr


def test_a_path_that_does_not_exist_is_refused_at_composition(text: Path) -> None:
    from relora.common.errors import ConfigError

    with pytest.raises(ConfigError, match=r"data\.tokenizer=/no/such/file has no tokenizer\.json"):
        settings(text, "/no/such/file").check_files()
