"""The evaluation of a split: the same at any micro-batch, equal to a loop over tokens, and what is printed of it."""

import dataclasses
import json
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from damaged import Case
from hypothesis import given
from hypothesis import strategies as st
from trainers import VOCAB, config_of, tokens

from relora.cli import evaluation
from relora.cli import main as cli
from relora.common.perplexity import joined
from relora.config.data import StdlibConfig
from relora.config.published import PublishedConfig
from relora.data.corpus import Corpus
from relora.data.sequences import TokenSequences
from relora.runs.rundir import RunDir
from relora.training.evaluate import Evaluation, evaluate
from relora.training.figures import sequences_per_batch, split_bits_per_byte, summary_figures
from relora.training.model import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    config = config_of("method=relora")
    return build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenSequences:
    """19 sequences of 16 tokens."""
    return tokens(tmp_path_factory.mktemp("tokens"), "held-out", 19 * 16 + 9)


@pytest.fixture(scope="module")
def losses(model: torch.nn.Module, data: TokenSequences) -> list[float]:
    """The loss of each sequence, computed with Hugging Face's forward pass for one token after the other."""
    found: list[float] = []
    for number in range(data.count):
        window = torch.tensor(data.tokens[number * 16 : number * 16 + 17].astype(int))
        loss = 0.0
        for end in range(1, 17):
            with torch.no_grad():
                logits = model(input_ids=window[None, :end], use_cache=False).logits[0, -1].double()
            loss -= torch.log_softmax(logits, 0)[window[end]].item()
        found.append(loss)
    return found


def evaluated(model: torch.nn.Module, data: TokenSequences, size: int) -> Evaluation:
    return evaluate(model, data, sequences_per_batch=size, precision="fp32", device=CPU)


@given(size=st.integers(1, 25))
def test_the_perplexity_is_the_same_at_any_micro_batch(
    model: torch.nn.Module, data: TokenSequences, losses: list[float], size: int
) -> None:
    result = evaluated(model, data, size)
    assert result.tokens == 19 * 16
    assert result.loss == pytest.approx(sum(losses) / result.tokens, rel=1e-6)
    assert len(result.batches) == math.ceil(19 / size)
    for number, batch in enumerate(result.batches):
        own = losses[number * size : (number + 1) * size]
        assert batch.tokens == 16 * len(own)
        assert batch.loss_sum == pytest.approx(sum(own), rel=1e-6)


@given(micro_batch=st.integers(1, 30), most=st.integers(1, 30), gpus=st.integers(1, 3))
def test_the_published_figure_is_the_same_at_any_micro_batch(
    model: torch.nn.Module, data: TokenSequences, losses: list[float], micro_batch: int, most: int, gpus: int
) -> None:
    published = PublishedConfig(
        source="a paper",
        divisor="batches_plus_one",
        micro_batch_sequences=micro_batch,
        gpus=gpus,
        batches_per_gpu=1,
    )
    size = sequences_per_batch(published, most)
    assert micro_batch % size == 0
    assert size == max(number for number in range(1, min(micro_batch, most) + 1) if micro_batch % number == 0)
    figures = summary_figures(evaluated(model, data, size), {"tokens": 313}, published)
    means = [sum(part) / (16 * len(part)) for part in (losses[n : n + micro_batch] for n in range(0, 19, micro_batch))]
    of_gpus = [means[gpu::gpus] for gpu in range(gpus)]
    printed = sum(sum(own) / (len(own) + 1) for own in of_gpus) / gpus
    assert figures["test_perplexity_as_published"] == pytest.approx(math.exp(printed), rel=1e-6)
    assert figures["test_batches_as_published"] == len(of_gpus[0])
    assert figures["test_tokens"] == 19 * 16
    assert "test_bits_per_byte" not in figures


def test_code_that_divides_by_tokens_gives_the_true_perplexity_to_the_bit(
    model: torch.nn.Module, data: TokenSequences
) -> None:
    result = evaluated(model, data, sequences_per_batch(PublishedConfig(source="a paper"), 7))
    assert result.sequences_per_batch == 7
    figures = summary_figures(result, {"tokens": 313, "bytes": 900}, PublishedConfig(source="a paper"))
    assert figures["test_perplexity_as_published"] == result.perplexity
    assert figures["test_bits_per_byte"] == pytest.approx(result.loss * 313 / 900 / math.log(2))
    assert "test_batches_as_published" not in figures
    assert "test_perplexity_as_published" not in summary_figures(result, {"tokens": 313}, None)


