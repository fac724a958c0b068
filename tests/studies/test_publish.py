"""The results of a study in MLflow, read with the MLflow client."""

import shutil
from pathlib import Path

import pytest
from lab import FULL, RELORA, Lab
from mlflow import MlflowClient
from mlflow.entities import Run

from relora.config.frozen import read_frozen
from relora.config.rates import NOT_TUNED
from relora.config.run import RunConfig
from relora.studies.publish import publish_report

pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path: Path, empty_store: Path) -> Lab:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return Lab(tmp_path / "runs", tracker="mlflow")


def recorded(config: RunConfig) -> Run:
    """Return the only MLflow run of the config."""
    client = MlflowClient(config.mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.config_hash = '{config.config_hash}'")
    return found


def test_a_run_has_one_gap_for_each_of_its_studies_even_with_different_baselines(lab: Lab) -> None:
    """One rate is best at seed 0. The other rate is best in the mean over both seeds."""
    rate = "optimizer.learning_rate=3e-3"
    steady, _ = (lab.run(*FULL, f"trainer.seed={seed}", loss=loss) for seed, loss in ((0, 3.0), (1, 2.0)))
    at_seed_0, _ = (lab.run(*FULL, rate, f"trainer.seed={seed}", loss=loss) for seed, loss in ((0, 2.8), (1, 2.9)))
    relora, second = lab.run(*RELORA, loss=3.2), lab.run(*RELORA, "trainer.seed=1", loss=3.2)
    lab.study(steady, relora, name="one_seed")
    lab.study(steady, relora, second, name="two_seeds")
    for order in (("one_seed", "two_seeds"), ("two_seeds", "one_seed")):
        for study in order:
            publish_report(lab.runs_dir, study)
        found = recorded(relora).data
        gaps = {name: value for name, value in found.metrics.items() if "gap" in name}
        assert gaps == {
            "summary/gap_to_full_percent.one_seed": pytest.approx(49.18, abs=0.01),
            "summary/gap_to_full_percent.two_seeds": pytest.approx(22.14, abs=0.01),
        }
        assert (found.tags["baseline.one_seed"], found.tags["baseline.two_seeds"]) == (at_seed_0.name, steady.name)
    assert recorded(steady).data.metrics["summary/gap_to_full_percent.two_seeds"] == 0


def test_the_note_of_a_study_says_that_rates_were_not_tuned(lab: Lab) -> None:
    lab.noted = True
    lab.study(lab.run(*FULL, loss=3.0), lab.run(*RELORA, loss=3.2))
    publish_report(lab.runs_dir, "mine")
    client = MlflowClient(lab.config(*FULL).mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    notes = [run.data.tags.get("mlflow.note.content", "") for run in client.search_runs(experiments)]
    (note,) = [note for note in notes if NOT_TUNED in note]
    assert f"{NOT_TUNED}: full rank (full), relora" in note


def test_a_run_deleted_in_mlflow_does_not_stop_the_others(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    full, relora, other = lab.run(*FULL, loss=3.0), lab.run(*RELORA, loss=3.2), lab.run(*RELORA, "method.rank=4")
    lab.study(full, relora, other)
    publish_report(lab.runs_dir, "mine")
    client = MlflowClient(full.mlflow_uri)
    deleted = recorded(other).info.run_id
    client.delete_run(deleted)
    lab.study(lab.run(*FULL, "optimizer.learning_rate=3e-3", loss=2.8))
    publish_report(lab.runs_dir, "mine")
    assert other.name in capsys.readouterr().err
    assert recorded(relora).data.metrics["summary/gap_to_full_percent.mine"] == pytest.approx(49.18, abs=0.01)
    assert client.get_run(deleted).info.lifecycle_stage == "deleted", "a report restores nothing"


def test_a_moved_folder_is_reported_in_the_store_that_moved_with_it(lab: Lab, tmp_path: Path, capsys) -> None:
    relora = lab.run(*RELORA, loss=3.2)
    lab.study(lab.run(*FULL, loss=3.0), relora)
    publish_report(lab.runs_dir, "mine")
    before = recorded(relora)
    moved = lab.runs_dir.rename(tmp_path / "moved")
    publish_report(moved, "mine")
    output = capsys.readouterr().out
    assert f"{moved} was moved or copied" in output
    assert f"keeps artifacts in {tmp_path / 'runs' / 'mlartifacts'}" in output
    assert "move it back" in output
    assert not lab.runs_dir.exists()
    found = recorded(read_frozen(moved / relora.name / "config.yaml"))
    assert found.info.run_id == before.info.run_id
    assert found.data.metrics == before.data.metrics


def test_the_gap_of_a_study_changes_with_its_baseline(lab: Lab) -> None:
    relora = lab.run(*RELORA, loss=3.2)
    lab.study(lab.run(*FULL, loss=3.0), relora)
    publish_report(lab.runs_dir, "mine")
    lab.study(lab.run(*FULL, "optimizer.learning_rate=3e-3", loss=2.8))
    for _ in range(2):
        publish_report(lab.runs_dir, "mine")
        assert recorded(relora).data.metrics["summary/gap_to_full_percent.mine"] == pytest.approx(49.18, abs=0.01)
