"""The full-rank baselines that a launch adds. Only the setting decides which runs they are."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relora.common.errors import ConfigError
from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.studies.baselines import launch_notes
from relora.studies.study import planned_runs
from relora.studies.sweeps import expand

pytestmark = pytest.mark.slow


PLAIN = ("baseline_rates=[1]", "method.warm_start_steps=0", "method.reset_interval_steps=null", "study=x")


def baselines(*overrides: str) -> list[RunConfig]:
    return [item.config for item in planned_runs(expand([*PLAIN, *overrides])) if item.role == "baseline"]


def hashes(*overrides: str) -> set[str]:
    return {config.config_hash for config in baselines(*overrides)}


def test_swept_schedule_and_optimizer_values_do_not_change_the_baseline() -> None:
    own = compose(["method=full"]).config_hash
    for swept in ("schedule.warmup_steps=10,200", "optimizer.weight_decay=0.3,0.0", "optimizer.max_grad_norm=null,1"):
        key, _, values = swept.partition("=")
        assert hashes(swept) == hashes(f"{key}={','.join(reversed(values.split(',')))}") == {own}, swept


def test_values_that_are_fixed_for_all_runs_apply_to_full_rank_too() -> None:
    fixed = (
        "optimizer.beta2=0.95",
        "schedule.warmup_steps=7",
        "optimizer.learning_rate=7e-3",
        "trainer.precision=bf16",
    )
    (found,) = baselines("method.rank=8,16", *fixed)
    assert found.config_hash == compose(["method=full", *fixed]).config_hash
    (note,) = launch_notes([found], [found])
    assert all(text in note for text in fixed[:3])
    assert "conf/method/full.yaml" in note
    assert "7 steps of warm-up" in note


def test_the_launch_names_the_preset_that_the_rates_come_from() -> None:
    (found,) = baselines("method.rank=8,16", "experiments=laptop/small")
    (note,) = launch_notes([found], [found])
    assert "learning rate 0.0025," in note
    assert "0.04 for embeddings" in note
    assert "conf/presets/laptop/small/full.yaml" in note
    assert "given" not in note


AXES = {
    "method.rank": ["4", "8"],
    "schedule.warmup_steps": ["10", "60", "20"],
    "optimizer.weight_decay": ["0.3", "0.0"],
    "optimizer.learning_rate": ["1e-3", "5e-3"],
    "trainer.seed": ["0", "1"],
    "trainer.total_steps": ["300", "600"],
    "experiments": ["laptop/small", "laptop/crossing"],
}


@settings(max_examples=4)
@given(st.lists(st.sampled_from(sorted(AXES)), min_size=1, max_size=3, unique=True), st.randoms(use_true_random=False))
@example(["schedule.warmup_steps", "optimizer.weight_decay"], random.Random(0))
def test_the_order_of_values_and_of_axes_changes_no_baseline(axes: list[str], chance: random.Random) -> None:
    given_order = [f"{key}={','.join(AXES[key])}" for key in axes]
    other_order = [f"{key}={','.join(chance.sample(AXES[key], len(AXES[key])))}" for key in axes]
    chance.shuffle(other_order)
    assert hashes(*given_order) == hashes(*other_order)


def test_the_order_of_arms_changes_no_baseline() -> None:
    grids = ["method=lora,relora,galore", "method=galore,relora,lora"]
    found = [
        {
            item.config.config_hash
            for item in planned_runs(expand([grid, "optimizer.beta1=0.8", "baseline_rates=[1]", "study=x"]))
            if item.role == "baseline"
        }
        for grid in grids
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_a_schedule_of_full_rank_that_does_not_fit_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"baseline.*schedule.warmup_steps=50.*method=full"):
        baselines("schedule.warmup_steps=5,10", "trainer.total_steps=40")
    assert len(baselines("method.rank=8,16", "schedule.warmup_steps=5", "trainer.total_steps=40")) == 1


# --------------------------------------------------------------------------------------------------- several rates


def planned(*overrides: str) -> list[tuple[str, float, float | None]]:
    """Return (role, learning rate, learning rate of embeddings) of the full-rank runs."""
    items = planned_runs(expand(["study=x", *overrides]))
    rates = [(item.role, item.config.optimizer, item.config.method.name) for item in items]
    return [(role, own.learning_rate, own.embedding_learning_rate) for role, own, name in rates if name == "full"]


LADDER = [
    ("baseline", 6.25e-4, 0.02),
    ("baseline", 1.25e-3, 0.02),
    ("baseline", 2.5e-3, 0.02),
    ("baseline", 5e-3, 0.02),
]


def test_full_rank_is_tried_at_several_rates_if_its_rates_are_not_tuned() -> None:
    assert planned("method.rank=8,16") == LADDER[2:3]
    assert planned("method.rank=8,16", "trainer.total_steps=500") == LADDER
    assert len(planned("method.rank=8,16", "trainer.total_steps=500", "trainer.seed=0,1")) == 8
    assert planned("method.rank=8,16", "trainer.total_steps=500", "baseline_rates=[1]") == LADDER[2:3]
    assert planned("method.rank=8,16", "baseline_rates=[0.5,1]") == LADDER[1:3]
    fixed = ("optimizer.learning_rate=0.01", "optimizer.embedding_learning_rate=null")
    assert [(rate, other) for _, rate, other in planned("method.rank=8,16", *fixed)] == [
        (rate, None) for rate in (0.0025, 0.005, 0.01, 0.02)
    ]


def test_full_rank_arms_get_other_rates_if_theirs_are_neither_tuned_nor_given() -> None:
    assert planned("method=full,relora") == [("arm", 2.5e-3, 0.02)]
    steps = "trainer.total_steps=500"
    assert planned("method=full,lora", steps)[:3] == [rung for rung in LADDER if rung[1] != 2.5e-3]
    assert planned("method=full,lora", steps, "optimizer.learning_rate=3e-3") == [("arm", 3e-3, 0.02)]
    assert planned("method=full", "trainer.total_steps=400,500") == [("arm", 2.5e-3, 0.02)] * 2


def test_the_launch_notes_report_the_cost_of_the_other_rates() -> None:
    items = planned_runs(expand(["study=x", "method.rank=8,16", "trainer.total_steps=500"]))
    notes = launch_notes([i.config for i in items if i.role == "baseline"], [i.config for i in items])
    ladder_note = next(note for note in notes if "baseline_rates=[1]" in note)
    assert "3 of the 6 runs" in ladder_note
    assert "% of the study's FLOPs" in ladder_note
    assert "0.000625, 0.00125, 0.0025, 0.005" in ladder_note


@pytest.mark.parametrize("value", ["[]", "[0]", "[-1]", "[true]", "high", "[1,x]"])
def test_invalid_baseline_rates_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"baseline_rates=.*must be positive factors"):
        expand(["method.rank=8,16", f"baseline_rates={value}"])
