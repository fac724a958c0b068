"""Undisturbed and disturbed runs on a real SLURM.

The model of a disturbed run equals, to the bit, the model of an undisturbed run of the same config.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import (
    CLUSTER,
    ONE_THREAD,
    SLOW,
    SLOW_STEPS,
    accounted,
    ended,
    eventually,
    folder,
    job_of,
    occupy,
    release,
    relora,
    run_py,
    states_of,
    status_rows,
    steps_logged,
    trains,
    undisturbed,
    wait_for_finish,
    weights,
)
from small import REPOSITORY

from relora.cli import main as cli
from relora.config.compose import compose
from relora.data.corpus import prepare
from relora.runs.rundir import RunDir, read_json
from relora.tracking.store import open_store

pytestmark = pytest.mark.slow


@pytest.fixture
def slow(one: list[str]) -> list[str]:
    """A run that is long enough to disturb."""
    return [*one, *SLOW]


# -------------------------------------------------------------------------------------------------- undisturbed


def test_a_single_run_is_submitted_and_reported(one: list[str], runs_dir: Path, tmp_path: Path) -> None:
    run = folder(one)
    blocker = occupy()  # without it, the run can finish before the second launch
    assert f"submitted {run.path.name} as job" in run_py(*one)
    assert "is queued already" in run_py(*one)
    release(blocker)
    wait_for_finish(runs_dir, run.path.name)
    assert states_of(job_of(run)) == ["COMPLETED"]
    assert "perplexity" in relora("logs", run.path.name, f"runs_dir={runs_dir}")
    assert weights(run) == undisturbed(one, tmp_path)


def test_a_study_is_arrays_that_wait_for_the_corpus_and_the_warm_start(
    one: list[str], runs_dir: Path, tmp_path: Path
) -> None:
    study = [*one, "method.rank=2,3,4", "study=ranks", "cluster.max_parallel=2"]
    blocker = occupy()  # without it, the corpus can be ready before squeue is asked
    shown = run_py("-m", *study)
    assert "submitted 4 runs as arrays" in shown
    assert "relora status ranks" in shown
    names = subprocess.run(["squeue", "-h", "-o", "%j"], capture_output=True, text=True, check=True).stdout.split()
    assert {"corpus", "ranks", "ranks-report"} <= set(names)
    assert any(name.startswith("warm-start-") for name in names)
    again = run_py("-m", *study)
    assert "submitted nothing" in again
    release(blocker)
    rows = json.loads(relora("status", "ranks", "--json", f"runs_dir={runs_dir}"))
    wait_for_finish(runs_dir, "ranks")
    arms = [row["run"] for row in rows if row["role"] == "arm"]
    logs = [relora("logs", f"ranks/{name}", f"runs_dir={runs_dir}") for name in arms]
    assert all("waiting for the warm start" not in log for log in logs), "no node waits on a lock"
    report = runs_dir / "studies" / "ranks" / "report" / "report.md"
    eventually(lambda: report.exists(), "the report job")
    assert "Full rank" in report.read_text()
    assert run_py("-m", *study).count("finished") >= 4, "a launch of a finished study says that it is finished"
    for rank in (2, 4):
        overrides = [*one, f"method.rank={rank}"]
        assert weights(folder(overrides)) == undisturbed(overrides, tmp_path)


def test_a_user_can_wait_for_a_study_and_watch_its_status(one: list[str], runs_dir: Path) -> None:
    shown = run_py("-m", *one, "method.rank=2,3", "method.warm_start_steps=0", "study=wait", "cluster.wait=true")
    assert "submitted 3 runs" in shown
    assert shown.count("finished  14/14") == 3
    assert f"report: {runs_dir / 'studies' / 'wait' / 'report' / 'report.html'}" in shown
    watched = relora("status", "wait", "--watch", f"runs_dir={runs_dir}")
    assert watched.count("finished  14/14") == 3


def test_relora_status_asks_slurm_once(one: list[str], runs_dir: Path, counted: Path) -> None:
    """All users of a cluster share its controller."""
    blocker = occupy()
    run_py("-m", *one, "method.rank=2,3", "study=looks")
    release(blocker)
    counted.write_text("")
    relora("status", "looks", f"runs_dir={runs_dir}")
    assert sorted(counted.read_text().split()) == ["sacct", "squeue"]


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each call of squeue or sacct."""
    shims, log = tmp_path / "bin", tmp_path / "asked"
    shims.mkdir()
    for name in ("squeue", "sacct"):
        shim = shims / name
        shim.write_text(f'#!/bin/sh\necho {name} >>{log}\nexec {shutil.which(name)} "$@"\n')
        shim.chmod(0o755)
    monkeypatch.setitem(ONE_THREAD, "PATH", f"{shims}:{os.environ['PATH']}")
    return log


