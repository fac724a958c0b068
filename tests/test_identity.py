"""Whatever means the same is one run, whatever differs is two, and runs of an earlier version are found."""

from pathlib import Path

import pytest

from relora.config.compose import Composer, compose
from relora.config.frozen import at_home, freeze
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
def test_what_means_the_same_is_one_run(one: list[str], other: list[str]) -> None:
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
    ],
)
def test_what_differs_is_two_runs(one: list[str], other: list[str]) -> None:
    assert hash_of(*one) != hash_of(*other)


def test_a_tokenizer_of_ones_own_makes_the_trained_vocabulary_size_no_part_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    own = f"data.tokenizer={tmp_path}"
    assert hash_of(own) == hash_of(own, "data.vocab_size=1000") != hash_of("data.vocab_size=1000")


def test_the_hashes_of_runs_that_people_have_stay_as_they_are() -> None:
    """Figures of version 0.1."""
    assert hash_of() == "28c7844a"
    names = {method: hash_of(f"method={method}") for method in ("full", "lora", "control", "galore")}
    assert names == {"full": "c6b73cf8", "lora": "266bd72e", "control": "bf908774", "galore": "858d959c"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.target_modules=[v_proj,q_proj]"],
        [NO_RESTARTS, f"{RESET}.mode=zero"],
        [f"{RESET}.mode=zero", f"{RESET}.pruning_ratio=0.5"],
    ],
)
def test_the_same_command_finds_the_folder_that_an_earlier_version_made(overrides: list[str], tmp_path: Path) -> None:
    def composed() -> RunConfig:
        return compose([*overrides, f"runs_dir={tmp_path}"])

    new = composed().name
    earlier = composed()._named(composed()._fields_of_the_first_version)
    assert earlier != new
    freeze(composed(), tmp_path / earlier / "config.yaml")
    assert composed().name == earlier
    assert at_home(tmp_path / earlier / "config.yaml").run_dir == tmp_path / earlier
    (tmp_path / new).mkdir()
    assert composed().name == new
