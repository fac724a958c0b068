import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import REPOSITORY

from relora.cli import main as cli
from relora.common.errors import ConfigError
from relora.config import choices
from relora.config.compose import compose
from relora.launching import launch, local
from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir, Status
from relora.studies.manifest import study_dir
from relora.studies.study import planned_runs
from relora.studies.sweeps import expand

pytestmark = pytest.mark.slow


SWEEP = ["method=relora", "method.rank=2,4", "study=ranks"]


def manifest(overrides: list[str], study: str) -> dict:
    return json.loads((study_dir(Path(compose(overrides).runs_dir), study) / "study.json").read_text())


def runs_of(overrides: list[str]) -> list[RunDir]:
    return [item.run for item in planned_runs(expand(overrides))]


# ---------------------------------------------------------------------------------------------------- what is swept


def test_a_sweep_on_the_command_line_is_the_product_of_its_choices() -> None:
    sweep = expand(["method.rank=8,16,32", "trainer.seed=0,1", "study=mine"])
    assert sweep.study == "mine"
    assert [(run.rank, run.trainer.seed) for run in sweep.runs] == [(r, s) for r in (8, 16, 32) for s in (0, 1)]
    assert {run.study for run in sweep.runs} == {"mine"}


def test_a_study_without_a_name_is_named_after_the_swept_keys() -> None:
    assert expand(["method.rank=8,16", "trainer.seed=0,1"]).study == "rank-seed"


def test_ranges_and_choices_of_hydras_grammar_are_sweeps() -> None:
    assert [run.trainer.seed for run in expand(["trainer.seed=range(0,3)"]).runs] == [0, 1, 2]
    assert [run.method.name for run in expand(["method=choice(full,lora)"]).runs] == ["full", "lora"]


GRIDS = [path for path in sorted((REPOSITORY / "sweeps").rglob("*.yaml")) if not path.stem.startswith("tune_")]

KEYS = {"size_ladder": 4, "baseline_budgets": 6}
"""The number of comparison keys of a sweep, if it is not 1."""


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("experiment", [[], ["experiments=laptop/small"]], ids=["default", "laptop/small"])
def test_every_sweep_composes_under_every_laptop_setting(path: Path, experiment: list[str]) -> None:
    few = ["optimizer.learning_rate=1e-2"] if path.stem == "learning_rate" else []
    sweep = expand([f"sweeps={path.stem}", *experiment, *few])
    assert sweep.study == path.stem
    assert len(sweep.runs) > 1
    assert len({run.config_hash for run in sweep.runs}) == len(sweep.runs)
    assert len({run.comparison_key for run in sweep.runs}) == KEYS.get(path.stem, 1)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("experiment", ["laptop/crossing", "paper/relora_60m", "paper/galore_1b"])
def test_every_sweep_composes_under_an_experiment_or_names_the_remedy(path: Path, experiment: str) -> None:
    few = ["optimizer.learning_rate=1e-2", "optimizer.embedding_learning_rate=null"]
    own = few if path.stem == "learning_rate" else []
    overrides = [f"sweeps={path.stem}", f"experiments={experiment}", *own]
    if experiment not in REFUSED.get(path.stem, {}):
        assert len(expand(overrides).runs) > 1
        return
    key, fitting, runs = REFUSED[path.stem][experiment]
    with pytest.raises(ConfigError, match=rf"sweeps={path.stem} do not fit, .*: {key}=\.\.\.$"):
        expand(overrides)
    assert len(expand([*overrides, f"{key}={fitting}"]).runs) == runs


REFUSED = {
    "rank_x_reset": {
        "paper/relora_60m": ("method.reset_interval_steps", "1000,null", 6),
        "paper/galore_1b": ("method.reset_interval_steps", "10000,null", 6),
    },
    "baseline_budgets": {
        "paper/relora_60m": ("trainer.total_steps", "4000,5000,6000,7000,8000,10000", 6),
        "paper/galore_1b": ("trainer.total_steps", "40000,50000,60000,70000,80000,100000", 6),
    },
    "size_ladder": {"paper/galore_1b": ("model", "llama_250m,llama_350m,llama_1b", 18)},
}
"""By sweep and experiment, if they do not fit: the key to give, choices that fit, and the number of runs."""


