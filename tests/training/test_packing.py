"""Runs with padded sequences or attention within documents, from the text to the evaluated model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from relora.cli import main as cli
from relora.common.errors import DamagedFile
from relora.config.compose import compose
from relora.data.corpus import Corpus, prepare
from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir
from relora.training.job import launch

pytestmark = pytest.mark.slow

PAD, WITHIN = "data.packing=pad", "data.attend_across_documents=false"


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 1 to 40 words, so that some are shorter and some longer than a sequence of 16 tokens."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    chance = np.random.default_rng(0)
    words = ["".join(chance.choice(list("abcdefgh"), 3)) for _ in range(30)]
    texts = [" ".join(chance.choice(words, chance.integers(1, 41))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def overrides(tiny: list[str], short_texts: Path) -> list[str]:
    return [*tiny, f"data.path={short_texts}"]


def corpus_of(overrides: list[str]) -> Corpus:
    config = compose(overrides)
    return prepare(config.data, Path(config.runs_dir) / "corpora", print)


def documents_of(corpus: Corpus, split: str) -> list[list[int]]:
    tokens = np.fromfile(corpus.folder / f"{split}.bin", dtype=corpus.dtype)
    starts = np.fromfile(corpus.folder / f"{split}.starts", dtype="<u8").astype(int)
    return [part.tolist() for part in np.split(tokens, starts[1:])]


def mean_loss(folder: Path, documents: list[list[int]]) -> tuple[float, int]:
    """Return the mean loss over the targets of the documents, each read alone, and their number."""
    model, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for document in documents:
        inputs, targets = document[:-1], torch.tensor(document[1:])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([inputs])).logits[0].double()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return total / count, count


@pytest.mark.parametrize("heads", [[], ["model.kv_heads=1"]])
def test_a_padded_run_reports_its_tokens_and_the_perplexity_of_its_documents(
    heads: list[str], overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*overrides, PAD, *heads]
    status = launch(compose(overrides), overrides)
    assert status.state == "finished", status.message
    shown = capsys.readouterr().out
    run, summary = RunDir(compose(overrides).run_dir), status.summary
    corpus = corpus_of(overrides)
    lengths = [min(len(document) - 1, 16) for document in documents_of(corpus, "train")]
    padding = 1 - sum(lengths) / (16 * len(lengths))
    assert f"14 steps of 4 documents (padding is {padding:.0%})" in shown
    assert f"{summary['tokens']:,} in 14 updates" in shown
    assert max(row.get("progress/tokens", 0) for row in read_rows(run.metrics_file)) == summary["tokens"]
    assert 14 * 4 <= summary["tokens"] < 14 * 4 * 16
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["training_seconds"])
    loss, _ = mean_loss(run.model, [document[:17] for document in documents_of(corpus, "test")])
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert launch(compose(overrides), overrides).state == "finished"
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("packing", [PAD, WITHIN])
def test_evaluate_gives_the_test_perplexity_of_the_run(
    packing: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*overrides, packing]
    status = launch(compose(overrides), overrides)
    assert status.state == "finished", status.message
    run = RunDir(compose(overrides).run_dir)
    key, value = packing.removeprefix("data.").split("=")
    about = json.loads((run.model / "relora.json").read_text())
    assert about[key] == {"pad": "pad", "false": False}[value]

    def evaluated(*own: str) -> dict[str, Any]:
        data = [each for each in overrides if each.startswith(("data", "runs_dir")) and each != packing]
        capsys.readouterr()
        assert cli.main(["evaluate", "--json", str(run.model), *data, "trainer.device=cpu", *own]) == 0
        return json.loads(capsys.readouterr().out)

    assert evaluated()["loss"] == pytest.approx(status.summary["test_loss"], rel=1e-9)
    packed = evaluated("data.packing=packed", "data.attend_across_documents=true")
    assert abs(packed["loss"] - status.summary["test_loss"]) > 1e-4
    # A model that an earlier version exported has neither key: its run attended across documents.
    for name in ("packing", "attend_across_documents"):
        del about[name]
    (run.model / "relora.json").write_text(json.dumps(about))
    assert evaluated() == packed


def test_both_settings_use_one_corpus(overrides: list[str]) -> None:
    folders = {corpus_of([*overrides, *own]).folder for own in ([], [PAD], [WITHIN])}
    assert len(folders) == 1
    (folder,) = folders
    assert math.isfinite((folder / "train.starts").stat().st_size)


def test_the_file_of_starts_has_the_begin_of_each_document(overrides: list[str]) -> None:
    corpus = corpus_of(overrides)
    for split in ("train", "validation", "test"):
        documents = documents_of(corpus, split)
        assert all(document[-1] == corpus.end_of_text_id for document in documents)
        assert all(corpus.end_of_text_id not in document[:-1] for document in documents)


def test_a_missing_file_of_starts_is_named(overrides: list[str]) -> None:
    corpus, config = corpus_of(overrides), compose([*overrides, PAD])
    (corpus.folder / "test.starts").unlink()
    with pytest.raises(DamagedFile, match=r"test\.starts .*it is missing; remove its folder") as caught:
        corpus.sequences("test", config.data)
    assert "\n" not in str(caught.value)
    assert corpus.sequences("test", compose(overrides).data).count > 0, "packed text needs no starts"