def test_batches_that_are_joined_keep_all_tokens(model: torch.nn.Module, data: TokenSequences) -> None:
    result = evaluated(model, data, 4)
    whole = joined(result.batches, 2)
    assert [batch.tokens for batch in whole] == [128, 128, 48]
    assert sum(batch.loss_sum for batch in whole) / result.tokens == pytest.approx(result.loss, rel=1e-12)


# ------------------------------------------------------------------------------------------------- relora evaluate


def test_bits_per_byte_need_the_bytes_of_the_split(model: torch.nn.Module, data: TokenSequences) -> None:
    result = evaluated(model, data, 4)
    corpus = Corpus(
        folder=Path(),
        corpus_digest="c" * 32,
        tokenizer_digest="t" * 32,
        vocab_size=VOCAB,
        end_of_text_id=0,
        dtype="uint16",
        splits={"test": {"tokens": 313, "pieces": 5}},
    )
    settings = StdlibConfig(name="stdlib", sequence_length_tokens=16)
    values = evaluation.values(result, data.count, settings, corpus, "test")
    assert (values["bits_per_byte"], values["split_bytes"], values["split_tokens"]) == (None, None, 313)
    assert "bits per byte are not known" in evaluation.text(values)
    counted = dataclasses.replace(corpus, splits={"test": {"tokens": 313, "pieces": 5, "bytes": 900}})
    values = evaluation.values(result, data.count, settings, counted, "test")
    assert values["bits_per_byte"] == split_bits_per_byte(result, counted.splits["test"])
    assert values["bits_per_byte"] == pytest.approx(math.log2(result.perplexity) * 313 / 900)
    assert f"{values['bits_per_byte']:.4f} bits per byte" in evaluation.text(values)


def state_bytes(folder: Path, split: str, text_bytes: int) -> int:
    """Write the bytes of a split into the meta.json of a corpus, and return the tokens of the split."""
    file = folder / "meta.json"
    meta = json.loads(file.read_text())
    meta.pop("own_crc32")
    meta["splits"][split]["bytes"] = text_bytes
    meta["own_crc32"] = f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"
    file.write_text(json.dumps(meta))
    return meta["splits"][split]["tokens"]


@pytest.mark.slow
def test_relora_evaluate_prints_all_that_a_comparison_needs(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(finished.run.path)
    data = [text for text in finished.overrides if text.startswith(("data=", "data.p", "data.v", "data.t", "runs_dir"))]
    command = ["evaluate", str(run.model), *data, "trainer.device=cpu"]
    assert run.status is not None
    logged = run.status.summary["test_perplexity"]
    assert cli.main(command) == 0
    assert capsys.readouterr().err == "", "the run's own corpus is not prepared again"
    assert len(list((finished.runs_dir / "corpora").glob("*/meta.json"))) == 1
    (split_tokens,) = {state_bytes(path, "test", 2000) for path in (finished.runs_dir / "corpora").glob("*/")}

    assert cli.main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    sequences = (split_tokens - 1) // 16
    assert values["perplexity"] == pytest.approx(logged, rel=1e-9)
    assert (values["split"], values["split_tokens"], values["split_bytes"]) == ("test", split_tokens, 2000)
    assert (values["tokens"], values["sequences"], values["sequence_length_tokens"]) == (sequences * 16, sequences, 16)
    assert values["bits_per_token"] == pytest.approx(math.log2(logged), rel=1e-9)
    assert values["bits_per_byte"] == pytest.approx(math.log2(logged) * split_tokens / 2000, rel=1e-9)
    assert values["text"].startswith("data=text data.path=")
    assert values["corpus_digest"] == run.status.corpus["corpus_digest"]

    assert cli.main(command) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"perplexity {logged:.4f} \(loss \S+\) on {sequences * 16:,} tokens of test", first)
    shown = {line.split()[0]: line for line in lines}
    assert set(shown) == {"text", "split", "divisor", "context", "bits"}
    assert "divided by their number" in shown["divisor"]
    assert "packed" in shown["context"]
    assert "16 predicted tokens" in shown["context"]
    assert f"{split_tokens:,} tokens, {sequences:,} sequences" in shown["split"]

    for size in (1, 2, 8):  # the default batch of a step has 16 sequences
        assert cli.main([*command, "--json", f"trainer.sequences_per_micro_step={size}"]) == 0
        assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(logged, rel=1e-6)