def test_choices_that_give_the_same_run_are_reported() -> None:
    sweep = expand(["sweeps=paper_ablation", "experiments=paper/galore_60m"])
    assert len(sweep.runs) == 5
    assert [remark for remark in sweep.remarks if "10 choices are 5 runs" in remark]
    assert expand(["sweeps=paper_ablation", "experiments=laptop/small"]).remarks == []


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configs that a test may change."""
    for name in ("conf", "experiments", "sweeps"):
        shutil.copytree(REPOSITORY / name, tmp_path / "home" / name)
    monkeypatch.setattr(choices, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def test_values_of_a_sweeps_file_apply_to_every_run_and_the_command_line_wins(conf: Path) -> None:
    file = conf / "sweeps" / "mine.yaml"
    file.write_text("# @package _global_\ntrainer:\n  total_steps: 333\n  seed: 5\ngrids:\n  - {method.rank: '2,4'}\n")
    budgets = (
        (conf / "experiments" / "laptop" / "small.yaml").read_text().replace("total_steps: 400", "total_tokens: 2M")
    )
    (conf / "experiments" / "mine.yaml").write_text(budgets)
    for experiment in ([], ["experiments=mine"]):
        runs = expand(["sweeps=mine", *experiment]).runs
        assert [(run.rank, run.total_steps, run.trainer.seed) for run in runs] == [(2, 333, 5), (4, 333, 5)]
    assert {run.total_steps for run in expand(["sweeps=mine", "trainer.total_steps=400"]).runs} == {400}
    assert {run.total_steps for run in expand(["sweeps=mine", "trainer.total_tokens=1.024M"]).runs} == {500}
    file.write_text(file.read_text() + "nonsense: 1\n")
    with pytest.raises(ConfigError, match="unknown key nonsense"):
        expand(["sweeps=mine"])


def test_an_experiment_without_a_preset_is_reported(conf: Path, tiny: list[str], capsys) -> None:
    (conf / "experiments" / "mine.yaml").write_text("# @package _global_\n")
    remarks = expand(["sweeps=methods", "experiments=mine"]).remarks
    assert len(remarks) == 5, "one for each method, and none for the rates, which are tuned for this setting"
    assert re.match("experiments=mine .*no preset for method=galore: ", remarks[-1])
    assert "write conf/presets/mine/galore.yaml or set them" in remarks[-1]
    (conf / "conf" / "presets" / "laptop" / "small" / "lora.yaml").unlink()
    no_preset, not_tuned = expand(["sweeps=methods", "experiments=laptop/small"]).remarks
    assert "write conf/presets/laptop/small/lora.yaml or set them" in no_preset
    assert "trainer.total_steps=400, tuned at 600" in not_tuned
    assert "lora" in not_tuned
    assert cli.run([*tiny, "experiments=mine"]) == 0
    assert re.search("note: experiments=mine .*no preset for method=relora: ", capsys.readouterr().out)


def test_the_ablation_of_the_paper_has_its_ten_meaningful_cells() -> None:
    cells = {
        (
            run.reset_interval_steps is not None,
            run.reset_interval_steps is not None and run.method.optimizer_reset.mode != "none",  # type: ignore[attr-defined]
            run.reset_interval_steps is not None and run.schedule.restart_warmup_steps > 0,
            run.method.warm_start_steps > 0,
        )
        for run in expand(["sweeps=paper_ablation", "experiments=laptop/small"]).runs
    }
    assert len(cells) == 10


def test_every_cell_of_the_ablation_of_the_paper_trains(tiny: list[str]) -> None:
    own = [item for item in tiny if not item.startswith(("method.", "schedule.", "trainer.total_steps"))]
    overrides = [*own, "sweeps=paper_ablation", "trainer.total_steps=220"]
    overrides += [f"trainer.{name}_interval_steps=500" for name in ("checkpoint", "validation")]
    sweep = expand([*overrides, "cluster=debug"])
    assert len(sweep.runs) == 10
    assert launch.launch_study(sweep, overrides)
    restarts = [RunDir(config.run_dir).status.summary["restarts"] for config in sweep.runs]  # type: ignore[union-attr]
    assert sorted(restarts) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_every_arm_of_the_size_ladder_has_the_same_rate_factors_at_every_size() -> None:
    runs = expand(["sweeps=size_ladder", "experiments=laptop/small"]).runs
    rates: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        rates.setdefault((run.model.name, run.method.name), []).append(run.optimizer.learning_rate)
    assert len(rates) == 4 * 2
    for (_, method), found in rates.items():
        tuned = compose([f"method={method}", "experiments=laptop/small"]).optimizer.learning_rate
        assert found == [tuned, tuned / 2, tuned / 4]
    warm_starts = {run.warm_start_learning_rate for run in runs if run.method.name == "relora"}
    assert warm_starts == {run.optimizer.learning_rate for run in runs if run.method.name == "full"}


def test_arms_that_share_no_grid_are_a_union() -> None:
    runs = expand(["sweeps=methods"]).runs
    assert [run.method.name for run in runs] == ["full", "lora", "relora", "control", "galore"]


def test_a_full_rank_run_with_a_warm_start_is_no_baseline() -> None:
    planned = planned_runs(expand(["method=full,lora", "method.warm_start_steps=80", "study=warm"]))
    assert [item.config.method.warm_start_steps for item in planned if item.role == "baseline"] == [0]


def test_each_setting_of_a_sweep_gets_the_baseline_of_its_own_preset() -> None:
    planned = planned_runs(
        expand(["experiments=laptop/small,laptop/crossing", "method=relora", "study=both", "baseline_rates=[1]"])
    )
    rates = [item.config.optimizer.embedding_learning_rate for item in planned if item.role == "baseline"]
    tuned = [compose(["method=full", f"experiments=laptop/{name}"]) for name in ("small", "crossing")]
    assert rates == [config.optimizer.embedding_learning_rate for config in tuned]


def test_an_interrupted_run_ends_a_study_in_this_process(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []

    def interrupted(path: Path) -> Status:
        started.append(path)
        return Status(state="interrupted")

    monkeypatch.setattr(local, "job", interrupted)
    overrides = [*tiny, "trainer.seed=0,1,2", "cluster=debug", "study=three"]
    assert not launch.launch_study(expand(overrides), overrides)
    assert len(started) == 1


def test_each_arm_starts_at_its_own_preset_and_the_command_line_wins() -> None:
    sweep = expand(["sweeps=methods", "experiments=laptop/small"])
    relora = next(run for run in sweep.runs if run.method.name == "relora")
    assert relora.reset_interval_steps == 80
    overridden = expand(["sweeps=methods", "experiments=laptop/small", "optimizer.learning_rate=1e-3"])
    assert {run.optimizer.learning_rate for run in overridden.runs} == {1e-3}


def test_a_key_on_the_command_line_replaces_the_files_grid() -> None:
    runs = expand(["sweeps=rank_x_reset", "method.rank=16"]).runs
    assert {run.rank for run in runs} == {16}
    assert len(runs) == 3


def test_a_key_of_some_methods_of_a_sweep_applies_to_these_methods() -> None:
    sweep = expand(["method=full,lora,relora", "method.rank=8,16", "method.reset_interval_steps=50", "study=x"])
    found = [(run.method.name, run.rank, run.reset_interval_steps) for run in sweep.runs]
    assert found == [("full", None, None), ("lora", 8, None), ("lora", 16, None), ("relora", 8, 50), ("relora", 16, 50)]
    (remark,) = [each for each in sweep.remarks if "reset_interval" in each]
    assert "method.reset_interval_steps=50 is not for method=full, method=lora" in remark
    of_a_file = expand(["sweeps=paper_table", "experiments=paper/galore_60m", "data=stdlib", "method.alpha=64"])
    assert {run.method.name: getattr(run.method, "alpha", None) for run in of_a_file.runs} == {
        "full": None,
        "lowrank": None,
        "lora": 64,
        "relora": 64,
        "galore": None,
    }


def test_equal_runs_are_launched_once() -> None:
    assert len(expand(["method.alpha=null,8", "study=x"]).runs) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.seed=1"], "nothing is swept"),
        (["sweeps=rank"], "sweeps=rank does not exist; .*sweeps= one of"),
        (["method.rank=8,600"], r"method\.rank=600: rank=600 exceeds"),
        (["method=full,control", "method.alpha=8"], r"unknown key method\.alpha"),
        (["method=full,relora", "method.rnak=8"], r"unknown key method\.rnak"),
        (["sweeps=methods,seeds"], "sweeps=methods,seeds: .*one question; launch one sweep"),
        (["sweeps=methods", "grids=3"], r"grids=3 must be a list .*sweeps/methods\.yaml"),
        (["sweeps=methods", "grids=[3]"], r"grids=\[3\] must be a list .*sweeps/methods\.yaml"),
        (["sweeps=methods", "+tune=3"], "tune=3 .*trials and ranges"),
        (["sweeps=tune_learning_rate", "tune.ranges=3"], "must hold trials and ranges"),
        (["study=${foo}", "trainer.seed=0,1"], "study: .*'foo' not found"),
        (["experiments=desktop", "trainer.seed=0,1"], "experiments=desktop does not exist"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(overrides: list[str], message: str, tmp_path: Path, capsys):
    assert cli.run(["-m", *overrides, f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- baselines


def test_every_comparison_key_and_seed_gets_its_full_rank_run() -> None:
    overrides = [
        "trainer.total_steps=600,700",
        "trainer.seed=0,1",
        "method=relora,lora",
        "study=x",
        "baseline_rates=[1]",
    ]
    planned = planned_runs(expand(overrides))
    baselines = [item.config for item in planned if item.role == "baseline"]
    assert len(planned) == 8 + 4
    assert {run.method.name for run in baselines} == {"full"}
    assert {(run.comparison_key, run.trainer.seed) for run in baselines} == {
        (item.config.comparison_key, item.config.trainer.seed) for item in planned if item.role == "arm"
    }


def test_a_full_rank_arm_is_its_own_baseline() -> None:
    planned = planned_runs(expand(["sweeps=methods"]))
    assert {item.role for item in planned} == {"arm"}


# ----------------------------------------------------------------------------------------------------- real studies


def test_a_study_runs_its_arms_and_baseline_and_the_same_launch_again_runs_nothing(
    tiny: list[str], empty_store: Path, capsys
) -> None:
    overrides = [*tiny, *SWEEP, "tracker=mlflow"]
    runs_dir = Path(compose(tiny).runs_dir)
    runs_dir.mkdir()
    shutil.copy(empty_store, runs_dir / "mlflow.db")
    assert cli.run(["-m", *overrides]) == 0
    shown = capsys.readouterr().out
    assert re.search("3 runs, 1 .*baselines .*; 0 finished already", shown)
    recorded = manifest(tiny, "ranks")
    assert sorted(entry["role"] for entry in recorded["runs"].values()) == ["arm", "arm", "baseline"]
    table = [line for line in shown.splitlines() if " finished  " in line]
    assert len(table) == 3
    assert all("%" in line and "MiB" in line for line in table)
    files = {run.path: run.metrics_file.read_bytes() for run in runs_of(overrides)}

    assert cli.run(["-m", *overrides]) == 0
    assert "3 finished already" in capsys.readouterr().out
    assert {run.path: run.metrics_file.read_bytes() for run in runs_of(overrides)} == files
    assert manifest(tiny, "ranks") == recorded

    from mlflow import MlflowClient

    client = MlflowClient(compose([*tiny, "tracker=mlflow"]).mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, "tags.`study.ranks` = '1'")
    assert {run.info.status for run in found} == {"FINISHED"}
    assert sorted(run.data.params["method.rank"] for run in found) == ["0", "2", "4"]

    other = [*tiny, "method=relora", "method.rank=4,5", "study=others", "tracker=mlflow", "cluster=debug"]
    other += ["trainer.activation_checkpointing=true"]
    assert cli.run(["-m", *other]) == 0
    shown = capsys.readouterr().out
    assert re.search("3 runs, 1 .*baselines .*; 2 finished already", shown)
    (note,) = re.findall("^note: .*finished runs with other switches.*$", shown, re.MULTILINE)
    assert "(trainer.activation_checkpointing False against True)" in note
    reused = {run.path.name for run in runs_of(other)} & {path.name for path in files}
    assert set(note.rpartition(": ")[2].split(", ")) == reused
    joined = client.search_runs(experiments, "tags.`study.ranks` = '1' and tags.`study.others` = '1'")
    assert sorted(run.data.params["method.rank"] for run in joined) == ["0", "4"]


def test_a_failed_run_is_shown_and_run_again_and_the_other_runs_finish(tiny: list[str], capsys) -> None:
    overrides = [*tiny, "method=relora", "optimizer.learning_rate=5e-3,1e30", "study=rates", "cluster=debug"]
    overrides += ["trainer.max_consecutive_skipped_updates=2"]
    assert cli.run(["-m", *overrides]) == 1
    shown = capsys.readouterr().out
    assert "1 runs are not finished" in shown
    states = [item.state for item in planned_runs(expand(overrides))]
    assert sorted(states) == ["failed", "finished", "finished"]
    assert cli.run(["-m", *overrides]) == 1
    assert "2 finished already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_a_study_stops_its_runs_with_a_checkpoint(tiny: list[str], number: signal.Signals) -> None:
    overrides = [*tiny, *SWEEP, "trainer.total_steps=2003", "method.reset_interval_steps=1000"]
    overrides += ["trainer.validation_interval_steps=5000", "trainer.checkpoint_interval_steps=5000"]
    process = subprocess.Popen(
        [sys.executable, "run.py", "-m", *overrides],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    first = runs_of(overrides)[0]
    while not any(row["step"] > 20 for row in read_rows(first.metrics_file)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "Traceback" not in shown
    assert re.search("3 runs are not finished; .*same command", shown)
    assert first.status is not None
    assert first.status.state == "interrupted"
    assert not first.is_locked
    assert len(list(first.checkpoints.glob("step-*.pt"))) == 1