def test_a_queued_run_keeps_its_frozen_config_and_code(one: list[str], runs_dir: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for part in ("conf", "relora", "experiments", "sweeps"):
        shutil.copytree(REPOSITORY / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "run.py", checkout)
    blocker = occupy()
    command = [sys.executable, "run.py", *one]
    env = {**ONE_THREAD, "PYTHONPATH": str(checkout)}
    subprocess.run(command, check=True, cwd=checkout, env=env)
    for file in checkout.glob("conf/**/*.yaml"):
        file.write_text("nonsense: [")
    for file in checkout.glob("relora/**/*.py"):
        file.write_text("raise SystemExit('the checkout is imported')")
    assert status_rows(runs_dir, folder(one).path.name)[0]["state"] == "queued"
    release(blocker)
    wait_for_finish(runs_dir, folder(one).path.name)
    run = folder(one)
    assert weights(run) == undisturbed(one, tmp_path)
    (snapshot,) = (runs_dir / "code").iterdir()
    status = run.status
    assert status is not None
    assert {attempt.code for attempt in status.attempts} == {read_json(run.submission_file)["code"]} == {snapshot.name}


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.partition=nowhere", "nowhere"),
        ("cluster.timeout_minutes=1", r"cluster\.timeout_minutes=1 is too short.*; raise the walltime"),
        ("cluster.mem_gb=500", "SLURM would refuse .*; see the cluster"),
        ("+cluster.options.no-such-option=1", "no-such-option"),
        ("+cluster.options.array=1", r"cluster\.options\.array .*; leave it out"),
        ("+cluster.options.ntasks_per_node=4", r"cluster\.options\.ntasks_per_node .*; use cluster\.tasks_per_node"),
        ("cluster.nodes=3", r"cluster\.tasks_per_node=3 .*trainer\.sequences_per_step=4; use one of \[1, 2, 4\]"),
    ],
)
def test_mistakes_are_reported_before_anything_is_queued(
    one: list[str], runs_dir: Path, override: str, message: str, capsys
) -> None:
    for arguments in ([*one, override], ["-m", *one, "method.rank=2,4", "study=x", override]):
        assert cli.run(arguments) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not runs_dir.exists()


# -------------------------------------------------------------------------------------------------- disturbed


def test_a_run_that_fails_is_shown_as_failed_with_its_reason(one: list[str], runs_dir: Path, tmp_path: Path) -> None:
    run = folder(one)
    blocker = occupy()
    run_py(*one)
    (run.path / "checkpoints").write_text("a file where a folder should be")
    release(blocker)
    (row,) = ended(runs_dir, run.path.name)
    assert row["state"] == "failed"
    assert f"could not be written to {run.checkpoints}" in row["message"]
    assert states_of(job_of(run)) == ["FAILED"]
    assert row["message"] in relora("logs", run.path.name, f"runs_dir={runs_dir}")
    (run.path / "checkpoints").unlink()
    run_py(*one)
    wait_for_finish(runs_dir, run.path.name)
    assert weights(run) == undisturbed(one, tmp_path)


def test_a_killed_process_is_reported_and_can_be_retried(slow: list[str], runs_dir: Path, tmp_path: Path) -> None:
    overrides = [*slow, "method.rank=4,5", "study=killed"]
    run = folder([*slow, "method.rank=5"])
    run_py("-m", *overrides)
    eventually(lambda: trains(run), "some steps")
    assert run.status is not None
    os.kill(run.status.pid, signal.SIGKILL)
    rows = ended(runs_dir, "killed")
    by_name = {row["run"]: row for row in rows}
    assert by_name[run.path.name]["state"] == "failed"
    assert "killed by signal 9 on n" in by_name[run.path.name]["message"]
    assert [row["state"] for row in rows].count("finished") == 2
    assert "submitted 1 runs" in relora("retry", "killed", f"runs_dir={runs_dir}")
    wait_for_finish(runs_dir, "killed")
    assert steps_logged(run) == list(range(1, SLOW_STEPS + 1))
    assert weights(run) == undisturbed([*slow, "method.rank=5"], tmp_path)


