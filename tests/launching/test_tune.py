import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf
from small import REPOSITORY

from relora.common.errors import ConfigError, RunError
from relora.config import choices, compose, presets
from relora.launching import tune
from relora.launching.launch import Planned
from relora.runs.metrics import MetricsLog
from relora.studies.sweeps import search

SWEEP = "sweeps=tune_learning_rate"


def test_the_file_sets_what_is_searched() -> None:
    found = search([SWEEP, "experiments=laptop/small", "method=lora", "trainer.seed=0,1", "tune.trials=3"])
    assert found is not None
    assert (found.method, found.experiment, found.trials, found.seeds) == ("lora", "laptop/small", 3, [0, 1])
    assert set(found.ranges) == {"optimizer.learning_rate", "optimizer.embedding_learning_rate"}
    assert found.study == "tune_learning_rate"


def test_a_search_may_choose_from_a_list() -> None:
    found = search(["sweeps=tune_relora", "experiments=laptop/small", "method=relora", "tune.trials=3"])
    assert found is not None
    assert found.choices == {"method.reset_interval_steps": [40, 80, 160, 320]}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(20):
        drawn.append(tune._drawn(study.ask(), found))
        (planned,) = tune._runs(found, drawn[-1])
        config = planned.config
        assert config.reset_interval_steps == drawn[-1]["method.reset_interval_steps"]
        assert config.optimizer.learning_rate == float(f"{drawn[-1]['optimizer.learning_rate']:.3g}")
    assert {values["method.reset_interval_steps"] for values in drawn} == {40, 80, 160, 320}
    assert 0.25 <= min(values["method.b_rate_ratio"] for values in drawn) < 1
    assert max(values["method.b_rate_ratio"] for values in drawn) > 4


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("80", r"tune\.choices\.method\.reset_interval_steps=80 must be a list"),
        ("[80]", "at least two values"),
        ("[80,312]", r"method\.reset_interval_steps=312"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_runs(choices: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(
            [
                *("sweeps=tune_relora", "experiments=laptop/small", "method=relora"),
                f"tune.choices.method.reset_interval_steps={choices}",
            ]
        )


@pytest.mark.parametrize(
    ("value", "at_an_end"), [(1e-3, True), (1.1e-3, True), (1.5e-3, False), (8e-3, False), (9.5e-3, True), (1e-2, True)]
)
def test_a_best_value_near_an_end_of_its_range_is_told(value: float, at_an_end: bool) -> None:
    assert tune._at_an_end({"rate": value}, {"rate": (1e-3, 1e-2)}) == (["rate"] if at_an_end else [])


def test_choices_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.choices=3 must hold lists"):
        search(["sweeps=tune_relora", "method=relora", "tune.choices=3"])


def test_a_choice_is_not_rounded() -> None:
    found = search(["sweeps=tune_relora", "experiments=laptop/small", "method=relora"])
    assert found is not None
    found = replace(found, choices={"method.optimizer_reset.pruning_ratio": [0.99995, 0.99995]})
    drawn = tune._drawn(optuna.create_study().ask(), found)
    (planned,) = tune._runs(found, drawn)
    assert planned.config.method.optimizer_reset.pruning_ratio == 0.99995  # type: ignore[attr-defined]


def test_a_choice_is_written_to_the_preset(tmp_path: Path, capsys) -> None:
    overrides = ["sweeps=tune_relora", "method=relora"]
    found = search(["sweeps=tune_relora", "experiments=laptop/small", "method=relora"])
    assert found is not None
    study = optuna.create_study()
    trial = study.ask()
    tune._drawn(trial, replace(found, ranges={"optimizer.learning_rate": (2e-2, 2e-2)}))
    study.tell(trial, 2.0)
    tune._write_preset(study, replace(found, experiment=None), tmp_path, overrides)
    out = capsys.readouterr().out
    chosen = trial.params["method.reset_interval_steps"]
    assert f"learning_rate=0.02 method.reset_interval_steps={chosen} (mean loss 2.0000" in out
    assert re.search(r"note: optimizer\.learning_rate=0\.02 is near an end of its range \[0\.0006, 0\.02\]", out)
    presets.write_preset(tmp_path / "relora.yaml", {"method.reset_interval_steps": 80, "method.alpha": None}, "found")
    assert OmegaConf.load(tmp_path / "relora.yaml").method == {"reset_interval_steps": 80, "alpha": None}


def test_other_sweeps_are_no_search() -> None:
    assert search(["sweeps=methods"]) is None
    assert search(["method.rank=2,4"]) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.rank=2,4"], r"method\.rank cannot be swept .*; launch one search"),
        (["tune.trials=0"], r"tune\.trials=0 must be .*at least 1"),
        (["tune.trials=abc"], r"tune\.trials=abc must be a whole number"),
        (["tune.ranges.optimizer.learning_rate=1e-3"], r"optimizer\.learning_rate=0\.001 must be two positive numbers"),
        (["trainer.seed=abc"], "trainer.seed"),
        (
            ["tune.ranges.optimizer.learning_rate=[1e-2,1e-3]"],
            r"=\[0\.01, 0\.001\] .*positive numbers, the lower first",
        ),
        (["method.rank=100000"], "exceeds min"),
    ],
)
def test_a_wrong_search_is_refused_before_anything_runs(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search([SWEEP, *overrides])


def test_a_preset_keeps_its_other_values(tmp_path: Path) -> None:
    file = tmp_path / "laptop" / "relora.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\nmethod:\n  rank: 8\noptimizer:\n  learning_rate: 1.0\n")
    values = {"optimizer.learning_rate": 2e-3, "optimizer.embedding_learning_rate": 1e-2}
    presets.write_preset(file, values, "by a search")
    assert OmegaConf.to_container(OmegaConf.load(file)) == {
        "method": {"rank": 8},
        "optimizer": {"learning_rate": 2e-3, "embedding_learning_rate": 1e-2},
    }
    assert file.read_text().startswith("# @package _global_\n# by a search\n")


