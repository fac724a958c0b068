"""Studies that are launched twice or cancelled, and clusters without arrays or accounting.

Most of these tests keep the jobs in the queue.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import (
    ONE_THREAD,
    ended,
    eventually,
    folder,
    occupy,
    queued_names,
    release,
    relora,
    run_py,
    status_rows,
    trains,
    wait_for_finish,
)
from small import REPOSITORY

from relora.runs.rundir import RunDir, read_json, write_json

pytestmark = pytest.mark.slow


@pytest.fixture
def occupied() -> Iterator[str]:
    """The job that keeps all others in the queue. All jobs are cancelled at the end of the test."""
    blocker = occupy()
    yield blocker
    subprocess.run(["scancel", "--user=root"], check=True)
    eventually(lambda: not queued_names(), "an empty queue")


def launched(*arguments: str) -> subprocess.Popen[str]:
    """Start `python run.py`."""
    command = [sys.executable, "run.py", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=ONE_THREAD, text=True, stdout=subprocess.PIPE)


def needs_of(run: RunDir) -> dict[str, str]:
    return read_json(run.submission_file)["needs"]


# -------------------------------------------------------------------------------------------------- launched twice


@pytest.mark.usefixtures("occupied")
def test_a_second_study_waits_for_the_text_and_the_warm_start_of_the_first(one: list[str], runs_dir: Path) -> None:
    run_py("-m", *one, "method.rank=2,3", "study=first")
    run_py("-m", *one, "method.rank=3,4", "study=second")
    names = queued_names()
    assert names.count("corpus") == 1
    assert [name.startswith("warm-start-") for name in names].count(True) == 1
    first, third = folder([*one, "method.rank=2"]), folder([*one, "method.rank=4"])
    assert sorted(needs_of(third).values()) == ["corpus", "warm start"]
    assert needs_of(third) == needs_of(first)
    assert [row["state"] for row in status_rows(runs_dir, "second")] == ["queued"] * 3

    # The runs that both studies share stay in the queue for the first study.
    relora("cancel", "second/r4", f"runs_dir={runs_dir}")
    states = {row["run"]: row["state"] for row in status_rows(runs_dir, "second")}
    assert states.pop(third.path.name) == "cancelled"
    assert set(states.values()) == {"queued"}
    # No run of a study that is cancelled in the queue counts as failed, although the jobs that it needs end too.
    assert "3 runs cancelled" in relora("cancel", "first", f"runs_dir={runs_dir}")
    assert {row["state"] for row in status_rows(runs_dir, "first")} == {"cancelled"}
    eventually(lambda: not {"corpus", "first", "first-report"} & set(queued_names()), "an empty queue")
    assert {row["state"] for row in status_rows(runs_dir, "first")} == {"cancelled"}


@pytest.mark.usefixtures("occupied")
def test_two_launchers_at_once_submit_every_run_once(one: list[str], runs_dir: Path) -> None:
    study = ["-m", *one, "method.rank=2,3", "method.warm_start_steps=0", "study=twice"]
    shown = sorted(process.communicate(timeout=600)[0] for process in [launched(*study), launched(*study)])
    assert "submitted 3 runs as array" in shown[0]
    assert "submitted nothing (3 queued)" in shown[1]
    assert queued_names().count("twice") == 3
    assert queued_names().count("corpus") == 1


# ------------------------------------------------------------------------------------- what a launch wants no more


@pytest.mark.usefixtures("occupied")
def test_prune_cancels_the_queued_runs_that_no_study_wants(one: list[str], runs_dir: Path) -> None:
    run_py("-m", *one, "method.rank=2,3,4", "study=first")
    run_py("-m", *one, "method.rank=3", "study=second")
    shown = run_py("-m", *one, "method.rank=2", "study=first", "--prune")
    third, fourth = (folder([*one, f"method.rank={rank}"]).path.name for rank in (3, 4))
    assert f"took 2 runs out of study first: {third}, {fourth}" in shown
    assert f"cancelled {fourth}" in shown
    states = {row["run"]: row["state"] for study in ("first", "second") for row in status_rows(runs_dir, study)}
    assert states.pop(third) == "queued", "the second study wants it"
    assert fourth not in states
    assert set(states.values()) == {"queued"}
    assert status_rows(runs_dir, fourth)[0]["state"] == "cancelled"


def test_a_job_that_fails_like_the_one_before_it_cancels_those_in_the_queue(
    one: list[str], runs_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "only.txt").write_text("a few words")  # too few for three splits
    own = [item for item in one if not item.startswith(("method", "data.path="))]
    study = [*own, f"data.path={tmp_path / 'little'}", "method=full", "trainer.seed=range(0,6)", "study=alike"]
    run_py("-m", *study, "cluster.max_parallel=1")
    rows = ended(runs_dir, "alike")
    states = [row["state"] for row in rows]
    assert states.count("failed") == 2
    assert states.count("cancelled") == 4
    messages = {row["message"] for row in rows if row["state"] == "cancelled"}
    (message,) = messages
    assert re.match("not started: the first 2 runs failed alike: .*", message)


# ----------------------------------------------------------------------------------- on this machine and on SLURM


def test_cancel_ends_a_study_that_is_on_this_machine_and_on_slurm(
    tiny: list[str], runs_dir: Path, occupied: str
) -> None:
    """The launcher of this machine starts no run that SLURM has, and no run that was cancelled."""
    settings = [text for text in tiny if not text.startswith("method.")]
    settings += ["trainer.total_steps=20000", "method=full", "trainer.seed=0,1,2", "study=halves"]
    launcher = launched("-m", *settings, "cluster=local")
    (first, *_) = seeds = [folder([*settings[:-2], f"trainer.seed={seed}"]) for seed in range(3)]
    eventually(lambda: trains(first), "a run on this machine")
    assert "submitted 2 runs as array" in run_py("-m", *settings, "cluster=slurm")
    states = [row["state"] for row in status_rows(runs_dir, "halves")]
    assert sorted(states) == ["queued", "queued", "running"]
    assert "3 runs cancelled" in relora("cancel", "halves", f"runs_dir={runs_dir}")
    shown, _ = launcher.communicate(timeout=600)
    assert launcher.returncode == 1
    assert "3 runs are not finished" in shown
    states = {row["run"]: row["state"] for row in ended(runs_dir, "halves")}
    assert [states[run.path.name] for run in seeds] == ["interrupted", "cancelled", "cancelled"]
    assert not any(run.is_locked for run in seeds)


def test_a_launcher_of_this_machine_does_not_start_a_run_that_slurm_has(
    tiny: list[str], runs_dir: Path, occupied: str
) -> None:
    settings = [text for text in tiny if not text.startswith("method.")]
    settings += ["trainer.total_steps=20000", "method=full", "trainer.seed=0,1", "study=halves"]
    launcher = launched("-m", *settings, "cluster=local")
    first, second = (folder([*settings[:-2], f"trainer.seed={seed}"]) for seed in range(2))
    eventually(lambda: trains(first), "a run on this machine")
    run_py("-m", *settings, "cluster=slurm")
    relora("cancel", first.path.name, f"runs_dir={runs_dir}")
    shown, _ = launcher.communicate(timeout=600)
    assert f"{second.path.name} is queued already, by another launch" in shown
    assert [row["state"] for row in status_rows(runs_dir, "halves")] == ["interrupted", "queued"]


# ------------------------------------------------------------------------------------------------ clusters that refuse


def shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, text: str) -> Path:
    """Put `text` before a command of SLURM; `$real` is the command itself."""
    folder, real = tmp_path / "bin", shutil.which(command)
    folder.mkdir(exist_ok=True)
    file = folder / command
    file.write_text(f"#!/bin/sh\nreal={real}\n{text}\n")
    file.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setitem(ONE_THREAD, "PATH", path)
    return file


REFUSES = 'echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1'
IS_ARRAY = 'eval "script=\\${$#}"; grep -q -e "--array" "$script"'
IS_JUDGED = 'case "$*" in *--test-only*) exec $real "$@" ;; esac'


def test_a_refused_array_leaves_nothing_in_the_queue(
    one: list[str], occupied: str, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = [*one, "method.rank=2,3", "study=refused", "baseline_rates=[1]"]
    refusing = shim(monkeypatch, tmp_path, "sbatch", f'{IS_JUDGED}\nif {IS_ARRAY}; then {REFUSES}; fi\nexec $real "$@"')
    shown = run_py("-m", *study, code=1)
    assert "SLURM refused the jobs" in shown
    assert "accounting/QOS policy" in shown
    assert "Traceback" not in shown
    # The baseline is a single job. SLURM accepted it, and it waits for the corpus.
    eventually(lambda: not any(name.startswith("warm-start") for name in queued_names()), "the warm start has left")
    assert sorted(queued_names()) == ["corpus", "refused", "wrap"]
    refusing.unlink()
    assert "submitted 2 runs" in run_py("-m", *study)
    assert queued_names().count("refused") == 3
    relora("cancel", "refused", f"runs_dir={runs_dir}")
    eventually(lambda: queued_names() == ["wrap"], "the corpus and the warm start have left the queue")


def test_cancel_ends_the_jobs_that_the_runs_need_if_a_later_array_was_refused(
    one: list[str], occupied: str, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = [*one, "method.rank=2,3", "trainer.seed=0,1", "study=refused", "baseline_rates=[1]"]
    taken = tmp_path / "taken"
    second = f"if {IS_ARRAY}; then if [ -e {taken} ]; then {REFUSES}; fi; touch {taken}; fi"
    shim(monkeypatch, tmp_path, "sbatch", f'{IS_JUDGED}\n{second}\nexec $real "$@"')
    run_py("-m", *study, code=1)
    assert {"corpus", "refused"} < set(queued_names())
    relora("cancel", "refused", f"runs_dir={runs_dir}")
    eventually(lambda: queued_names() == ["wrap"], "a queue with only the blocker")


def test_a_cluster_without_arrays_takes_each_run_as_a_job(
    one: list[str], runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim(monkeypatch, tmp_path, "scontrol", '$real "$@" | sed "s/^MaxArraySize .*/MaxArraySize            = 0/"')
    shim(monkeypatch, tmp_path, "sbatch", f'{IS_JUDGED}\nif {IS_ARRAY}; then {REFUSES}; fi\nexec $real "$@"')
    run_py("-m", *one, "method.rank=2,3", "study=single", "cluster.max_parallel=3", "baseline_rates=[1]")
    wait_for_finish(runs_dir, "single")


def test_no_wckey_is_sent_if_the_user_sets_none(one: list[str], occupied: str, runs_dir: Path) -> None:
    run_py(*one)
    scripts = list(folder(one).path.glob("jobs/*submission*.sh"))
    assert scripts
    assert not any("--wckey" in script.read_text() for script in scripts)


# -------------------------------------------------------------------------------------------------- no accounting


def test_without_accounting_states_are_correct_and_no_run_waits_forever(
    one: list[str], runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster without slurmdbd, only squeue knows a job, and only until some minutes after its end."""
    shims = tmp_path / "bin"
    shims.mkdir()
    (shims / "sacct").write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1\n")
    (shims / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    monkeypatch.setitem(ONE_THREAD, "PATH", os.environ["PATH"])
    run = folder(one)
    blocker = occupy()
    run_py(*one)
    assert status_rows(runs_dir, run.path.name)[0]["state"] == "queued"
    relora("cancel", run.path.name, f"runs_dir={runs_dir}")
    assert status_rows(runs_dir, run.path.name)[0]["state"] == "cancelled"
    release(blocker)
    # This job died without a message, and SLURM does not know it any more.
    write_json(run.submission_file, {**read_json(run.submission_file), "job": "999999", "submitted_ms": 0})
    write_json(run.submission_file, {**read_json(run.submission_file), "cancelled": False})
    (row,) = status_rows(runs_dir, run.path.name)
    assert row["state"] == "failed"
    assert re.fullmatch("SLURM no longer knows .*job 999999, .*unknown", row["message"])
    (run.path / "checkpoints").write_text("a file where a folder should be")
    run_py(*one)
    (row,) = ended(runs_dir, run.path.name)
    assert row["state"] == "failed"
    assert f"could not be written to {run.checkpoints}" in row["message"]
    (run.path / "checkpoints").unlink()
    run_py(*one)
    wait_for_finish(runs_dir, run.path.name)
