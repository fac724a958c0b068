"""Damaged files of a run: each is named in one line, nothing is used that is damaged, and all else goes on.

The runs are real ones, made once and copied.
"""

import shutil
from pathlib import Path

import pytest
from damaged import Case, flip

from relora import cli
from relora.compose import compose
from relora.metrics import read_rows, recorded
from relora.warmstart import folder_of


def values_of(case: Case) -> dict[tuple[int, str], float]:
    """What a run has recorded, but for what is about the machine."""
    return {
        (row["step"], name): value
        for row in read_rows(case.run.metrics_file)
        for name, value in row.items()
        if name.startswith(("train/", "eval/", "restart/", "progress/"))
    }


def told(capsys: pytest.CaptureFixture[str], about: Path) -> str:
    """The one line that names a file; and nobody shows a traceback."""
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    (line,) = [line for line in (shown.out + shown.err).splitlines() if str(about) in line and line != f"run {about}"]
    return line


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_weights(
    killed: Case, finished_run: Case, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = killed.run.checkpoints / "step-00000008.pt"
    flip(newest, share)
    assert cli.run(killed.overrides) == 0
    assert told(capsys, newest).endswith("trying the one before it")
    assert killed.weights == finished_run.weights
    assert values_of(killed) == values_of(finished_run)


def test_a_damaged_warm_start_is_trained_anew(killed: Case, finished_run: Case, capsys) -> None:
    shutil.rmtree(killed.run.path)
    file = folder_of(compose(killed.overrides)) / "checkpoint.pt"
    flip(file, 0.5)
    assert cli.run(killed.overrides) == 0
    assert told(capsys, file).endswith("training it anew")
    assert killed.weights == finished_run.weights


# --------------------------------------------------------------------------------------------------------- metrics


def line_of(case: Case, step: int, name: str) -> int:
    """The number of the line, from 0."""
    lines = case.run.metrics_file.read_text().splitlines()
    return next(number for number, line in enumerate(lines) if f'"step": {step},' in line and name in line)


@pytest.mark.parametrize("damage", ["garbage", "lost"])
@pytest.mark.parametrize("step", [2, 10])
def test_a_damaged_row_is_named_and_what_can_be_is_computed_again(
    killed: Case, finished_run: Case, damage: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = killed.run.metrics_file.read_bytes().splitlines(keepends=True)
    at = line_of(killed, step, "train/loss")
    killed.run.metrics_file.write_bytes(b"".join([*lines[:at], *[b"g\xff{\n"][damage == "lost" :], *lines[at + 1 :]]))
    assert cli.run(killed.overrides) == 0
    line = told(capsys, killed.run.metrics_file)
    assert f"line {at + 1}" in line
    assert ("computed again now" in line) == (step == 10)
    assert killed.weights == finished_run.weights
    whole = values_of(finished_run)
    missing = whole.items() - values_of(killed).items()
    assert {name for (at, name), _ in missing if at == step} == {name for (at, name), _ in missing}
    assert (missing == set()) == (step == 10)
    assert [lost.recomputed for lost in recorded(killed.run.metrics_file).lost] == [step == 10]
