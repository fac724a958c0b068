"""A full or read-only disk gives one clear line and a true status. With space again, the weights are the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damaged import Case
from small import fill

from relora.cli import main as cli
from relora.common.files import publishing
from relora.runs.metrics import Progress
from relora.studies.study import planned_runs
from relora.studies.sweeps import expand
from relora.tracking.console import Console

pytestmark = pytest.mark.slow


KB = 1024
FREE = {
    "status": 12 * KB,
    "tokenizer": 40 * KB,
    "checkpoint": 200 * KB,
    "warm start": 600 * KB,
    "later": 1300 * KB,
}
"""The free bytes of the disk, by the part of the run that fails."""


Captured = pytest.CaptureFixture[str]


def line_with(capsys: Captured, word: str) -> str:
    """The one line of the output that contains the word. The output has no traceback."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    (line,) = [line for line in (shown.out + shown.err).splitlines() if word in line]
    return line


def on(disk: Path, case: Case) -> Case:
    return Case(overrides=[*case.overrides, f"runs_dir={disk / 'runs'}"])


@pytest.mark.parametrize("where", FREE)
def test_a_full_disk_gives_one_line_and_the_next_launch_gives_the_same_weights(
    small_disk: Path, finished_run: Case, where: str, capsys: Captured
) -> None:
    case = on(small_disk, finished_run)
    filler = fill(small_disk, FREE[where])
    assert cli.run(case.overrides) == 1
    line = line_with(capsys, "No space left on device")
    assert str(small_disk) in line
    assert case.run.status is not None
    assert case.run.status.state == "failed"
    filler.unlink()
    assert cli.run(case.overrides) == 0
    assert case.weights == finished_run.weights


def test_libraries_raise_the_error_of_the_system_on_a_full_disk(small_disk: Path) -> None:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    fill(small_disk, 16 * KB)
    vocabulary = {f"word {number}": number for number in range(10_000)}
    writers = {
        "model": lambda folder: save_file({"x": torch.zeros(100_000)}, folder / "model.safetensors"),
        "tokenizer": lambda folder: Tokenizer(models.WordLevel(vocabulary)).save(str(folder / "tokenizer.json")),
    }
    for name, write in writers.items():
        with pytest.raises(OSError, match=f"No space left on device.*{name}"), publishing(small_disk / name) as folder:
            write(folder)
        assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_full_disk_with_mlflow(small_disk: Path, finished_run: Case, capsys: Captured) -> None:
    from mlflow import MlflowClient

    case = on(small_disk, finished_run)
    case.overrides.append("tracker=mlflow")
    filler = fill(small_disk, FREE["checkpoint"])
    assert cli.run(case.overrides) == 1
    assert "No space left on device" in line_with(capsys, "failed: ")
    assert case.run.status is not None
    assert case.run.status.state == "failed"
    filler.unlink()
    assert cli.run(case.overrides) == 0
    assert case.weights == finished_run.weights
    client = MlflowClient(f"sqlite:///{case.runs_dir / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"


def test_a_run_that_cannot_write_its_status_is_not_finished(
    finished: Case, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next launch reads the status. A folder blocks the file here, because no file mode stops root."""
    case = Case(overrides=[*finished.overrides, f"runs_dir={tmp_path / 'runs'}"])
    progress, file = Console.progress, case.run.status_file

    def block(self: Console, reached: Progress) -> None:
        progress(self, reached)
        if reached.step == reached.total_steps:
            file.unlink()
            file.mkdir()

    monkeypatch.setattr(Console, "progress", block)
    assert cli.run(case.overrides) == 1
    line = line_with(capsys, "cannot be written")
    assert line.startswith("failed: ")
    assert str(file) in line


@pytest.mark.parametrize("options", [[], ["-m", "trainer.seed=0,1"]], ids=["run", "study"])
def test_a_read_only_disk_gives_one_line(
    small_disk: Path, finished_run: Case, options: list[str], capsys: Captured
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli.run([*options, *on(small_disk, finished_run).overrides]) == 1
    line = line_with(capsys, "Read-only file system")
    assert line.startswith("relora: ")
    assert str(small_disk) in line


def test_a_job_on_a_read_only_disk_gives_one_line(small_disk: Path, finished_run: Case) -> None:
    case = finished_run.copied(small_disk / "runs")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    command = [sys.executable, "-m", "relora.training.job", str(case.run.path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "Read-only file system" in line
    assert line.startswith("relora: ")
    assert str(case.run.path) in line


def test_a_run_that_cannot_be_started_does_not_stop_the_others_of_its_study(tiny: list[str], capsys: Captured) -> None:
    sweep = [*tiny, "study=two"]
    first, second = (item.run for item in planned_runs(expand(sweep)))
    (first.path / "log.txt").mkdir(parents=True)
    assert cli.run(["-m", *sweep]) == 1
    assert line_with(capsys, "log.txt").startswith(first.path.name)
    assert first.known_status is None
    assert second.known_status is not None
    assert second.known_status.state == "finished"


def test_a_report_without_disk_space_keeps_the_previous_report(
    small_disk: Path, tiny: list[str], capsys: Captured
) -> None:
    runs_dir = small_disk / "runs"
    plain = [item for item in tiny if not item.startswith("method.")]
    sweep = [*plain, f"runs_dir={runs_dir}", "method=full", "trainer.total_steps=4", "study=one", "cluster=debug"]
    assert cli.run(["-m", *sweep]) == 0
    capsys.readouterr()
    folder = runs_dir / "studies" / "one" / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    filler = fill(small_disk, 8 * KB)
    assert cli.main(["report", "one", f"runs_dir={runs_dir}"]) == 1
    assert str(folder) in line_with(capsys, "No space left on device")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.glob("report*")] == ["report"]
    filler.unlink()
    assert cli.main(["report", "one", f"runs_dir={runs_dir}"]) == 0