@pytest.mark.parametrize("grace_seconds", [20, 0])
def test_a_preempted_run_resumes(slow: list[str], runs_dir: Path, tmp_path: Path, grace_seconds: int) -> None:
    """With a grace time SLURM sends a signal first. Without one it kills, and the last periodic checkpoint is used."""
    subprocess.run(["scontrol", "update", "partition=debug", f"GraceTime={grace_seconds}"], check=True)
    run = folder(slow)
    run_py(*slow)
    eventually(lambda: trains(run), "some steps")
    blocker = occupy()
    eventually(lambda: status_rows(runs_dir, run.path.name)[0]["state"] == "queued", "preempted")
    if grace_seconds:
        assert run.status is not None
        assert run.status.stopped_by in ("SIGUSR2", "SIGTERM")
    release(blocker)
    wait_for_finish(runs_dir, run.path.name)
    states = states_of(job_of(run))
    assert len(states) >= 2
    assert states[-1] == "COMPLETED"
    assert status_rows(runs_dir, run.path.name)[0]["requeues"] == len(states) - 1
    headings, cells = (line.split() for line in relora("status", run.path.name, f"runs_dir={runs_dir}").splitlines())
    assert cells[headings.index("requeues")] == str(len(states) - 1)
    assert steps_logged(run) == list(range(1, SLOW_STEPS + 1))
    assert weights(run) == undisturbed(slow, tmp_path)


def test_a_run_longer_than_its_walltime_resumes(slow: list[str], runs_dir: Path, tmp_path: Path) -> None:
    overrides = [*slow, "cluster.timeout_minutes=1", "cluster.signal_delay_seconds=15"]
    run = folder(overrides)
    run_py(*overrides)
    eventually(lambda: trains(run), "some steps")
    assert run.status is not None
    pid = run.status.pid
    with suppress(ProcessLookupError):  # if the warning came earlier
        os.kill(pid, signal.SIGSTOP)  # the shortest walltime is a minute, and the run takes less
        eventually(lambda: is_pending_or_gone(pid, signal.SIGUSR2), "the warning", 90)
        os.kill(pid, signal.SIGCONT)
    wait_for_finish(runs_dir, run.path.name)
    states = states_of(job_of(run))
    assert len(states) == run.status.attempt >= 2
    assert states[-1] == "COMPLETED"
    assert steps_logged(run) == list(range(1, SLOW_STEPS + 1))
    assert weights(run) == undisturbed(slow, tmp_path)


SIGNALLED = """
import os, signal, sys
def send():
    os.kill(os.getpid(), signal.SIGUSR2)
send()
class Last:
    def __del__(self, send=send, kill=os.kill, own=os.getpid(), number=signal.SIGUSR2):
        kill(own, number)
sys.last_of_all = Last()
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == "relora.launching.node" and "SLURM_RESTART_COUNT" not in os.environ:
            send()
if "SLURM_PROCID" in os.environ:
    sys.meta_path.insert(0, AtImport())
"""
"""Sends SLURM's warning before the first line of relora, in its imports, and while the interpreter shuts down."""


def test_a_job_handles_signals_from_the_first_line_of_its_script_to_its_end(
    one: list[str], runs_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SIGNALLED)
    setup = ["kill -USR2 $$", "kill -TERM $$", f"export PYTHONPATH={tmp_path / 'site'}:$PYTHONPATH"]
    run = folder(one)
    run_py(*one, f"cluster.setup={json.dumps(setup)}")
    wait_for_finish(runs_dir, run.path.name)
    assert states_of(job_of(run))[-1] == "COMPLETED"
    assert status_rows(runs_dir, run.path.name)[0]["requeues"] == 1, "the signal in the imports requeues the job"
    assert weights(run) == undisturbed(one, tmp_path)


