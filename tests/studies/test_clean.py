import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import TINY

from relora.cli import main as cli
from relora.config.compose import compose
from relora.config.frozen import freeze
from relora.config.run import RunConfig
from relora.runs.checkpoint import load_latest, save
from relora.runs.rundir import RunDir, Status, write_json
from relora.runs.warmstart import folder_of, key
from relora.studies.clean import as_json, delete
from relora.studies.disk import survey

pytestmark = pytest.mark.slow

UNFINISHED = ["interrupted", "failed", "running", "missing"]
"""States of unfinished runs that no process trains. A "running" run was killed. A "missing" run has no status file."""

IN_USE = re.compile("kept: a run trains it .*forks from it now")
"""The message about a warm start that a process uses."""


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def new_config(runs_dir: Path, *overrides: str) -> RunConfig:
    return compose([*TINY, *overrides, f'runs_dir="{runs_dir}"'])


def new_run(runs_dir: Path, *overrides: str, state: str = "finished", steps: tuple[int, ...] = (5, 10)) -> RunDir:
    """A run folder as training leaves it, without training."""
    config = new_config(runs_dir, *overrides)
    run = RunDir(config.run_dir)
    freeze(config, run.config_file)
    (run.path / ".lock").touch()
    run.metrics_file.write_text('{"step": 0, "train/loss": 5.0}\n')
    for step in steps:
        save(run.checkpoints, step, {"weights": torch.zeros(1000 + step), "step": step})
    if state == "finished":
        run.model.mkdir()
        save_file({"w": torch.zeros(846)}, run.model / "model.safetensors")
        (run.model / "config.json").write_text("{}")
    if state != "missing":
        run.status = Status(state=state)
    return run


def new_warm_start(runs_dir: Path, *overrides: str) -> Path:
    folder = folder_of(new_config(runs_dir, *overrides))
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"c" * 7000)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "meta.json").write_text("{}")
    folder.with_name(folder.name + ".lock").touch()
    return folder


def new_study(runs_dir: Path, study: str, *runs: tuple[str, ...]) -> None:
    names = [new_config(runs_dir, *overrides).name for overrides in runs]
    folder = runs_dir / "studies" / study
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "study.json", {"study": study, "launches": [], "runs": {name: {"role": "arm"} for name in names}}
    )


def clean(capsys: pytest.CaptureFixture[str], runs_dir: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["clean", "--json", *arguments, f"runs_dir={runs_dir}"]) == code
    return json.loads(capsys.readouterr().out)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time of the last change and the bytes of every file in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def gone(before: dict[str, Any], folder: Path) -> set[str]:
    return set(before) - set(contents(folder))


def du_bytes(*paths: Path) -> int:
    """Return the bytes that du reports for all files in some folders. The entries of the folders do not count."""
    output = subprocess.run(["du", "-ab", *map(str, paths)], capture_output=True, text=True, check=True).stdout
    sizes = [line.split("\t") for line in output.splitlines()]
    return sum(int(size) for size, name in sizes if not Path(name).is_dir())