def test_a_preset_keeps_its_comments_and_says_what_the_search_replaced(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    file.write_text(
        "# @package _global_\n# From the paper, appendix C.1.\nmethod:\n  rank: 8 # table 2\n\noptimizer:\n"
        "  learning_rate: 1.0e-3 # scripts/60M.sh\n  max_grad_norm: null # the authors'\n"
    )
    values = {"optimizer.learning_rate": 2e-3, "optimizer.embedding_learning_rate": 1e-2}
    presets.write_preset(file, values, "Learning rates: the best of 2 trials, by\n  python run.py -m one")
    presets.write_preset(
        file, {"optimizer.learning_rate": 3e-5}, "Learning rates: the best of 9, by\n  python run.py -m a"
    )
    assert file.read_text() == (
        "# @package _global_\n# Learning rates: the best of 9, by\n#   python run.py -m a\n"
        "# From the paper, appendix C.1.\nmethod:\n  rank: 8 # table 2\n\noptimizer:\n"
        "  learning_rate: 3e-05 # before the search: 1.0e-3, scripts/60M.sh\n  max_grad_norm: null # the authors'\n"
        "  embedding_learning_rate: 0.01\n"
    )
    assert OmegaConf.load(file).optimizer.learning_rate == 3e-5


@pytest.mark.parametrize(
    "text", ["optimizer: {learning_rate: 1.0, beta1: 0.8} # a comment\n", "optimizer:\n    beta1: 0.8\n", ""]
)
def test_a_preset_with_another_layout_gets_the_same_values(tmp_path: Path, text: str) -> None:
    file = tmp_path / "full.yaml"
    file.write_text("# @package _global_\n" + text)
    presets.write_preset(file, {"optimizer.learning_rate": 2e-3}, "by a search")
    kept = {"beta1": 0.8} if text else {}
    assert OmegaConf.to_container(OmegaConf.load(file)) == {"optimizer": {"learning_rate": 2e-3, **kept}}
    assert file.read_text().startswith("# @package _global_\n# by a search\n")


def judged_study(*losses: float) -> optuna.Study:
    study = optuna.create_study()
    for number, loss in enumerate(losses, start=1):
        trial = study.ask()
        trial.suggest_float("optimizer.learning_rate", number * 1e-3, number * 1e-3, log=True)
        study.tell(trial, loss)
    return study


@pytest.mark.slow
def test_a_search_writes_its_best_rates_to_the_preset_of_the_method(tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(REPOSITORY / "conf", tmp_path / "conf")
    shutil.copytree(REPOSITORY / "experiments", tmp_path / "experiments")
    shutil.copytree(REPOSITORY / "sweeps", tmp_path / "sweeps")
    monkeypatch.setattr(choices, "home", lambda: tmp_path)
    overrides = [SWEEP, "experiments=laptop/crossing", "method=relora", "runs_dir=/elsewhere", "trainer.seed=0,1"]
    found = search(overrides)
    assert found is not None
    tune._write_preset(judged_study(3.0, 2.0, 4.0), found, tmp_path, overrides)
    file = tmp_path / "conf" / "presets" / "laptop" / "crossing" / "relora.yaml"
    out = capsys.readouterr().out
    assert f"preset: {file}" in out
    assert "note:" not in out
    text = file.read_text()
    assert re.search(r"^# Learning rates: .*best of 16 trials .*2 seeds .*\(loss 2\.0000\), by$", text, re.MULTILINE)
    assert (
        "#   python run.py -m sweeps=tune_learning_rate experiments=laptop/crossing method=relora trainer.seed=0,1\n"
        in text
    )
    assert "learning_rate: 0.002 # before the search: 5.0e-3, LoRA's\n" in text
    assert "warm_start_steps: 400 # a tenth of the run\n" in text
    assert "\nrates:" not in text  # the search has tuned them
    assert compose.compose(["experiments=laptop/crossing", "method=relora"]).optimizer.learning_rate == 2e-3


@pytest.mark.slow
def test_only_trials_with_failed_runs_count_as_failures(tmp_path: Path, tiny: list[str], monkeypatch) -> None:
    found = search([*tiny, SWEEP])
    assert found is not None
    config = compose.compose(tiny)
    for _ in range(tune.MOST_FAILURES + 2):
        tune._open(tmp_path / "optuna.db", found, config).ask()
    study = tune._open(tmp_path / "optuna.db", found, config)
    runs = [Planned(config=config, role="arm")]
    for _ in range(tune.MOST_FAILURES):
        tune._try_again(study, tune._Attempt(trial=study.ask(), runs=runs))
    with pytest.raises(RunError, match=rf"{tune.MOST_FAILURES + 1} trials have failed.*see its log\.txt"):
        tune._try_again(study, tune._Attempt(trial=study.ask(), runs=runs))


def test_a_trial_worse_than_the_median_is_stopped_and_a_better_one_is_not(tiny: list[str]) -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
    for loss in (3.0, 3.1, 3.2):
        trial = study.ask()
        trial.report(loss, 5)
        study.tell(trial, loss)
    verdicts = {}
    for name, loss in (("worse", 4.0), ("better", 2.0)):
        seed = {"worse": 1, "better": 2}[name]
        item = Planned(config=compose.compose([*tiny, f"trainer.seed={seed}"]), role="arm")
        item.run.path.mkdir(parents=True)
        with MetricsLog.opened(item.run.metrics_file, exact=True) as log:
            log.log(5, {"eval/loss": loss})
        verdicts[name] = tune._is_hopeless(tune._Attempt(trial=study.ask(), runs=[item]))
    assert verdicts == {"worse": True, "better": False}


@pytest.mark.slow
def test_a_search_of_another_setting_is_another_search(tmp_path: Path, tiny: list[str]) -> None:
    names = set()
    for changes in ([], ["method.rank=2"], ["optimizer.beta2=0.95"], ["trainer.seed=5,6"], ["tune.trials=3"]):
        found = search([*tiny, SWEEP, *changes])
        assert found is not None
        names.add(tune._question_key(found, compose.compose(found.overrides)))
    assert len(names) == 4


@pytest.mark.slow
def test_a_resumed_search_draws_other_values(tmp_path: Path, tiny: list[str]) -> None:
    found = search([*tiny, SWEEP])
    assert found is not None
    drawn = []
    for _ in range(3):
        study = tune._open(tmp_path / "optuna.db", found, compose.compose(tiny))
        trial = study.ask()
        drawn.append(tuple(trial.suggest_float(name, *limits, log=True) for name, limits in found.ranges.items()))
        study.tell(trial, 1.0)
    assert len(set(drawn)) == 3


def test_a_search_has_one_launcher(tmp_path: Path) -> None:
    with tune._locked(tmp_path), pytest.raises(RunError, match="process runs the search"), tune._locked(tmp_path):
        pass


def launched(overrides: list[str]) -> str:
    command = [sys.executable, "run.py", "-m", *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=600).stdout


@pytest.mark.slow
def test_a_search_resumes_after_its_judged_trials_and_finds_the_best(tiny: list[str]) -> None:
    ranges = ["tune.ranges.optimizer.learning_rate=[1e-4,1e-2]"]
    overrides = [*tiny, SWEEP, *ranges, "cluster.max_parallel=2"]
    first = launched([*overrides, "tune.trials=2"])
    assert re.search("0 of 2 trials .*judged already", first)
    assert first.count("validation loss") == 2
    second = launched([*overrides, "tune.trials=3"])
    assert re.search("2 of 3 trials .*judged already", second)
    assert second.count("validation loss") == 1
    runs_dir = Path(compose.compose(tiny).runs_dir)
    storage = f"sqlite:///{runs_dir / 'studies' / 'tune_learning_rate' / 'optuna.db'}"
    study = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    by_hash = {trial.number: tune._runs(search(overrides), trial.params)[0] for trial in study.trials}  # type: ignore[arg-type]
    for number, item in by_hash.items():
        status = item.run.status
        assert status is not None
        assert study.trials[number].value == status.summary["eval_loss"]
    best = min(study.trials, key=lambda trial: trial.value or 9e9)
    rate = f"{best.params['optimizer.learning_rate']:.3g}"
    assert f"best on validation: optimizer.learning_rate={float(rate):g} " in second
    assert "no preset is written" in second


@pytest.mark.slow
def test_the_trial_of_a_dead_process_is_tried_again_with_the_same_values(tmp_path: Path, tiny: list[str]) -> None:
    found = search([*tiny, SWEEP])
    assert found is not None
    config = compose.compose(tiny)
    study = tune._open(tmp_path / "optuna.db", found, config)
    trial = study.ask()
    values: dict[str, Any] = {
        name: trial.suggest_float(name, *limits, log=True) for name, limits in found.ranges.items()
    }
    again = tune._open(tmp_path / "optuna.db", found, config)
    retried = again.ask()
    assert {name: retried.suggest_float(name, *limits, log=True) for name, limits in found.ranges.items()} == values
    assert tune._judged(again) == 0
