"""The messages of the verbs for wrong names and settings. tests/slurm tests what the verbs do to runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import REPOSITORY, TINY, eventually

from relora.cli import main as cli
from relora.config.compose import compose
from relora.runs.checkpoint import latest_step
from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir, Status
from relora.runs.state import observe
from relora.studies.study import planned_runs, prepare, write_manifest
from relora.studies.sweeps import expand


@pytest.fixture(scope="module")
def runs_dir(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study `ranks`. None of its runs was started. Tests do not change it."""
    folder = tmp_path_factory.mktemp("control") / "runs"
    overrides = [*TINY, "data=text", f"data.path={text}", f"runs_dir={folder}", "tracker=jsonl"]
    overrides += ["method.rank=2,3", "study=ranks"]
    sweep = expand(overrides)
    planned = planned_runs(sweep)
    prepare(planned, ["-m", *overrides])
    write_manifest(folder, sweep, planned, overrides)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "rank"], "no study or run rank in {runs_dir}; .* ranks, llama_tiny-full-"),
        (["cancel", "nothing"], "no study or run nothing in {runs_dir}; .* ranks, "),
        (["status", "ranks", "runs_dir=nowhere"], r"nowhere; .*give runs_dir=\.\.\."),
        (["logs", "ranks"], "ranks is a study; give .*: ranks/llama_tiny-full-"),
        (["logs", "ranks/r9"], "study ranks has no run r9; .* llama_tiny-full-"),
        (["logs", "ranks/relora"], "ranks/relora may be llama_tiny-relora-r2-"),
        (["logs", "ranks/r2"], "llama_tiny-relora-r2-.* has no log: .*missing"),
        (["report", "../../x"], r"study=\.\./\.\./x .*only letters, digits"),
        (["status", "../x"], r"study=\.\. .*only letters, digits"),
        (["status", ""], "'' is not a valid name; .*STUDY, RUN or STUDY/RUN"),
        (["logs", "a*"], r"'a\*' is not a valid name"),
        (["cancel", "a\nb"], r"'a\\nb' is not a valid name"),
        (["retry", "../../ranks"], r"study=\.\./\.\. .*only letters, digits"),
        (["clean", "../x"], r"study \.\./x does not exist in {runs_dir}"),
        (["logs", "rinks/r2"], r"study rinks does not exist in {runs_dir}; .*studies there: ranks\."),
        (["retry", "rinks"], "no study or run rinks in {runs_dir}"),
        (["retry", "r2"], r"r2 is a single run, .*retry needs a study; .*: python run\.py -m "),
        (["retry", "ranks", "method.rank=5"], r"method\.rank=5 would .*; retry accepts only cluster"),
        (["retry", "ranks", "cluster.mem_gb=1"], r"unknown key cluster\.mem_gb"),
        (["retry", "ranks", "cluster=slurm", "cluster.mem_gb=much"], r"cluster\.mem_gb: Value 'much'"),
        (["retry", "ranks", "cluster=nowhere"], "cluster=nowhere does not exist; .*cluster= one of debug, local"),
        (["retry", "ranks", "cluster.max_parallel=0"], r"cluster\.max_parallel=0 must be at least 1"),
    ],
)
def test_a_wrong_name_or_setting_is_reported_in_one_line(
    words: list[str], message: str, runs_dir: Path, capsys
) -> None:
    where = [] if any(word.startswith("runs_dir=") for word in words) else [f"runs_dir={runs_dir}"]
    assert cli.main([*words, *where]) == 2
    shown = capsys.readouterr().err
    assert re.search(message.format(runs_dir=re.escape(str(runs_dir))), shown)
    assert shown.count("\n") == 1


# ------------------------------------------------------------------------------------------ runs of this machine


@pytest.mark.slow
def test_cancel_stops_a_run_of_this_machine_with_a_checkpoint(tiny: list[str], capsys) -> None:
    """Without SLURM, `relora cancel` sends SIGTERM to the process of the run."""
    overrides = [*tiny, "trainer.total_steps=3002", "trainer.validation_interval_steps=3002"]
    config = compose(overrides)
    run, where = RunDir(config.run_dir), f"runs_dir={config.runs_dir}"
    command = [sys.executable, "run.py", *overrides]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        eventually(lambda: read_rows(run.metrics_file)[20:], "20 rows of metrics", seconds=120)
        assert cli.main(["cancel", config.name[-8:], where]) == 0
        assert capsys.readouterr().out == f"{config.name}: cancelled\n1 runs cancelled\n"
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    status, step = run.status, latest_step(run.checkpoints)
    assert status is not None
    assert status.state == "interrupted"
    assert "SIGTERM" in status.message
    assert step is not None
    assert 20 <= step < 3002
    assert "Traceback" not in output
    (state,) = observe([run])
    assert (state.name, state.needs_launch) == ("interrupted", True)

    assert cli.main(["cancel", config.name[-8:], where]) == 0
    assert capsys.readouterr().out == "0 runs cancelled\n", "the run has ended already"
    last_logged_step = max(row["step"] for row in read_rows(run.metrics_file))
    assert last_logged_step == step, "the checkpoint is of the last logged step"


def test_a_run_of_another_machine_is_not_cancelled_from_this_machine(runs_dir: Path, capsys) -> None:
    folder = next(path for path in sorted(runs_dir.glob("*relora-r2*")))
    run = RunDir(folder)
    run.status = Status(state="running", host="elsewhere", pid=1)
    with run.locked():
        assert cli.main(["cancel", "ranks", f"runs_dir={runs_dir}"]) == 1
    shown = capsys.readouterr().err
    assert all(word in shown for word in (folder.name, "elsewhere", "cancel it there"))
    run.status_file.unlink()