@contextmanager
def held(*locks: Path) -> Iterator[None]:
    """Another process holds the locks."""
    hold = (
        "import sys, time; from filelock import FileLock\n"
        "locks = [FileLock(path) for path in sys.argv[1:]]\n"
        "for lock in locks: lock.acquire(timeout=0)\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, *map(str, locks)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    try:
        yield
    finally:
        holder.kill()
        holder.communicate()


# ------------------------------------------------------------------------------------------------------------ runs


def test_a_finished_run_loses_its_checkpoints_and_nothing_else(runs_dir: Path, capsys) -> None:
    run = new_run(runs_dir)
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert gone(before, runs_dir) == {f"{run.path.name}/checkpoints/step-{step:08}.pt" for step in (5, 10)}
    assert contents(runs_dir).items() <= before.items()
    assert output["deleted_bytes"] == output["deletable_bytes"] == output["checkpoints_bytes"] > 8000


@pytest.mark.parametrize("state", UNFINISHED)
def test_an_unfinished_run_keeps_its_checkpoints(runs_dir: Path, state: str, capsys) -> None:
    run = new_run(runs_dir, state=state)
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert contents(runs_dir) == before
    assert (output["deletable_bytes"], output["deleted_bytes"]) == (0, 0)
    seen = {"running": "interrupted", "missing": "no status"}.get(state, state)
    assert output["why"] == f"kept: {seen}, resumes from it"
    resumed = load_latest(run.checkpoints, print)
    assert resumed is not None
    assert resumed["step"] == 10


def test_a_finished_run_without_a_model_keeps_its_checkpoints(runs_dir: Path, capsys) -> None:
    run = new_run(runs_dir)
    shutil.rmtree(run.model)
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert contents(runs_dir) == before
    assert re.fullmatch(r"kept: finished.* model/ has no weights.* the only copy", output["why"])


@pytest.mark.parametrize("kept_share", [0.0, 0.001, 0.5, 0.999])
def test_a_finished_run_with_a_truncated_model_keeps_its_checkpoints(runs_dir: Path, kept_share: float, capsys) -> None:
    run = new_run(runs_dir)
    weights = run.model / "model.safetensors"
    os.truncate(weights, int(weights.stat().st_size * kept_share))
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert contents(runs_dir) == before
    assert output["why"].startswith("kept: finished")
    assert f"{weights} cannot be read: " in output["why"]


@pytest.mark.parametrize("linked", ["run", "checkpoints", "warm start", "warm starts"])
def test_nothing_is_deleted_through_a_link(runs_dir: Path, tmp_path: Path, linked: str, capsys) -> None:
    run, warm_start = new_run(runs_dir), new_warm_start(runs_dir)
    link = {"run": run.path, "checkpoints": run.checkpoints, "warm start": warm_start, "warm starts": warm_start.parent}
    link[linked].rename(tmp_path / "elsewhere")
    link[linked].symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    clean(capsys, runs_dir, "--delete")
    assert contents(tmp_path / "elsewhere") == before
    assert link[linked].is_symlink()


@pytest.mark.parametrize("state", ["finished", *UNFINISHED])
def test_a_partial_checkpoint_is_deleted_when_no_process_trains_the_run(runs_dir: Path, state: str, capsys) -> None:
    run = new_run(runs_dir, state=state)
    (run.checkpoints / "step-00000014.tmp").write_bytes(b"x" * 5000)
    kept = 0 if state == "finished" else 2
    with held(run.path / ".lock"):
        output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert output["deletable_bytes"] == 0
    assert len(list(run.checkpoints.iterdir())) == 3
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert output["why"].endswith("; an interrupted write left *.tmp")
    assert output["deleted_bytes"] == output["checkpoints_bytes"] - du_bytes(run.checkpoints)
    assert len(list(run.checkpoints.iterdir())) == kept


@pytest.mark.parametrize("state", ["finished", "running", "interrupted"])
def test_a_run_that_another_process_holds_is_left_alone(runs_dir: Path, state: str, capsys) -> None:
    run, other = new_run(runs_dir, state=state), new_run(runs_dir, "trainer.seed=1")
    before = contents(runs_dir)
    with held(run.path / ".lock"):
        output = clean(capsys, runs_dir, "--delete")["runs"]
    assert (output[run.path.name]["state"], output[run.path.name]["why"]) == ("running", "kept: running")
    assert {Path(name).parts[0] for name in gone(before, runs_dir)} == {other.path.name}


def test_a_run_started_between_list_and_deletion_is_left_alone(runs_dir: Path) -> None:
    started, again, other = (new_run(runs_dir, f"trainer.seed={seed}") for seed in range(3))
    disk = survey(runs_dir)
    before = contents(runs_dir)
    again.status = Status(state="failed")
    with held(started.path / ".lock"):
        delete(disk)
    assert {Path(name).parts[0] for name in gone(before, runs_dir)} == {other.path.name}
    why = {name: run["why"] for name, run in as_json(disk)["runs"].items()}
    assert "is being trained by process" in why[started.path.name]
    assert why[again.path.name] == "kept: failed, resumes from it"
    assert disk.failures == []


def test_a_run_that_finished_between_list_and_deletion_keeps_unlisted_files(runs_dir: Path) -> None:
    run = new_run(runs_dir)
    run.status = Status(state="interrupted")
    (run.checkpoints / "step-00000014.tmp").write_bytes(b"x")
    disk = survey(runs_dir)
    run.status = Status(state="finished")
    delete(disk)
    assert sorted(path.suffix for path in run.checkpoints.iterdir()) == [".pt", ".pt"]


def test_files_that_training_did_not_write_are_not_deleted(runs_dir: Path, capsys) -> None:
    run = new_run(runs_dir)
    for name in ("best.pt", "step-00000005.pt.bak", "step-five.pt"):
        (run.checkpoints / name).write_bytes(b"mine")
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "best.pt",
        "step-00000005.pt.bak",
        "step-five.pt",
    ]
    assert output["checkpoints_bytes"] - output["deleted_bytes"] == 12


