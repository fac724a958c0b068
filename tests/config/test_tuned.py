"""The note of a launch that says whether the learning rates were tuned for the setting of the run."""

from pathlib import Path

import pytest

from relora.cli import main as cli
from relora.config.compose import compose
from relora.config.frozen import freeze, thaw
from relora.config.rates import NOT_TUNED, RatesConfig
from relora.config.tuned import Presets, remarks
from relora.studies.baselines import FACTORS
from relora.studies.study import planned_runs
from relora.studies.sweeps import expand

pytestmark = pytest.mark.slow


def noted(*overrides: str) -> RatesConfig:
    return Presets().noted(compose(overrides), overrides).rates


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        ((), "conf/method/relora.yaml"),
        (("method=full",), "conf/method/full.yaml"),
        (("method.rank=8", "method.reset_interval_steps=null"), "conf/method/relora.yaml"),
        (("method.warm_start_steps=0",), "conf/method/relora.yaml"),
        (("experiments=laptop/small",), "conf/presets/laptop/small/relora.yaml"),
        (("experiments=laptop/small", "trainer.total_tokens=819200", "trainer.seed=3"), "laptop/small/relora.yaml"),
        (("method=full", "optimizer.learning_rate=2.5e-3"), "conf/method/full.yaml"),
        (("trainer.sequences_per_micro_step=4", "trainer.device=cpu"), "conf/method/relora.yaml"),
    ],
)
def test_a_preset_in_its_own_setting_is_tuned(overrides: tuple[str, ...], source: str) -> None:
    found = noted(*overrides)
    assert (found.basis, found.differs, found.words) == ("tuned", [], "")
    assert str(found.source).endswith(source)


@pytest.mark.parametrize(
    ("overrides", "differs"),
    [
        (("trainer.total_steps=500",), "trainer.total_steps=500, tuned at 600"),
        (("trainer.total_tokens=819200",), "trainer.total_steps=400, tuned at 600"),
        (("experiments=laptop/small", "trainer.total_steps=600"), "trainer.total_steps=600, tuned at 400"),
        (("trainer.sequences_per_step=32",), "trainer.sequences_per_step=32, tuned at 16"),
        (("trainer.precision=bf16",), "trainer.precision=bf16, tuned at fp32"),
        (("data.sequence_length_tokens=64",), "data.sequence_length_tokens=64, tuned at 128"),
        (("model=llama_20m",), "model=llama_20m, tuned at llama_tiny"),
        (("model.layers=2",), "model.layers=2, tuned at 4"),
        (("experiments=paper/relora_60m", "data=stdlib"), "data.name=stdlib, tuned at hub"),
    ],
)
def test_a_preset_outside_its_setting_is_untuned_and_names_the_difference(
    overrides: tuple[str, ...], differs: str
) -> None:
    found = noted("method=full", *overrides)
    assert (found.basis, found.differs) == ("untuned", [differs])
    assert found.words == NOT_TUNED
    assert differs in found.in_full


def test_another_text_is_another_setting(text: Path) -> None:
    assert noted("data=text", f"data.path={text}").differs == ["data.name=text, tuned at stdlib"]
    assert noted("experiments=paper/relora_60m").basis == "tuned"
    assert noted("experiments=paper/relora_60m", f"data.dataset={text}").differs == [
        f"data.dataset={text}, tuned at allenai/c4"
    ]


@pytest.mark.parametrize(
    ("experiment", "method"),
    [
        ("laptop/crossing", "full"),
        ("laptop/crossing", "relora"),
        ("paper/galore_60m", "full"),
        ("paper/relora_1b", "lora"),
    ],
)
def test_a_preset_that_nobody_tuned_is_untuned_also_in_its_setting(experiment: str, method: str) -> None:
    found = noted(f"experiments={experiment}", f"method={method}")
    assert found.basis == "untuned"
    (reason,) = found.differs
    assert reason.startswith(f"conf/presets/{experiment}/{method}.yaml ")
    assert "not tuned" in reason


@pytest.mark.parametrize("method", ["lowrank", "sltrain", "cola"])
def test_a_method_that_nobody_tuned_is_untuned_in_the_default_run(method: str) -> None:
    found = noted(f"method={method}")
    assert found.basis == "untuned"
    assert found.differs == [f"conf/method/{method}.yaml says that its values are not tuned"]


def test_restarts_are_part_of_the_untuned_values_under_either_name() -> None:
    by_hand = ("method=lowrank", "method.restart_interval_steps=200")
    (message,) = remarks([Presets().noted(compose(by_hand), by_hand)])
    assert "to the learning rates of lowrank" in message, "the user has set the interval"


def test_a_baseline_with_an_untuned_preset_is_tried_at_several_rates() -> None:
    planned = planned_runs(expand(["experiments=laptop/crossing", "method.rank=4,8"]))
    rates = [item.config.optimizer.learning_rate for item in planned if item.role == "baseline"]
    assert sorted(rates) == [2.5e-3 * factor for factor in FACTORS]


def test_a_given_learning_rate_counts_as_set_by_hand() -> None:
    assert noted("optimizer.learning_rate=3e-3", "trainer.total_steps=500").basis == "hand"
    assert noted("optimizer.learning_rate=3e-3").basis == "hand"
    assert noted("optimizer.embedding_learning_rate=3e-3").basis == "hand"
    assert noted("optimizer.embedding_learning_rate=3e-3", "trainer.total_steps=500").basis == "untuned"
    assert {run.rates.basis for run in expand(["optimizer.learning_rate=1e-3,3e-3"]).runs} == {"hand"}


def test_a_launch_reports_untuned_values_once_for_all_runs() -> None:
    messages = expand(["method=full,lora,relora", "trainer.total_steps=500", "trainer.seed=0,1"]).remarks
    assert len(messages) == 1
    assert NOT_TUNED in messages[0]
    assert "trainer.total_steps=500, tuned at 600" in messages[0]
    assert "learning rates of full, lora" in messages[0]
    assert "learning rates, warm start and restarts of relora" in messages[0]
    by_hand = ("method.warm_start_steps=50", "method.reset_interval_steps=50", "trainer.total_steps=500")
    (message,) = remarks([Presets().noted(compose(by_hand), by_hand)])
    assert "the learning rates of relora" in message
    assert expand(["sweeps=methods", "experiments=laptop/small"]).remarks == []


def test_a_single_run_reports_untuned_values_too(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*tiny, "method.warm_start_steps=0", "trainer.total_steps=8"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(NOT_TUNED) == 1
    assert "trainer.total_steps=8, tuned at 600" in shown


def test_the_note_is_in_the_frozen_config_and_not_in_the_hash(tmp_path: Path) -> None:
    plain = compose(["trainer.total_steps=500"])
    config = Presets().noted(plain, ["trainer.total_steps=500"])
    assert config.rates.basis == "untuned"
    assert (config.config_hash, config.comparison_key, config.name) == (
        plain.config_hash,
        plain.comparison_key,
        plain.name,
    )
    assert config.identity == plain.identity
    freeze(config, tmp_path / "config.yaml")
    assert thaw(tmp_path / "config.yaml") == config


def test_a_frozen_config_of_an_older_version_has_no_note_and_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    freeze(compose([]), file)
    text = file.read_text()
    file.write_text(text[: text.index("rates:")])
    assert thaw(file).rates == RatesConfig(basis="unknown")