def test_runs_make_the_corpus_and_the_warm_start_if_their_jobs_are_lost(
    one: list[str], runs_dir: Path, tmp_path: Path
) -> None:
    blocker = occupy()
    run_py("-m", *one, "method.rank=2,3", "study=alone", "cluster.max_parallel=3")
    needed = read_json(folder([*one, "method.rank=2"]).submission_file)["needs"]
    assert sorted(needed.values()) == ["corpus", "warm start"]
    subprocess.run(["scancel", *needed], check=True)
    release(blocker)
    wait_for_finish(runs_dir, "alone")
    assert weights(folder([*one, "method.rank=3"])) == undisturbed([*one, "method.rank=3"], tmp_path)


def is_pending_or_gone(pid: int, number: signal.Signals) -> bool:
    """Return whether a signal is pending for a stopped process, or the process has ended."""
    try:
        pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return True
    return pending is None or bool(int(pending[1], 16) >> (number - 1) & 1)


def test_a_cancelled_run_says_so_and_can_be_launched_again(slow: list[str], runs_dir: Path, tmp_path: Path) -> None:
    overrides = [*slow, "method.rank=4,5", "study=stop", "cluster.max_parallel=1", "tracker=mlflow"]
    blocker = occupy()  # the launch waits for MLflow, and a run could finish in this time
    run_py("-m", *overrides)
    release(blocker)
    full = eventually(lambda: list(runs_dir.glob("llama_tiny-full-*")), "full rank's folder")[0]
    eventually(lambda: trains(RunDir(full)), "some steps")
    status = RunDir(full).status
    assert status is not None
    os.kill(status.pid, signal.SIGSTOP)  # else it can finish before it is cancelled
    assert "3 runs cancelled" in relora("cancel", "stop", f"runs_dir={runs_dir}")
    with suppress(ProcessLookupError):
        os.kill(status.pid, signal.SIGCONT)
    rows = ended(runs_dir, "stop")
    assert {row["state"] for row in rows} == {"cancelled"}
    assert all(row["message"].startswith("cancelled by") for row in rows)
    eventually(lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout.strip(), "an empty queue")
    client = open_store(compose([*slow, "tracker=mlflow"]).mlflow_uri, runs_dir)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert {found.info.status for found in client.search_runs(experiments)} == {"KILLED"}
    relora("report", "stop", f"runs_dir={runs_dir}")
    assert "cancelled by" in (runs_dir / "studies" / "stop" / "report" / "report.md").read_text()
    run_py("-m", *overrides[:-2], "cluster.max_parallel=4", "tracker=mlflow")
    wait_for_finish(runs_dir, "stop")
    states = [found.info.status for found in client.search_runs(experiments, "tags.`study.stop` = '1'")]
    assert states == ["FINISHED"] * 3
    assert weights(folder([*slow, "method.rank=5"])) == undisturbed([*slow, "method.rank=5"], tmp_path)


def test_a_run_that_takes_too_much_memory_fails_with_this_reason(
    one: list[str], runs_dir: Path, tmp_path: Path
) -> None:
    run = folder(one)
    run_py(*one, "cluster.mem_gb=0.05")
    (row,) = ended(runs_dir, run.path.name)
    assert row["state"] == "failed"
    assert "out of memory" in row["message"], "in the job of the run, or in the job of its corpus"
    prepare(compose(one).data, runs_dir / "corpora", print)
    run_py(*one, "cluster.mem_gb=0.05")
    (row,) = ended(runs_dir, run.path.name)
    assert row["state"] == "failed"
    assert row["message"].startswith("out of memory")
    assert run.status is not None
    assert run.status.message == row["message"]
    run_py(*one, "cluster.mem_gb=2")
    wait_for_finish(runs_dir, run.path.name)
    assert weights(run) == undisturbed(one, tmp_path)


def test_a_run_resumes_on_another_node_after_its_node_dies(slow: list[str], runs_dir: Path, tmp_path: Path) -> None:
    if os.environ["NETNS"] == "0":
        pytest.skip("the nodes share one host, so one node cannot die")
    run = folder(slow)
    run_py(*slow)
    eventually(lambda: trains(run), "some steps")
    (node,) = accounted(job_of(run), "NodeList")
    subprocess.run(["bash", CLUSTER, "kill-node", node.removeprefix("n")], check=True)
    try:
        wait_for_finish(runs_dir, run.path.name)
    finally:
        subprocess.run(["bash", CLUSTER, "start-node", node.removeprefix("n")], check=True)
    states = states_of(job_of(run))
    assert "NODE_FAIL" in states[0]
    assert states[-1] == "COMPLETED"
    assert steps_logged(run) == list(range(1, SLOW_STEPS + 1))
    assert weights(run) == undisturbed(slow, tmp_path)