@pytest.mark.parametrize("content", ["", "- a\n- list\n", "model: {size: big}\n", "a: b: c", "\x00\xff"])
def test_a_run_with_an_unreadable_config_is_reported_and_left_alone(runs_dir: Path, content: str, capsys) -> None:
    broken, other = new_run(runs_dir), new_run(runs_dir, "trainer.seed=1")
    broken.config_file.write_bytes(content.encode("latin-1"))
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["runs"][broken.path.name]
    assert output["why"].startswith("left alone: ")
    assert "config.yaml cannot be read (" in output["why"]
    assert output["checkpoints_bytes"] > 8000
    assert {Path(name).parts[0] for name in gone(before, runs_dir)} == {other.path.name}


@pytest.mark.parametrize("content", ["{", "[1]", '{"mood": "good"}'])
def test_a_run_with_an_unreadable_status_is_left_alone(runs_dir: Path, content: str, capsys) -> None:
    run = new_run(runs_dir)
    (run.path / "status.json").write_text(content)
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["runs"][run.path.name]
    assert output["why"].startswith("left alone: ")
    assert "status.json cannot be read (" in output["why"]
    assert contents(runs_dir) == before


def test_a_failed_deletion_is_reported_and_the_rest_is_deleted(runs_dir: Path, capsys, monkeypatch) -> None:
    runs = sorted((new_run(runs_dir, f"trainer.seed={seed}") for seed in range(2)), key=lambda run: run.path)
    stuck = runs[0].checkpoints / "step-00000005.pt"
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert cli.main(["clean", "--delete", "--json", f"runs_dir={runs_dir}"]) == 1
    shown = capsys.readouterr()
    output = json.loads(shown.out)
    assert f"relora: {stuck} could not be deleted: " in shown.err
    assert "Permission denied" in shown.err
    assert [path for run in runs for path in run.checkpoints.iterdir()] == [stuck]
    assert output["totals"]["deletable_bytes"] - output["totals"]["deleted_bytes"] == stuck.stat().st_size
    assert len(output["failures"]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may delete anything")
def test_a_folder_without_permission_is_reported_and_the_rest_is_deleted(runs_dir: Path, capsys) -> None:
    stuck, other = new_run(runs_dir), new_run(runs_dir, "trainer.seed=1")
    stuck.checkpoints.chmod(0o500)
    output = clean(capsys, runs_dir, "--delete", code=1)
    stuck.checkpoints.chmod(0o700)
    assert len(output["failures"]) == 2
    assert len(list(stuck.checkpoints.iterdir())) == 2
    assert list(other.checkpoints.iterdir()) == []


# ------------------------------------------------------------------------------------------------ list and sizes


def test_a_list_changes_nothing(runs_dir: Path, capsys) -> None:
    runs = [new_run(runs_dir), new_run(runs_dir, "trainer.seed=1", state="interrupted")]
    (runs[1].checkpoints / "step-00000014.tmp").write_bytes(b"x")
    new_run(runs_dir, "trainer.seed=2", state="missing", steps=())
    (new_config(runs_dir, "trainer.seed=2").run_dir / ".lock").unlink()
    new_warm_start(runs_dir)
    new_warm_start(runs_dir, "trainer.seed=7").with_name("00000000.tmp").mkdir()
    before = contents(runs_dir)
    folders = sorted(runs_dir.rglob("*"))
    listed = clean(capsys, runs_dir)
    assert cli.main(["clean", f"runs_dir={runs_dir}"]) == 0
    assert contents(runs_dir) == before
    assert sorted(runs_dir.rglob("*")) == folders
    assert listed["totals"]["deletable_bytes"] > 8000
    assert listed["totals"]["deleted_bytes"] == 0


def test_sizes_are_equal_to_the_sizes_that_du_reports(runs_dir: Path, capsys) -> None:
    runs = [new_run(runs_dir), new_run(runs_dir, "trainer.seed=1", state="interrupted", steps=(3,))]
    warm_starts = [new_warm_start(runs_dir), new_warm_start(runs_dir, "trainer.seed=1")]
    (runs[0].model / "deep" / "er").mkdir(parents=True)
    (runs[0].model / "deep" / "er" / "file").write_bytes(b"x" * 99)
    (runs[0].checkpoints / "link.pt").symlink_to(runs[0].checkpoints / "step-00000005.pt")
    link_bytes = (runs[0].checkpoints / "link.pt").lstat().st_size
    listed = clean(capsys, runs_dir)
    for run in runs:
        entry = listed["runs"][run.path.name]
        linked = link_bytes if run is runs[0] else 0
        assert entry["checkpoints_bytes"] == sum(path.stat().st_size for path in run.checkpoints.glob("step*")) + linked
        assert entry["model_bytes"] == (du_bytes(run.model) if run.model.exists() else 0)
    for folder in warm_starts:
        assert listed["warm_starts"][folder.name]["warm_start_bytes"] == du_bytes(folder) == 7005
    before = du_bytes(runs_dir)
    deleted = clean(capsys, runs_dir, "--delete")
    assert deleted["totals"]["deleted_bytes"] == before - du_bytes(runs_dir) == listed["totals"]["deletable_bytes"]
    assert listed["totals"]["warm_starts_bytes"] == 2 * 7005
    assert listed["totals"]["checkpoints_bytes"] == sum(run["checkpoints_bytes"] for run in listed["runs"].values())


def test_a_second_deletion_deletes_nothing_more(runs_dir: Path, capsys) -> None:
    new_run(runs_dir)
    interrupted = new_run(runs_dir, "trainer.seed=1", state="interrupted")
    (interrupted.checkpoints / "step-00000014.tmp").write_bytes(b"x")
    new_warm_start(runs_dir)
    assert clean(capsys, runs_dir, "--delete")["totals"]["deleted_bytes"] > 15000
    before = contents(runs_dir)
    again = clean(capsys, runs_dir, "--delete")
    assert (again["totals"]["deletable_bytes"], again["totals"]["deleted_bytes"]) == (0, 0)
    assert contents(runs_dir) == before
    assert "no checkpoint" in {run["why"] for run in again["runs"].values()}


def test_the_output_without_json_is_a_table(runs_dir: Path, capsys) -> None:
    finished, stopped = new_run(runs_dir), new_run(runs_dir, "method.rank=2", state="interrupted")
    (finished.checkpoints / "step-00000010.pt").write_bytes(b"x" * 3 * 2**20)
    warm_start = new_warm_start(runs_dir)
    assert cli.main(["clean", f"runs_dir={runs_dir}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith(finished.path.name))
    assert row.split()[1:7] == ["finished", "3.0", "MiB", "3.4", "KiB", "3.0"]
    assert next(line for line in lines if line.startswith(stopped.path.name)).endswith(
        "kept: interrupted, resumes from it"
    )
    row = next(line for line in lines if line.startswith(warm_start.name))
    assert row.split()[1:7] == ["2", "runs", "6.8", "KiB", "0", "B"]
    assert row.endswith(f"kept: {stopped.path.name} (interrupted) forks from it")
    assert re.search(r"3\.0 MiB [^,;]*deletable [^,;]*--delete$", lines[-1])
    assert cli.main(["clean", "--delete", f"runs_dir={runs_dir}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; 3.0 MiB deleted")


def test_an_empty_folder_is_reported_and_a_missing_folder_is_an_error(runs_dir: Path, capsys) -> None:
    assert cli.main(["clean", f"runs_dir={runs_dir}"]) == 0
    output = capsys.readouterr().out
    assert output.endswith(f"no run in {runs_dir}\n")
    assert output.count("\n") == 1
    assert cli.main(["clean", f"runs_dir={runs_dir / 'typo'}"]) == 2
    assert "typo does not exist" in capsys.readouterr().err
    assert not (runs_dir / "typo").exists()


def test_other_folders_are_not_counted_as_runs(runs_dir: Path, capsys) -> None:
    for folder in ("studies/checkpoints", "corpora/checkpoints", "warm_starts/checkpoints", "notes"):
        (runs_dir / folder).mkdir(parents=True)
    (runs_dir / "mlflow.db").touch()
    new_study(runs_dir, "checkpoints", ())
    assert clean(capsys, runs_dir)["runs"] == {}


# ----------------------------------------------------------------------------------------------------- warm starts


def test_a_warm_start_is_deleted_when_all_runs_that_fork_from_it_are_finished(runs_dir: Path, capsys) -> None:
    first = new_run(runs_dir)
    second = new_run(runs_dir, "method.rank=2", state="interrupted")
    mine, others = new_warm_start(runs_dir), new_warm_start(runs_dir, "trainer.seed=1")
    new_run(runs_dir, "trainer.seed=1")
    unrelated = new_run(runs_dir, "method.warm_start_steps=0", state="interrupted")
    assert key(new_config(runs_dir)) == key(new_config(runs_dir, "method.rank=2")) == mine.name
    output = clean(capsys, runs_dir, "--delete")["warm_starts"]
    assert output[mine.name]["runs"] == sorted([first.path.name, second.path.name])
    assert output[mine.name]["why"] == f"kept: {second.path.name} (interrupted) forks from it"
    assert output[others.name]["deleted_bytes"] == 7005
    assert unrelated.path.name not in [*output[mine.name]["runs"], *output[others.name]["runs"]]
    assert (mine.is_dir(), others.exists()) == (True, False)

    second.model.mkdir()
    (second.model / "model.safetensors").touch()
    second.status = Status(state="finished")
    assert clean(capsys, runs_dir, "--delete")["warm_starts"][mine.name]["why"].endswith("is finished")
    assert [path.name for path in mine.parent.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("state", UNFINISHED)
def test_a_run_that_is_not_finished_keeps_its_warm_start(runs_dir: Path, state: str, capsys) -> None:
    new_run(runs_dir)
    new_run(runs_dir, "method.rank=2", state=state, steps=())
    folder = new_warm_start(runs_dir)
    output = clean(capsys, runs_dir, "--delete")["warm_starts"][folder.name]
    assert output["deletable_bytes"] == 0
    assert len(list(folder.iterdir())) == 3


def test_a_warm_start_that_no_run_forks_from_is_deleted(runs_dir: Path, capsys) -> None:
    folder = new_warm_start(runs_dir)
    assert clean(capsys, runs_dir, "--delete")["warm_starts"][folder.name]["why"] == "no run forks from it"
    assert not folder.exists()


def test_a_run_of_a_study_that_did_not_start_keeps_every_warm_start(runs_dir: Path, capsys) -> None:
    new_run(runs_dir)
    folder = new_warm_start(runs_dir)
    new_study(runs_dir, "ranks", (), ("method.rank=2",))
    missing = new_config(runs_dir, "method.rank=2").name
    output = clean(capsys, runs_dir, "--delete")["warm_starts"][folder.name]
    assert re.fullmatch(rf"kept: unknown .* {missing} \(.*study ranks, not started\)", output["why"])
    assert folder.is_dir()
    new_run(runs_dir, "method.rank=2")
    clean(capsys, runs_dir, "--delete")
    assert not folder.exists()


def test_a_run_with_an_unreadable_config_keeps_every_warm_start_until_it_is_finished(runs_dir: Path, capsys) -> None:
    run = new_run(runs_dir, state="interrupted")
    run.config_file.unlink()
    folder = new_warm_start(runs_dir, "trainer.seed=7")
    output = clean(capsys, runs_dir, "--delete")["warm_starts"][folder.name]
    assert f"{run.path.name} (its config.yaml " in output["why"]
    assert "cannot be read" in output["why"]
    assert folder.is_dir()
    run.status = Status(state="finished")
    clean(capsys, runs_dir, "--delete")
    assert not folder.exists()


def test_a_warm_start_that_a_run_trains_or_forks_is_kept(runs_dir: Path, capsys) -> None:
    folder, other = new_warm_start(runs_dir), new_warm_start(runs_dir, "trainer.seed=1")
    leftover = folder.with_name(folder.name + ".tmp")
    leftover.mkdir()
    (leftover / "checkpoint.pt").write_bytes(b"half")
    disk = survey(runs_dir)
    with held(folder.with_name(folder.name + ".lock")):
        output = clean(capsys, runs_dir, "--delete")["warm_starts"]
        delete(disk)
    assert IN_USE.fullmatch(output[folder.name]["why"])
    assert (output[folder.name]["warm_start_bytes"], output[folder.name]["deletable_bytes"]) == (7009, 0)
    assert (folder.is_dir(), leftover.is_dir(), other.exists()) == (True, True, False)


def test_a_warm_start_that_a_run_locks_just_before_the_deletion_is_kept(runs_dir: Path, monkeypatch) -> None:
    folder = new_warm_start(runs_dir)
    disk, again = survey(runs_dir), survey(runs_dir)
    monkeypatch.setattr("relora.studies.clean.survey", lambda *_: again)
    with held(folder.with_name(folder.name + ".lock")):
        delete(disk)
    assert IN_USE.fullmatch(as_json(disk)["warm_starts"][folder.name]["why"])
    assert len(list(folder.iterdir())) == 3
    assert disk.failures == []


def test_a_partial_warm_start_is_deleted_when_no_process_writes_it(runs_dir: Path, capsys) -> None:
    new_run(runs_dir, state="interrupted")
    folder = new_warm_start(runs_dir)
    for name in (folder.name, "0123abcd"):
        folder.with_name(name + ".tmp").mkdir()
        (folder.with_name(name + ".tmp") / "checkpoint.pt").write_bytes(b"half")
    assert clean(capsys, runs_dir, "--delete")["totals"]["deleted_bytes"] == 8
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
    assert len(list(folder.iterdir())) == 3


def test_a_warm_start_that_a_run_needs_again_between_list_and_deletion_is_kept(runs_dir: Path) -> None:
    run = new_run(runs_dir)
    folder = new_warm_start(runs_dir)
    disk = survey(runs_dir)
    assert as_json(disk)["warm_starts"][folder.name]["deletable_bytes"] == 7005
    new_run(runs_dir, "method.rank=2", state="missing", steps=())
    delete(disk)
    assert folder.is_dir()
    assert "(missing) forks from it" in as_json(disk)["warm_starts"][folder.name]["why"]
    assert list(run.checkpoints.iterdir()) == []


def test_a_half_deleted_warm_start_is_never_used_as_a_complete_one(runs_dir: Path, capsys, monkeypatch) -> None:
    folder = new_warm_start(runs_dir)
    leftover = folder.with_name(folder.name + ".tmp")

    def fail(path: Path) -> None:
        (path / "checkpoint.pt").unlink()
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("relora.studies.clean.shutil.rmtree", fail)
    output = clean(capsys, runs_dir, "--delete", code=1)
    (failure,) = output["failures"]
    assert failure.startswith(f"{leftover} could not be deleted: ")
    assert "Permission denied" in failure
    assert output["warm_starts"][folder.name]["deleted_bytes"] == 7000
    assert (folder.exists(), leftover.exists()) == (False, True)
    monkeypatch.undo()
    assert clean(capsys, runs_dir, "--delete")["totals"]["deleted_bytes"] == 5
    assert not leftover.exists()


# --------------------------------------------------------------------------------------------------------- studies


def test_a_study_selects_only_its_runs_and_their_warm_starts(runs_dir: Path, capsys) -> None:
    shared, mine = new_run(runs_dir), new_run(runs_dir, "method.rank=2")
    others = new_run(runs_dir, "trainer.seed=1")
    folder, other_folder = new_warm_start(runs_dir), new_warm_start(runs_dir, "trainer.seed=1")
    new_study(runs_dir, "ranks", (), ("method.rank=2",))
    new_study(runs_dir, "seeds", (), ("trainer.seed=1",))
    before = contents(runs_dir)
    output = clean(capsys, runs_dir, "--delete", "ranks")
    assert set(output["runs"]) == {shared.path.name, mine.path.name}
    assert set(output["warm_starts"]) == {folder.name}
    assert {Path(name).parts[0] for name in gone(before, runs_dir)} == {shared.path.name, mine.path.name, "warm_starts"}
    assert (folder.exists(), other_folder.exists(), len(list(others.checkpoints.iterdir()))) == (False, True, 2)
    assert set(clean(capsys, runs_dir, "ranks", "seeds")["runs"]) == {run.path.name for run in (shared, mine, others)}


def test_a_run_outside_the_study_keeps_the_warm_start_that_it_shares_with_the_study(runs_dir: Path, capsys) -> None:
    new_run(runs_dir)
    outside = new_run(runs_dir, "method.rank=2", state="interrupted")
    folder = new_warm_start(runs_dir)
    new_study(runs_dir, "ranks", ())
    output = clean(capsys, runs_dir, "--delete", "ranks")["warm_starts"][folder.name]
    assert output["why"] == f"kept: {outside.path.name} (interrupted) forks from it"
    assert folder.is_dir()


def test_an_unknown_study_is_an_error_that_names_the_known_studies(runs_dir: Path, capsys) -> None:
    new_run(runs_dir)
    assert cli.main(["clean", "--delete", "rank", f"runs_dir={runs_dir}"]) == 2
    message = capsys.readouterr().err
    assert f"study rank does not exist in {runs_dir};" in message
    assert "the studies there: none" in message
    new_study(runs_dir, "ranks", ())
    new_study(runs_dir, "seeds", ())
    before = contents(runs_dir)
    assert cli.main(["clean", "--delete", "rank", "ranks", f"runs_dir={runs_dir}"]) == 2
    assert "the studies there: ranks, seeds" in capsys.readouterr().err
    assert contents(runs_dir) == before


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"runs": 3}'])
def test_clean_deletes_nothing_if_a_manifest_is_damaged(runs_dir: Path, content: str, capsys) -> None:
    new_run(runs_dir)
    new_study(runs_dir, "ranks", ())
    (runs_dir / "studies" / "ranks" / "study.json").write_text(content)
    before = contents(runs_dir)
    assert cli.main(["clean", "--delete", f"runs_dir={runs_dir}"]) == 1
    assert "study.json cannot be read: " in capsys.readouterr().err
    assert contents(runs_dir) == before


# ---------------------------------------------------------------------------------------------------- a real study


def test_a_real_study_resumes_from_the_files_that_clean_keeps(tiny: list[str], capsys) -> None:
    sweep = [*tiny, "method.rank=2,4", "study=ranks", "cluster=debug"]
    assert cli.run(["-m", *sweep]) == 0
    capsys.readouterr()
    runs_dir = Path(compose(tiny).runs_dir)
    done, stopped = (RunDir(compose([*tiny, f"method.rank={rank}"]).run_dir) for rank in (2, 4))
    stopped.status = Status(state="interrupted")
    warm_start = folder_of(compose(tiny))
    output = clean(capsys, runs_dir, "--delete", "ranks")
    assert len(output["runs"]) == 3
    assert output["warm_starts"][warm_start.name]["why"] == f"kept: {stopped.path.name} (interrupted) forks from it"
    assert (list(done.checkpoints.iterdir()), warm_start.is_dir()) == ([], True)

    before = contents(done.path)
    assert cli.run(["-m", *sweep]) == 0
    assert "2 finished already" in capsys.readouterr().out
    assert contents(done.path) == before
    resumed = stopped.status
    assert resumed is not None
    assert (resumed.state, resumed.attempt) == ("finished", 2)

    clean(capsys, runs_dir, "--delete")
    assert not warm_start.exists()
    assert cli.run(["-m", *sweep]) == 0
    assert "3 finished already" in capsys.readouterr().out


def test_listing_runs_needs_no_torch(runs_dir: Path) -> None:
    run = new_run(runs_dir)
    source = (
        "import sys; from relora.cli.main import main\n"
        f"code = main(['clean', 'runs_dir={runs_dir}']); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run.path.name in done.stdout


# --------------------------------------------------------------------------------------------------------- corpora


def test_a_snapshot_of_code_is_deletable_when_every_run_that_was_submitted_with_it_has_ended(
    runs_dir: Path, capsys
) -> None:
    snapshot, kept, unused = (runs_dir / "code" / name for name in ("0123456789ab", "ba9876543210", "fresh"))
    for folder in (snapshot, kept, unused):
        (folder / "relora").mkdir(parents=True)
        (folder / "relora" / "core.py").write_text("pass\n")
        (folder / "code.json").write_text("{}")
    for folder in (snapshot, kept):
        os.utime(folder / "code.json", (0, 0))
    ended, failed = new_run(runs_dir), new_run(runs_dir, "trainer.seed=1", state="failed")
    waiting = new_run(runs_dir, "trainer.seed=2", state="missing")
    for run, folder in ((ended, snapshot), (failed, snapshot), (waiting, kept)):
        write_json(run.submission_file, {"job": "1", "log": "", "code": folder.name})
    found = {cost.folder: cost for cost in survey(runs_dir).snapshots}
    assert {folder for folder, cost in found.items() if cost.deletable} == {snapshot}
    assert found[kept].why == f"kept: {waiting.path.name} (missing) runs it"
    assert found[unused].why == "kept: made less than a day ago"
    assert cli.main(["clean", "--delete", f"runs_dir={runs_dir}"]) == 0
    assert "every run that was submitted with it has ended" in capsys.readouterr().out
    assert (snapshot.exists(), kept.exists(), unused.exists()) == (False, True, True)


def test_a_snapshot_that_is_used_again_before_the_deletion_is_kept(runs_dir: Path) -> None:
    snapshot = runs_dir / "code" / "0123456789ab"
    snapshot.mkdir(parents=True)
    (snapshot / "code.json").write_text("{}")
    os.utime(snapshot / "code.json", (0, 0))
    disk = survey(runs_dir)
    os.utime(snapshot / "code.json")
    delete(disk)
    assert snapshot.exists()


def test_a_preparation_that_stopped_long_ago_is_deletable_and_a_prepared_corpus_is_not(runs_dir: Path, capsys) -> None:
    corpora = runs_dir / "corpora"
    long_ago = time.time() - 25 * 3600
    for name in ("text-00000000", "text-11111111.partial", "text-22222222.partial", "text-33333333.partial"):
        (corpora / name).mkdir(parents=True)
        (corpora / name / "train.bin").write_bytes(b"x" * 500)
        (corpora / name / "meta.json").write_text("{}")
    for name in ("text-00000000", "text-11111111.partial", "text-33333333.partial"):
        for path in (*(corpora / name).iterdir(), corpora / name):
            os.utime(path, (long_ago, long_ago))
    (corpora / "text-33333333.lock").touch()
    before = contents(runs_dir)
    with held(corpora / "text-33333333.lock"):
        listed = clean(capsys, runs_dir)
        assert contents(runs_dir) == before
        whys = {name: entry["why"] for name, entry in listed["corpora"].items()}
        assert list(whys) == [path.name for path in sorted(corpora.iterdir()) if path.is_dir()]
        assert whys["text-00000000"].startswith("kept: prepared")
        assert "goes on with it" in whys["text-22222222.partial"]
        assert whys["text-33333333.partial"] == "kept: it is being prepared now"
        deleted = clean(capsys, runs_dir, "--delete")
    assert gone(before, runs_dir) == {f"corpora/text-11111111.partial/{name}" for name in ("train.bin", "meta.json")}
    assert deleted["corpora"]["text-11111111.partial"]["deleted_bytes"] == 502
    assert deleted["totals"]["corpora_bytes"] == 4 * 502
    assert listed["totals"]["deletable_bytes"] == deleted["totals"]["deleted_bytes"] == 502
    assert cli.main(["clean", f"runs_dir={runs_dir}"]) == 0
    assert "of corpora" in capsys.readouterr().out
