"""Configs with the same meaning are one run, other configs are two runs, and runs of earlier versions are found."""

from pathlib import Path

import pytest

from relora.config import identity
from relora.config.compose import Composer, compose
from relora.config.frozen import freeze, read_frozen
from relora.config.run import RunConfig

COMPOSER = Composer()
PATCHED = "method.target_modules=[model.layers.{}.self_attn.q_proj]"
REVERSED = "method.target_modules=[down_proj,up_proj,gate_proj,o_proj,v_proj,k_proj,q_proj]"
NO_RESTARTS = "method.reset_interval_steps=null"
EMBEDDING = "optimizer.embedding_learning_rate"
RESET = "method.optimizer_reset"


def hash_of(*overrides: str) -> str:
    return COMPOSER.compose(overrides).config_hash


def every_layer(name: str) -> str:
    return ",".join(f"model.layers.{layer}.{name}" for layer in range(4))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["method.target_modules=[q_proj,v_proj]"], ["method.target_modules=[v_proj,q_proj]"]),
        (["method.target_modules=[q_proj,v_proj]"], ["method.target_modules=[q_proj,v_proj,q_proj]"]),
        (["method.target_modules=[q_proj]"], ["method.target_modules=[self_attn.q_proj]"]),
        (["method.target_modules=[q_proj]"], [f"method.target_modules=[{every_layer('self_attn.q_proj')}]"]),
        ([], [REVERSED]),
        (["method=galore"], ["method=galore", REVERSED]),
        ([NO_RESTARTS], [NO_RESTARTS, f"{RESET}.mode=zero", f"{RESET}.pruning_ratio=0.5", f"{RESET}.reset_step=false"]),
        ([NO_RESTARTS], [NO_RESTARTS, "schedule.restart_warmup_steps=7"]),
        ([NO_RESTARTS], ["method.reset_interval_steps=500", "schedule.restart_warmup_steps=0"]),
        (["method=lowrank"], ["method=lowrank", REVERSED, "schedule.restart_warmup_steps=7"]),
        (["method=lowrank"], ["method=lowrank", "method.restart_interval_steps=600"]),
        (["method=sltrain"], ["method=sltrain", "method.alpha=8", "method.density=3e-2"]),
        ([f"{RESET}.mode=none"], [f"{RESET}.mode=none", f"{RESET}.reset_step=false", f"{RESET}.moments=independent"]),
        ([f"{RESET}.mode=zero"], [f"{RESET}.mode=zero", f"{RESET}.pruning_ratio=0.3"]),
        ([f"{RESET}.mode=zero"], [f"{RESET}.mode=random", f"{RESET}.pruning_ratio=1"]),
        ([f"{RESET}.pruning_ratio=0"], [f"{RESET}.pruning_ratio=0", f"{RESET}.mode=random"]),
        (["method=galore", "method.update_interval_steps=600"], ["method=galore", "method.update_interval_steps=900"]),
        ([], ["data.text_field=body"]),
        ([], ["method.alpha=8"]),
        ([], ["schedule.min_lr_ratio=1e-1"]),
        (["schedule.min_lr_ratio=0"], ["schedule.min_lr_ratio=-0.0"]),
        (["optimizer.weight_decay=0.001"], ["optimizer.weight_decay=1e-3"]),
        (["method=full", f"{EMBEDDING}=null"], ["method=full", f"{EMBEDDING}=2.5e-3"]),
        (["method=full", "method.warm_start_learning_rate=1e-3"], ["method=full"]),
    ],
)
def test_configs_with_the_same_meaning_are_one_run(one: list[str], other: list[str]) -> None:
    assert hash_of(*one) == hash_of(*other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["method.target_modules=[q_proj]"], ["method.target_modules=[k_proj]"]),
        (["method.target_modules=[q_proj]"], [PATCHED.format(0)]),
        ([PATCHED.format(0)], [PATCHED.format(1)]),
        ([NO_RESTARTS], []),
        ([f"{RESET}.mode=none"], [f"{RESET}.mode=zero"]),
        ([f"{RESET}.mode=zero"], [f"{RESET}.mode=zero", f"{RESET}.reset_step=false"]),
        ([f"{RESET}.mode=random"], []),
        ([f"{RESET}.pruning_ratio=0"], [f"{RESET}.mode=none"]),
        (["method=galore", "method.update_interval_steps=300"], ["method=galore", "method.update_interval_steps=400"]),
        (["method=lowrank"], ["method=lowrank", "method.restart_interval_steps=200"]),
        (["method=sltrain"], ["method=sltrain", "method.density=0.05"]),
    ],
)
def test_configs_with_different_meanings_are_two_runs(one: list[str], other: list[str]) -> None:
    assert hash_of(*one) != hash_of(*other)