# -------------------------------------------------------------------------------------------------- several ranks


@pytest.fixture
def two_by_two(slow: list[str]) -> list[str]:
    """Four ranks on two nodes."""
    return [*slow, "trainer.total_steps=240", "cluster.nodes=2", "cluster.tasks_per_node=2"]


def test_two_nodes_of_two_tasks_train_one_run_and_survive_preemption(
    two_by_two: list[str], runs_dir: Path, tmp_path: Path
) -> None:
    run = folder(two_by_two)
    run_py(*two_by_two)
    eventually(lambda: trains(run), "some steps")
    blocker = occupy()
    eventually(lambda: status_rows(runs_dir, run.path.name)[0]["state"] == "queued", "preempted")
    release(blocker)
    wait_for_finish(runs_dir, run.path.name)
    assert run.status is not None
    assert run.status.ranks == 4
    assert run.status.attempt >= 2
    assert steps_logged(run) == list(range(1, 241))
    again = [text for text in two_by_two if not text.startswith("runs_dir=")] + [f"runs_dir={tmp_path / 'again'}"]
    run_py(*again)
    wait_for_finish(tmp_path / "again", run.path.name)
    assert folder(again).status.attempt == 1  # type: ignore[union-attr]
    assert weights(run) == weights(folder(again)), "equal to the undisturbed run with the same number of ranks"


def test_a_dead_rank_ends_the_job_within_two_minutes(two_by_two: list[str], runs_dir: Path) -> None:
    overrides = [*two_by_two, "trainer.total_steps=20000"]
    run = folder(overrides)
    run_py(*overrides)
    eventually(lambda: trains(run), "some steps")
    assert run.status is not None
    own = run.status.pid
    others = [
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if int(path.name) != own and b"submitit.core._submit" in _command_line(path)
    ]
    os.kill(max(others), signal.SIGKILL)
    (row,) = ended(runs_dir, run.path.name, seconds=120)
    assert row["state"] == "failed"
    assert row["message"]
    assert states_of(job_of(run)) == ["FAILED"]


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


# -------------------------------------------------------------------------------------------------- MLflow


def test_an_mlflow_server_records_eight_runs_at_once_also_after_its_restart(one: list[str], runs_dir: Path) -> None:
    host = "10.99.0.1" if os.environ["NETNS"] == "1" else "127.0.0.1"

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "relora", "ui", "--host", host, "--port", "5055", f"runs_dir={runs_dir}"]
        with (runs_dir.parent / "ui.log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, env=ONE_THREAD)
        address = f"http://{host}:5055".encode()
        eventually(lambda: address in (runs_dir.parent / "ui.log").read_bytes(), "a server")
        return server

    server = serve()
    try:
        seeds = ",".join(map(str, range(8)))
        plain = [text for text in one if not text.startswith("method.")]
        overrides = [*plain, "method=full", f"trainer.seed={seeds}", "study=many", "cluster.max_parallel=8"]
        run_py("-m", *overrides, "tracker=mlflow", f"tracker.uri=http://{host}:5055", "trainer.total_steps=60")
        eventually(lambda: any(row["state"] == "finished" for row in status_rows(runs_dir, "many")), "a first run")
        server.send_signal(signal.SIGTERM)
        server.wait()
        server = serve()
        wait_for_finish(runs_dir, "many")
        relora("report", "many", f"runs_dir={runs_dir}")
        client = open_store(f"sqlite:///{runs_dir / 'mlflow.db'}", runs_dir)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(experiments, "tags.`study.many` = '1'")
        assert sorted(run.info.status for run in found) == ["FINISHED"] * 8
        assert weights(folder([*plain, "method=full", "trainer.total_steps=60"])) == undisturbed(
            [*plain, "method=full", "trainer.total_steps=60"], runs_dir.parent
        )
        for run in found:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
            assert sorted(steps) == list(range(1, 61))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
