"""`relora data prepare` and `relora data inspect` show what is in the files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_preparation import document, write_records
from tokenizers import Tokenizer, models, pre_tokenizers

from relora.cli import main as cli
from relora.config.compose import compose
from relora.data.corpus import Corpus, folder_of, load

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    path = write_records(tmp_path / "a.jsonl", 300)
    own = ["data=text", f"data.path={path}", "data.vocab_size=300", "data.sequence_length_tokens=16"]
    return [*own, "data.validation_fraction=0.1", "data.test_fraction=0.1", f"runs_dir={tmp_path / 'runs'}"]


def corpus_of(overrides: list[str]) -> Corpus:
    config = compose(overrides)
    return load(folder_of(config.data, Path(config.runs_dir) / "corpora"))


def inspected(overrides: list[str], capsys: Captured) -> dict[str, Any]:
    assert cli.main(["data", "prepare", *overrides]) == 0
    capsys.readouterr()
    assert cli.main(["data", "inspect", "--json", *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_figures_are_those_of_the_files(overrides: list[str], capsys: Captured) -> None:
    found = inspected(overrides, capsys)
    corpus = corpus_of(overrides)
    ids = {split: np.fromfile(corpus.folder / f"{split}.bin", corpus.dtype) for split in found["splits"]}
    every = np.concatenate(list(ids.values()))
    assert found["end_of_text_share"] == pytest.approx(float((every == corpus.end_of_text_id).mean()))
    assert found["ids_never_used"] == corpus.vocab_size - len(np.unique(every))
    assert sum(split["bytes"] for split in found["splits"].values()) == sum(
        len(document(n).encode()) for n in range(300)
    )
    for split, values in found["splits"].items():
        ends = np.flatnonzero(ids[split] == corpus.end_of_text_id)
        lengths = np.diff(np.append(-1, ends))
        assert values["tokens"] == len(ids[split])
        assert values["pieces"] == len(lengths) == sum(values["pieces_by_length"].values())
        assert values["length_quartiles_tokens"][0] == lengths.min()
        assert values["length_quartiles_tokens"][-1] == lengths.max()
        assert values["bytes_per_token"] == pytest.approx(values["bytes"] / values["tokens"])
        for low, count in values["pieces_by_length"].items():
            assert count == sum(int(low) <= length < 2 * int(low) for length in lengths)
    assert found["near_duplicates"]["validation"]["documents"] > 10


@pytest.mark.parametrize("more", [(), ("data.packing=pad",)])
def test_the_samples_are_the_first_sequences_of_training(
    overrides: list[str], more: tuple[str, ...], capsys: Captured
) -> None:
    overrides = [*overrides, *more]
    samples = inspected(overrides, capsys)["samples"]
    corpus, config = corpus_of(overrides), compose(overrides)
    batch = corpus.sequences("train", config.data).training_batch(0, 3, config.trainer.seed)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    assert len(samples) == 3
    for sample, inputs_T, targets_T in zip(samples, batch.inputs_BxT, batch.targets_BxT, strict=True):
        ids = [int(inputs_T[0]), *(int(token) for token in targets_T if token >= 0)]
        assert sample == tokenizer.decode(ids, skip_special_tokens=False)


def test_unknown_tokens_are_counted(tmp_path: Path, overrides: list[str], capsys: Captured) -> None:
    words = sorted({word for number in range(300) for word in document(number).split()} - {"cat", "dog"})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1} | {w: n + 2 for n, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "own").mkdir()
    tokenizer.save(str(tmp_path / "own" / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[UNK]"}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(names))
    found = inspected([*overrides, f"data.tokenizer={tmp_path / 'own'}"], capsys)
    unknown = sum(word in ("cat", "dog") for number in range(300) for word in document(number).split())
    total = sum(split["tokens"] for split in found["splits"].values())
    assert found["unknown_share"] == pytest.approx(unknown / total)


def test_the_text_shows_all_of_it(overrides: list[str], capsys: Captured) -> None:
    found = inspected(overrides, capsys)
    assert cli.main(["data", "inspect", *overrides]) == 0
    text = capsys.readouterr().out
    assert f"{found['splits']['train']['tokens']:,}" in text
    assert "never used" in text
    assert "near-duplicates" in text
    assert "█" in text
    assert "training sequence 3" in text


def test_prepare_prints_the_folder_and_inspect_needs_it(overrides: list[str], capsys: Captured) -> None:
    assert cli.main(["data", "inspect", *overrides]) == 1
    error = capsys.readouterr().err
    assert "is not prepared" in error
    assert "relora data prepare" in error
    assert cli.main(["data", "prepare", "--json", *overrides]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["folder"] == str(corpus_of(overrides).folder)
    assert values["splits"]["train"]["tokens"] > 1000


def test_a_mixture_is_shown_source_by_source(tmp_path: Path, capsys: Captured) -> None:
    for name in ("one", "two"):
        write_records(tmp_path / name / "a.jsonl", 150 if name == "one" else 200)
    fractions = "validation_fraction:0.1,test_fraction:0.1"
    sources = ",".join(f"{name}:{{name:text,path:{tmp_path / name},{fractions}}}" for name in ("one", "two"))
    own = ["data=mixture", f"data.sources={{{sources}}}", "data.weights={one:1,two:3}", "data.vocab_size=300"]
    own += ["data.sequence_length_tokens=16", f"runs_dir={tmp_path / 'runs'}"]
    found = inspected(own, capsys)
    assert found["shares"] == {"one": 250, "two": 750}
    assert set(found["parts"]) == {"one", "two"}
    assert cli.main(["data", "inspect", *own]) == 0
    text = capsys.readouterr().out
    assert "one, 25% of the mixture" in text
    assert "two, 75% of the mixture" in text


@pytest.mark.parametrize("words", [["data"], ["data", "show"], ["data", "prepare", "--workers", "0"]])
def test_a_wrong_action_is_one_line(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("relora: ")