def test_with_a_given_tokenizer_the_vocabulary_size_does_not_change_the_hash(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    own = f"data.tokenizer={tmp_path}"
    assert hash_of(own) == hash_of(own, "data.vocab_size=1000") != hash_of("data.vocab_size=1000")


@pytest.mark.slow
def test_literal_hashes() -> None:
    """If a hash changes, every user gets another run folder. Then raise identity.SCHEME and find earlier folders."""
    assert identity.SCHEME == 2
    methods = ("relora", "full", "lora", "control", "galore", "fira", "apollo", "apollo_mini", "lowrank", "sltrain")
    methods += ("cola",)
    assert {method: hash_of(f"method={method}") for method in methods} == {
        "relora": "5d752197",
        "full": "ee493fca",
        "lora": "c1377fe5",
        "control": "b2f5a554",
        "galore": "792a0f6b",
        "fira": "6fc7cc9b",
        "apollo": "230d6ecb",
        "apollo_mini": "eb973c61",
        "lowrank": "31e0fbb2",
        "sltrain": "917d4e4b",
        "cola": "2b735545",
    }
    assert hash_of("optimizer=muon") == "06cab290"


EARLIER = [
    ([], ["28c7844a"]),
    (["method=full"], ["c6b73cf8"]),
    (["method=lora"], ["266bd72e"]),
    (["method=control"], ["bf908774"]),
    (["method=galore"], ["858d959c"]),
    (["method.target_modules=[v_proj,q_proj]"], ["2d425b0e", "04e519e9"]),
    ([NO_RESTARTS, f"{RESET}.mode=zero"], ["043552a2", "e9d261ed"]),
    ([f"{RESET}.mode=zero", f"{RESET}.pruning_ratio=0.5"], ["b53e6116", "3ecc3bf1"]),
    (["trainer.precision=bf16", "trainer.seed=3", "method.warm_start_steps=0"], ["e1ad216a"]),
]
"""Commands, and the hashes of their runs under scheme 1. The newest version's hash is first, version 0.1's is last."""


@pytest.mark.parametrize(("overrides", "hashes"), EARLIER)
def test_the_hashes_of_earlier_versions(overrides: list[str], hashes: list[str]) -> None:
    assert identity.hashes(COMPOSER.compose(overrides))[1:] == hashes


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "hashes"), EARLIER)
def test_the_same_command_finds_the_folder_of_an_earlier_version(
    overrides: list[str], hashes: list[str], tmp_path: Path
) -> None:
    def composed() -> RunConfig:
        return compose([*overrides, f"runs_dir={tmp_path}"])

    new, variant, key = composed().name, composed().variant, composed().comparison_key
    for digits in hashes:
        earlier = f"{new[:-9]}-{digits}"
        freeze(composed(), tmp_path / earlier / "config.yaml")
        assert (composed().name, composed().config_hash) == (earlier, digits)
        read = read_frozen(tmp_path / earlier / "config.yaml")
        assert (read.run_dir, read.variant, read.comparison_key) == (tmp_path / earlier, variant, key)
        (tmp_path / earlier / "config.yaml").unlink()
        (tmp_path / earlier).rmdir()
    (tmp_path / f"{new[:-9]}-{hashes[0]}").mkdir()
    (tmp_path / new).mkdir()
    assert composed().name == new


def test_a_changed_default_is_another_run(tmp_path: Path) -> None:
    """The run does not get the folder that an earlier version made with the old default."""
    before = compose([f"runs_dir={tmp_path}"])
    (tmp_path / f"llama_tiny-relora-r32-{identity.hashes(before)[1]}").mkdir()
    name = "method.optimizer_reset.pruning_ratio"
    after = compose([f"{name}=0.9", f"runs_dir={tmp_path}"])
    assert identity.canonical(before)[name] == 0.99
    assert after.name.endswith(identity.digest(after.identity))


def test_every_field_that_changes_results_is_hashed() -> None:
    """Every field without UNHASHED is in the hash, except the fields without effect."""
    config = COMPOSER.compose([])
    without_effect = {"data.text_field", "method.warm_start_learning_rate"}
    missing = set(identity.every_field(config)) - set(config.identity) - without_effect
    assert not missing
