"""What --dry-run and `relora plan -m` say, against a real study."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from damaged import Case
from small import TINY

from relora.cli import main as cli
from relora.config.compose import compose
from relora.config.plan import run_plan
from relora.launching import preview
from relora.launching.device import planned_device
from relora.launching.launch import launch_study
from relora.runs.rundir import read_json, write_json
from relora.runs.throughput import Throughput
from relora.studies.study import planned_runs
from relora.studies.sweeps import expand
from relora.training.measure import measure

pytestmark = pytest.mark.slow


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def study(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a study of two ranks and two seeds, of which one run is finished."""
    changes = ["data=text", f"data.path={text}", "tracker=jsonl", f"runs_dir={tmp_path_factory.mktemp('study')}"]
    shared = [*TINY, *changes, "study=ranks", "cluster=debug"]
    single = [*shared, "method.rank=4", "trainer.seed=0"]
    assert Case(overrides=single).launch().state == "finished"
    return [*shared, "method.rank=2,4", "trainer.seed=0,1"]


def dry_run(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_lists_the_runs_that_the_launch_would_train_and_writes_nothing(
    study: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs_dir = Path(compose(study[:-2]).runs_dir)
    before = tree(runs_dir)
    text = dry_run(["-m", *study], capsys)
    assert tree(runs_dir) == before
    assert "study ranks: 6 runs, 2 of them baselines that are added; 5 to train" in text
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    named = {row[-1]: row for row in rows if row[0] in ("arm", "baseline")}
    assert set(named) == {"full", "relora rank=2", "relora rank=4"}
    assert named["full"][:3] == ["baseline", "0,1", "new"]
    assert named["relora rank=4"][:3] == ["arm", "0,1", "1 finished, 1 new"]
    assert "warm starts  1 to train, and 2 runs fork one" in text
    listed = json.loads(dry_run(["-m", *study, "--json"], capsys))
    planned = {item.config.name for item in planned_runs(expand(study))}
    assert {run["name"] for run in listed["runs"]} == planned
    assert launch_study(expand(study), study)
    trained = {path.parent.name for path in runs_dir.glob("*/status.json")}
    assert trained == planned


def test_the_flops_to_compute_are_those_that_the_launch_computes(text: Path, tmp_path: Path) -> None:
    """A warm start that several runs share is computed once. The records of the runs say what they computed."""
    changes = ["data=text", f"data.path={text}", "tracker=jsonl", f"runs_dir={tmp_path}", "cluster=debug"]
    study = [*TINY, *changes, "study=ranks", "method.rank=2,4"]
    planned = planned_runs(expand(study))
    before = preview.previewed(planned, planned_device(planned[0].config))
    assert launch_study(expand(study), study)
    flops = {each.item.config.name: each.item.run.known_status.summary["flops"] for each in before}  # type: ignore[union-attr]
    warm = 3 * before[0].plan.flops_per_update_at_full_rank
    assert sum(each.flops for each in before) == sum(flops.values()) - warm
    after = preview.previewed(planned, planned_device(planned[0].config))
    assert [each.flops for each in after] == [0, 0, 0]
    assert not any(each.is_pending for each in after)


def test_the_time_of_a_run_is_that_of_the_same_run_before(finished: Case) -> None:
    config, summary = compose(finished.overrides), finished.run.known_status.summary  # type: ignore[union-attr]
    again = compose([*finished.overrides, "trainer.seed=5"])
    found = Throughput(Path(config.runs_dir)).estimate(again, run_plan(again), on_gpu=False)
    assert found is not None
    assert found.training_seconds == pytest.approx(summary["training_seconds"])
    assert found.seconds == pytest.approx(summary["wall_clock_seconds"])
    assert found.basis == f"{config.name} on cpu"
    twice = compose([*finished.overrides, "trainer.total_steps=29"])
    longer = Throughput(Path(config.runs_dir)).estimate(twice, run_plan(twice), on_gpu=False)
    assert longer is not None
    assert longer.training_seconds == pytest.approx(29 / 14 * found.training_seconds, rel=0.1)
    assert longer.seconds - longer.training_seconds == pytest.approx(found.seconds - found.training_seconds)


def test_the_speed_of_another_kind_of_run_is_called_rough_and_of_another_device_is_not_used(finished: Case) -> None:
    config = compose([*finished.overrides, "model.layers=1"])
    speeds = Throughput(Path(config.runs_dir))
    found = speeds.estimate(config, run_plan(config), on_gpu=False)
    assert found is not None
    assert found.basis.endswith("which is another kind of run: a rough estimate")
    assert found.seconds == found.training_seconds
    assert speeds.estimate(config, run_plan(config), on_gpu=True) is None
    rounded = compose([*finished.overrides, "trainer.precision=bf16"])
    assert speeds.estimate(rounded, run_plan(rounded), on_gpu=False) is None


def test_given_flops_per_second_are_used(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([*finished.overrides, "trainer.seed=5"])
    given = run_plan(config).total_flops / 7200
    text = dry_run([*finished.overrides, "trainer.seed=5", f"plan.flops_per_second={given!r}"], capsys)
    assert re.search(r"^time +2\.0 h, 2\.0 h of it in updates, .* the speed of plan\.flops_per_second$", text, re.M)


def test_a_walltime_that_is_shorter_than_a_checkpoint_interval_gives_a_warning(finished: Case) -> None:
    slurm = ["cluster=slurm", "cluster.timeout_minutes=10", "cluster.mem_gb=8"]
    speed = run_plan(compose(finished.overrides)).total_flops / 14 / 600  # a step takes ten minutes
    base = [*finished.overrides, "trainer.seed=5", *slurm, f"plan.flops_per_second={speed!r}"]
    rare, often = (
        preview.run_values(compose([*base, f"trainer.checkpoint_interval_steps={steps}"]))["warnings"]
        for steps in (14, 1)
    )
    assert len(rare) == 1
    assert re.match(r"trainer\.checkpoint_interval_steps=14 takes 2\.\d h, longer than cluster\.timeout_m", rare[0])
    assert often == []


def test_a_run_with_a_damaged_record_tells_no_speed(finished: Case) -> None:
    config = compose([*finished.overrides, "trainer.seed=5"])
    values = read_json(finished.run.status_file)
    write_json(finished.run.status_file, {**values, "summary": {}})
    assert Throughput(Path(config.runs_dir)).estimate(config, run_plan(config), on_gpu=False) is None
    text = preview.run_text(config)
    assert "plan.flops_per_second=... gives it" in text


def test_the_plan_of_a_search_says_how_many_runs_it_has(text: Path, tmp_path: Path) -> None:
    changes = ["data=text", f"data.path={text}", "tracker=jsonl", f"runs_dir={tmp_path}"]
    own = [item for item in TINY if not item.startswith("optimizer.embedding")]
    found = preview.launch_text([*own, *changes, "sweeps=tune_learning_rate", "trainer.seed=0,1", "tune.trials=5"])
    assert found.startswith("search tune_learning_rate: at most 10 runs, 5 trials of 2 seeds each")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_of_a_dry_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-m", "method.rank=4,600", f"runs_dir={tmp_path}", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "rank=600 exceeds" in captured.err


def test_steps_are_measured_here_once_for_each_kind_of_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["data=text", f"data.path={text}", "tracker=jsonl", f"runs_dir={tmp_path}", "study=ranks"]
    found = preview.launch_values([*TINY, *changes, "method.rank=2,4", "trainer.seed=0,1"], measure=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("measuring some steps of") == 3, "full rank, rank 2 and rank 4"
    times = [run["time"] for run in found["runs"]]
    assert all(0 < time["training_seconds"] < 60 and "on cpu here" in time["basis"] for time in times)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more", [["data.packing=pad"], ["data.attend_across_documents=false"], ["cluster=slurm", "cluster.nodes=2"]]
)
def test_every_kind_of_sequence_and_a_share_of_a_batch_can_be_measured(more: list[str], tmp_path: Path) -> None:
    config = compose([*TINY, f"runs_dir={tmp_path}", "trainer.total_steps=14", *more])
    found = measure(config)
    assert found.device == "cpu"
    assert found.sequences_at_a_time == (2 if "cluster=slurm" in more else 4)
    assert found.training_seconds(config) == pytest.approx(3 * found.warm_start_step_seconds + 11 * found.step_seconds)
