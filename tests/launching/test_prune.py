"""A study is what its last launch wants, and it stops if its runs fail."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import REPOSITORY, TINY, eventually

from relora.cli import main as cli
from relora.config.compose import compose
from relora.config.frozen import thaw
from relora.runs.checkpoint import latest_step
from relora.runs.rundir import RunDir, read_json
from relora.studies.compare import load_study
from relora.studies.failures import Ended, reason_to_stop
from relora.studies.manifest import manifest_of
from relora.tracking.store import open_store

# ---------------------------------------------------------------------------------------------------- which failures


def run(name: str, state: str = "failed", message: str = "boom") -> Ended:
    return Ended(name=name, state=state, message=message)


def test_two_runs_that_fail_alike_first_are_a_reason_to_stop() -> None:
    alike = [run("a-1", message="a-1/x is missing"), run("a-2", message="a-2/x is missing")]
    assert reason_to_stop(alike, None) == "the first 2 runs failed alike: a-2/x is missing"
    assert reason_to_stop(alike[:1], None) is None
    assert reason_to_stop([*alike, run("a-3", "finished", "")], None) is None, "one has finished"
    assert reason_to_stop([run("a"), run("b", message="another")], None) is None


@given(failed=st.integers(0, 6), finished=st.integers(0, 6), most=st.integers(1, 6))
def test_a_given_number_of_failures_is_the_limit_whatever_they_are(failed: int, finished: int, most: int) -> None:
    over = [run(str(number), message=str(number)) for number in range(failed)]
    over += [run(f"f{number}", "finished", "") for number in range(finished)]
    found = reason_to_stop(over, most)
    assert (found is not None) == (failed >= most)
    assert found is None or f"(max_failures={most}), the last one with: {failed - 1}" in found


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "many", "True"])
def test_a_wrong_number_of_failures_is_refused(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-m", "method.rank=2,4", f"max_failures={wrong}", f"runs_dir={tmp_path}"]) == 2
    assert re.match(rf"relora: max_failures={wrong} must be a whole number", capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------------- local launches


def of(overrides: list[str]) -> RunDir:
    return RunDir(compose(overrides).run_dir)


@pytest.fixture
def small(tiny: list[str]) -> list[str]:
    return [*tiny, "method.warm_start_steps=0", "study=ranks", "cluster=debug"]


def without_method(overrides: list[str]) -> list[str]:
    return [item for item in overrides if not item.startswith("method.")]


@pytest.mark.slow
def test_runs_that_fail_alike_stop_a_launch(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The text is gone when the first run starts, as it may be on a node."""
    path = next(item for item in small if item.startswith("data.path=")).partition("=")[2]
    gone = Path(path).parent / "gone"
    gone.mkdir()
    (gone / "only.txt").write_text("a few words")  # too few for three splits
    study = [*without_method(small), f"data.path={gone}", "trainer.seed=range(0,5)", "method=full"]
    assert cli.run(["-m", *study]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"the first 2 runs failed alike: .*; 3 runs are not started", shown)
    assert cli.run(["-m", *study, "max_failures=3"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"3 runs failed \(max_failures=3\), the last one with: .*; 2 runs are not started", shown)
    local = [item for item in study if item != "cluster=debug"]
    done = subprocess.run(
        [sys.executable, "run.py", "-m", *local, "cluster.max_parallel=2"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"the first \d runs failed alike: .*; [123] runs are not started", done.stdout)


@pytest.mark.slow
def test_an_arm_that_is_removed_is_told_and_pruned(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    mirrored = [item for item in small if item != "tracker=jsonl"]
    both, one = [*mirrored, "method.rank=2,4"], [*mirrored, "method.rank=4,6"]
    runs_dir = Path(compose(mirrored).runs_dir)
    assert cli.run(["-m", *both]) == 0
    shared = [*mirrored, "method.rank=2,4", "trainer.seed=0", "study=other"]
    removed = of([*mirrored, "method.rank=2"])
    capsys.readouterr()

    assert cli.run(["-m", *one]) == 0
    told = f"note: study ranks also has 1 runs of earlier launches that this one does not want: {removed.path.name}"
    assert told in capsys.readouterr().out
    assert removed.path.name in manifest_of(runs_dir, "ranks")["runs"]

    assert cli.run(["-m", *shared]) == 0
    assert cli.run(["-m", *one, "--prune"]) == 0
    shown = capsys.readouterr().out
    assert f"took 1 runs out of study ranks: {removed.path.name}" in shown
    assert removed.path.name not in manifest_of(runs_dir, "ranks")["runs"]
    assert removed.path.name in manifest_of(runs_dir, "other")["runs"]
    assert {member.run.name for member in load_study(runs_dir, "ranks").members} == {
        of([*mirrored, f"method.rank={rank}"]).path.name for rank in (4, 6)
    } | {name for name, entry in manifest_of(runs_dir, "ranks")["runs"].items() if entry["role"] == "baseline"}
    assert (removed.model / "model.safetensors").exists()
    assert thaw(removed.config_file).study is None
    client = open_store(compose(mirrored).mlflow_uri, runs_dir)
    tags = client.get_run(read_json(removed.mirror_file)["run_id"]).data.tags
    assert (tags["study.ranks"], tags["study.other"]) == ("0", "1")
    assert cli.run(["-m", *one, "--prune"]) == 0
    assert "took" not in capsys.readouterr().out


@pytest.mark.slow
def test_prune_stops_what_another_launcher_trains_and_keeps_it_from_starting_the_rest(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first launcher trains a long run and has another long one waiting. The second launch wants neither."""
    small = without_method(small)
    local = [item for item in small if item != "cluster=debug"]
    long = [*local, "method=full", "trainer.total_steps=200000", "trainer.checkpoint_interval_steps=20"]
    first = [sys.executable, "run.py", "-m", *long, "trainer.seed=0,1"]
    with subprocess.Popen(first, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as launcher:
        running, waiting = (of([*long, f"trainer.seed={seed}"]) for seed in (0, 1))
        eventually(lambda: latest_step(running.checkpoints), "a checkpoint of the first run")
        assert cli.run(["-m", *small, "method=full", "trainer.seed=5", "--prune"]) == 0
        assert f"cancelled {running.path.name}" in capsys.readouterr().out
        shown, _ = launcher.communicate(timeout=300)
    assert f"{waiting.path.name} was taken out of study ranks by another launch" in shown
    assert running.known_status is not None
    assert running.known_status.state == "interrupted"
    assert waiting.known_status is None


@pytest.mark.parametrize("arguments", [["--prune"], ["--prune", "--cfg", "job"], ["--prune", "-m", "hydra/launcher=x"]])
def test_prune_needs_a_study(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*arguments, *TINY, f"runs_dir={tmp_path}"]) == 2
    assert "--prune takes runs out of a study, so it needs -m" in capsys.readouterr().err
