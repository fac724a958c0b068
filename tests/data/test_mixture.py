"""Mixtures: fixed shares of every source, each read in its own order, and one tokenizer for all."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_preparation import document, files_of, silent, write_records

from relora.common.errors import ConfigError
from relora.config.compose import compose
from relora.config.data import DataConfig
from relora.config.mixture import MIXTURE_CYCLE, data_config
from relora.data.corpus import folder_of, load, prepare
from relora.data.mixture import MixedSequences
from relora.data.sequences import TokenSequences, permuted
from relora.data.source import SPLITS

LENGTH = 4


def sequences(folder: Path, number: int, count: int) -> TokenSequences:
    """Sequences of one source. All tokens of sequence i are 1000 * number + i."""
    tokens = np.repeat(np.arange(count), LENGTH) + 1000 * number
    path = folder / f"{number}-{count}.bin"
    np.append(tokens, 0).astype(np.uint32).tofile(path)
    return TokenSequences(path, "uint32", LENGTH)


def mixed(folder: Path, sizes: list[int], shares: list[int], *, held_out: bool = False) -> MixedSequences:
    of_source = zip(sizes, shares, strict=True)
    parts = {f"s{number}": (sequences(folder, number, size), share) for number, (size, share) in enumerate(of_source)}
    return MixedSequences(parts, held_out=held_out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


def firsts(mixture: MixedSequences, step: int, count: int, seed: int, **of_rank: int) -> list[int]:
    return mixture.training_batch(step, count, seed, **of_rank).inputs_BxT[:, 0].tolist()


SIZES, SHARES = [7, 500, 60], [250, 700, 50]


@given(seed=st.integers(0, 2**63 - 1), cycle=st.integers(0, 10**6))
def test_every_cycle_has_the_shares_and_every_source_its_own_order(folder: Path, seed: int, cycle: int) -> None:
    found = firsts(mixed(folder, SIZES, SHARES), cycle, MIXTURE_CYCLE, seed)
    assert Counter(token // 1000 for token in found) == dict(enumerate(SHARES))
    for number, (size, share) in enumerate(zip(SIZES, SHARES, strict=True)):
        alone = permuted(np.arange(cycle * share, (cycle + 1) * share, dtype=np.int64), size, seed)
        own = [token % 1000 for token in found if token // 1000 == number]
        assert Counter(own) == Counter(alone.tolist())


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**9))
def test_a_step_does_not_depend_on_other_steps_and_ranks(folder: Path, seed: int, step: int) -> None:
    mixture = mixed(folder, SIZES, SHARES)
    whole = firsts(mixture, step, 12, seed)
    assert whole == [token for rank in range(3) for token in firsts(mixture, step, 12, seed, rank=rank, world_size=3)]
    assert whole == firsts(mixture, 2 * step, 6, seed) + firsts(mixture, 2 * step + 1, 6, seed)
    assert mixture.step_target_tokens(step, 12, seed) == 12 * LENGTH


def test_the_epochs_of_each_source_are_named(folder: Path) -> None:
    assert mixed(folder, SIZES, SHARES).epochs(2000).endswith("text: 71.43 of s0, 2.80 of s1, 1.67 of s2")


def test_sources_are_spread_over_the_cycle(folder: Path) -> None:
    found = [token // 1000 for token in firsts(mixed(folder, SIZES, SHARES), 0, MIXTURE_CYCLE, 0)]
    for start in range(0, MIXTURE_CYCLE, 200):
        part = Counter(found[start : start + 200])
        assert 100 < part[1] < 180
        assert 20 < part[0] < 80


def test_a_held_out_split_has_as_much_of_each_source_as_fits_the_shares(folder: Path) -> None:
    mixture = mixed(folder, [100, 500, 60], SHARES, held_out=True)
    batch = mixture.batch(np.arange(mixture.count))
    assert Counter(token // 1000 for token in batch.inputs_BxT[:, 0].tolist()) == {0: 100, 1: 280, 2: 20}
    assert mixture.target_tokens == mixture.count * LENGTH == 400 * LENGTH
    with pytest.raises(ValueError, match="less than one sequence"):
        mixed(folder, [1, 500, 60], [980, 10, 10], held_out=True)


# ------------------------------------------------------------------------------------------------------- settings


def settings(tmp_path: Path, **changes: Any) -> DataConfig:
    first = write_records(tmp_path / "one" / "a.jsonl", 400)
    second = write_records(tmp_path / "two" / "b.jsonl", 300, words=20)
    fractions = {"validation_fraction": 0.1, "test_fraction": 0.1}
    sources = {name: {"name": "text", "path": str(path), **fractions} for name, path in (("x", first), ("y", second))}
    values = {"name": "mixture", "sources": sources, "weights": {"x": 3, "y": 1}, "vocab_size": 300}
    return data_config(values | {"sequence_length_tokens": 16} | changes)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sources": {}, "weights": {}}, ["at least two sources", "data.sources={a:"]),
        ({"weights": {"x": 1}}, ["data.weights has x", "x, y"]),
        ({"weights": {"x": 1, "y": 0}}, ["data.weights.y=0", "positive"]),
        ({"weights": {"x": 1, "y": 1e-6}}, ["data.weights.y", "1/1000"]),
        ({"sources": {"x": {"name": "stdlib"}, "y": 3}}, ["data.sources.y=3", "{name: text"]),
        ({"sources": {"x": {"name": "stdlib"}, "y": {"name": "mixture"}}}, ["data.sources.y is a mixture"]),
        ({"sources": {"x": {"name": "stdlib"}, "y": {"name": "hup"}}}, ["data.name=hup", "hub"]),
        ({"sources": {"x": {"name": "stdlib"}, "y": {"name": "text"}}}, ["data.sources.y", "data.path=FILE_OR_FOLDER"]),
        ({"sources": {"x": {"name": "stdlib"}, "y": {"name": "text", "pat": "a"}}}, ["data.sources.y.pat", "path"]),
        (
            {"sources": {"x": {"name": "stdlib"}, "y": {"name": "tokens", "path": "a"}}},
            ["data.sources.y", "data.tokenizer"],
        ),
        (
            {"sources": {"x": {"name": "stdlib"}, "y": {"name": "stdlib", "vocab_size": 999}}},
            ["data.sources.y.vocab_size", "data.vocab_size"],
        ),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(tmp_path, **changes)
    for part in parts:
        assert part in str(raised.value)


def test_the_shares_are_whole_numbers_of_a_cycle(tmp_path: Path) -> None:
    config = settings(tmp_path, weights={"x": 2, "y": 1})
    assert config.shares() == {"x": 667, "y": 333}  # type: ignore[attr-defined]


SOURCES = "data.sources={{code:{{name:stdlib}},prose:{{name:text,path:{path}}}}}"


def test_equal_mixtures_have_one_hash_and_others_have_another(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", 10)
    sources = SOURCES.format(path=path)

    def hash_of(*more: str, weights: str = "{code:0.3,prose:0.7}", sources: str = sources) -> str:
        return compose(["data=mixture", sources, f"data.weights={weights}", *more]).config_hash

    spelled = sources.replace("name:text", "name:text,text_field:text,limit_tokens:null")
    assert hash_of() == hash_of(weights="{prose:7,code:3}") == hash_of(sources=spelled)
    assert hash_of() != hash_of(weights="{code:0.4,prose:0.6}")
    assert hash_of() != hash_of(sources=sources.replace("name:text", "name:text,text_field:other"))


def test_a_missing_file_of_a_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.prose: data\.path=/no/such does not exist"):
        compose(["data=mixture", SOURCES.format(path="/no/such"), "data.weights={code:1,prose:1}"])


# -------------------------------------------------------------------------------------------------------- corpora


def test_a_mixture_is_prepared_once_with_one_tokenizer(tmp_path: Path) -> None:
    config, corpora = settings(tmp_path), tmp_path / "corpora"
    messages: list[str] = []
    made = prepare(config, corpora, messages.append)
    assert "75% x, 25% y" in messages[0]
    assert {part.tokenizer_digest for part in made.parts.values()} == {made.tokenizer_digest}
    assert made.folder == folder_of(config, corpora)
    count = len(messages)
    again = prepare(config, corpora, messages.append)
    assert len(messages) == count
    assert again == made == load(made.folder)
    assert files_of(prepare(config, tmp_path / "other", silent)) == files_of(made)
    assert made.tokenizer_file is not None
    words = json.loads(made.tokenizer_file.read_text())["model"]["vocab"]
    assert "kittens" not in words
    for split in SPLITS:
        assert made.sequences(split, config).count > 0


def test_a_damaged_part_is_prepared_again(tmp_path: Path) -> None:
    config, corpora = settings(tmp_path), tmp_path / "corpora"
    made = prepare(config, corpora, silent)
    damaged = made.parts["y"].folder / "train.bin"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2])
    messages: list[str] = []
    prepare(config, corpora, messages.append)
    assert any(str(damaged) in message for message in messages)
    assert damaged.read_bytes() == whole


def test_weights_alone_prepare_no_text_again(tmp_path: Path) -> None:
    tokenizer = prepare(settings(tmp_path), tmp_path / "corpora", silent).folder
    config = settings(tmp_path, tokenizer=str(tokenizer))
    first = prepare(config, tmp_path / "corpora", silent)
    messages: list[str] = []
    second = prepare(replace(config, weights={"x": 1, "y": 1}), tmp_path / "corpora", messages.append)  # type: ignore[call-arg]
    assert [part.folder for part in first.parts.values()] == [part.folder for part in second.parts.values()]
    assert first.corpus_digest != second.corpus_digest
    assert not any("tokens train" in message for message in messages)


def test_the_documents_are_those_of_the_sources(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    config = settings(tmp_path)
    made = prepare(config, tmp_path / "corpora", silent)
    tokenizer = Tokenizer.from_file(str(made.tokenizer_file))
    for name, count, words in (("x", 400, 60), ("y", 300, 20)):
        part, texts = made.parts[name], []
        for split in SPLITS:
            ids = np.fromfile(part.folder / f"{split}.bin", part.dtype)
            ends = np.flatnonzero(ids == part.end_of_text_id)
            texts += [tokenizer.decode(each.tolist()[:-1]) for each in np.split(ids, ends + 1)[:-1]]
        assert sorted(texts) == sorted(document(number, words) for number in range(count))
