import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import REPOSITORY
from warm_starts import OTHERS, RELORA, setting, trained

from relora.config.compose import compose
from relora.runs.metrics import MICRO_STEP, read_rows
from relora.runs.rundir import RunDir
from relora.runs.warmstart import folder_of, key

pytestmark = pytest.mark.slow


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def reproducible(run: RunDir) -> list[dict[str, float]]:
    """The rows of a run without the values that depend on the machine."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("perf/", "time_ms", "summary/"))}
        for row in read_rows(run.metrics_file)
    ]


@pytest.mark.parametrize("arm", OTHERS, ids=lambda arm: arm[0])
def test_a_fork_equals_a_run_that_trained_its_own_warm_start(tiny: list[str], tmp_path: Path, arm: list[str]) -> None:
    first = trained(setting(tiny, *RELORA))
    forked = trained(setting(tiny, *arm))
    alone = trained([*setting(tiny, *arm), f"runs_dir={tmp_path / 'alone'}"])
    assert len(list((first.path.parent / "warm_starts").glob("*/meta.json"))) == 1
    assert forked.path.name == alone.path.name
    by_step = [sorted(reproducible(run), key=lambda row: (row["step"], sorted(row))) for run in (forked, alone)]
    assert by_step[0] == by_step[1]
    one, other = weights(forked), weights(alone)
    assert all(torch.equal(one[name], other[name]) for name in one)
    summary = forked.status.summary  # pyright: ignore[reportOptionalMemberAccess]
    assert summary["tokens"] == alone.status.summary["tokens"]  # pyright: ignore[reportOptionalMemberAccess]
    assert summary["flops"] == alone.status.summary["flops"]  # pyright: ignore[reportOptionalMemberAccess]


def test_a_fork_chooses_its_micro_step_by_its_own_memory(tiny: list[str]) -> None:
    """The run that trains the warm start may have another device."""

    def sequences_at_a_time(run: RunDir) -> set[int]:
        rows = read_rows(run.metrics_file)
        return {row[MICRO_STEP] for row in rows if row["step"] > 3 and MICRO_STEP in row}

    first = trained([*setting(tiny, *RELORA), "plan.device_memory=1kB"])
    forked = trained(setting(tiny, *OTHERS[0]))
    limited = trained([*setting(tiny, *OTHERS[1]), "plan.device_memory=1kB"])
    assert [sequences_at_a_time(run) for run in (first, forked, limited)] == [{1}, {4}, {1}]


def test_a_fork_counts_the_seconds_of_the_warm_start(tiny: list[str]) -> None:
    first = trained(setting(tiny, *RELORA))
    forked = trained(setting(tiny, *OTHERS[0]))
    seconds = [
        next(row["perf/training_seconds"] for row in read_rows(run.metrics_file) if row.get("perf/training_seconds"))
        for run in (first, forked)
    ]
    assert seconds[0] == seconds[1]


@pytest.mark.parametrize(
    ("same", "change"),
    [
        (True, "optimizer.learning_rate=9e-3"),
        (True, "method.rank=2"),
        (True, "method.reset_interval_steps=null"),
        (True, "schedule.restart_warmup_steps=1"),
        (True, "method.optimizer_reset.mode=zero"),
        (True, "trainer.checkpoint_interval_steps=1"),
        (False, "method.warm_start_steps=2"),
        (False, "method.warm_start_learning_rate=1e-3"),
        (False, "optimizer.embedding_learning_rate=1e-3"),
        (False, "optimizer.beta2=0.95"),
        (False, "schedule.warmup_steps=1"),
        (False, "trainer.total_steps=15"),
        (False, "trainer.seed=1"),
        (False, "trainer.precision=bf16"),
        (False, "trainer.sequences_per_step=8"),
        (False, "model.layers=1"),
    ],
)
def test_the_key_depends_only_on_values_that_affect_the_warm_start(tiny: list[str], same: bool, change: str) -> None:
    rates = ["optimizer.embedding_learning_rate=5e-3"]
    assert (key(compose([*tiny, *rates, change])) == key(compose([*tiny, *rates]))) is same


def test_a_run_without_a_warm_start_has_no_key(tiny: list[str]) -> None:
    assert key(compose([*tiny, "method.warm_start_steps=0"])) is None


def test_runs_that_start_together_train_the_warm_start_once(tiny: list[str]) -> None:
    launches = [setting(tiny, "method=relora", f"method.rank={rank}") for rank in (2, 4, 8)]
    processes = [
        subprocess.Popen(
            [sys.executable, "run.py", *overrides], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=None
        )
        for overrides in launches
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("forked the warm start" in text for text in outputs) == 2


SLOW = ["method.warm_start_steps=300", "trainer.total_steps=320", "trainer.checkpoint_interval_steps=50"]


def killed_in_its_warm_start(overrides: list[str], when: Callable[[RunDir], bool]) -> None:
    run = RunDir(compose(overrides).run_dir)
    process = subprocess.Popen([sys.executable, "run.py", *overrides], cwd=REPOSITORY, stdout=subprocess.PIPE)
    while not when(run):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not folder_of(compose(overrides)).exists()


def test_a_run_killed_in_its_warm_start_resumes_and_publishes_it(tiny: list[str]) -> None:
    overrides = [*setting(tiny, *RELORA), *SLOW]
    killed_in_its_warm_start(overrides, lambda run: any(run.checkpoints.glob("step-*.pt")))
    first = trained(overrides)
    assert json.loads((folder_of(compose(overrides)) / "meta.json").read_text())["run"] == first.path.name
    other = trained([*overrides, "method.rank=2"])
    assert not (other.checkpoints / "step-00000050.pt").exists()


def test_a_run_killed_before_any_checkpoint_forks_the_warm_start_of_another_run(tiny: list[str]) -> None:
    overrides = [*setting(tiny, *RELORA), *SLOW]
    killed_in_its_warm_start(overrides, lambda run: len(read_rows(run.metrics_file)) > 20)
    run = RunDir(compose(overrides).run_dir)
    before = run.metrics_file.read_bytes()
    trained([*overrides, "method.rank=2"])
    after = trained(overrides)
    whole = before[: before.rfind(b"\n") + 1]
    assert after.metrics_file.read_bytes().startswith(whole), "rows that MLflow has read keep their place"
    steps = [row["step"] for row in read_rows(after.metrics_file) if "train/loss" in row]
    assert sorted(steps) == list(range(1, 321))


def test_a_warm_start_that_cannot_be_read_is_trained_again(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = setting(tiny, *RELORA)
    trained(overrides)
    (folder_of(compose(overrides)) / "checkpoint.pt").write_bytes(b"")
    trained([*overrides, "method.rank=2"])
    assert f"{folder_of(compose(overrides)) / 'checkpoint.pt'} is empty; training it again" in capsys.readouterr().out
    assert (folder_of(compose(overrides)) / "checkpoint.pt").stat().st_size > 0


def test_a_warm_start_of_other_text_is_trained_again(tiny: list[str], text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own_text"
    own.mkdir()
    for file in text.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    overrides = [item for item in setting(tiny, *RELORA) if not item.startswith("data.path")] + [f"data.path={own}"]
    first = trained(overrides)
    (own / "000.txt").write_text("another text altogether " * 30)
    second = trained([*overrides, "method.rank=2"])
    meta = json.loads((folder_of(compose(overrides)) / "meta.json").read_text())
    assert first.path.name != second.path.name == meta["run"]
