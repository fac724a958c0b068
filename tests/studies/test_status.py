"""The table of relora status. tests/runs/test_state.py and tests/slurm test the states that it shows."""

import json
from pathlib import Path

import pytest
from lab import FULL, RELORA, Lab

from relora.runs.metrics import MetricsLog
from relora.runs.rundir import RunDir
from relora.runs.state import ObservedState
from relora.studies.status import StatusRow, render_plain, status_rows
from relora.studies.study import of_manifest

QUEUED = StatusRow(
    run="llama_tiny-relora-r128-b8382e77",
    role="baseline",
    state=ObservedState(name="queued", message="Priority", requeues=2),
    step=12000,
    total_steps=20000,
    attempts=3,
    validation_perplexity=103.25,
    tokens_per_second=123456.0,
)
RUNNING = StatusRow(
    run="llama_tiny-relora-r4-38e2b877",
    role="arm",
    state=ObservedState(name="running", message="on n1"),
    step=300,
    total_steps=20000,
    seconds_left=3661.0,
    attempts=1,
)


def test_the_table_has_a_requeues_column_only_if_slurm_requeued_a_job() -> None:
    headings, first, second = (line.split() for line in render_plain([QUEUED, RUNNING]).splitlines())
    assert first[headings.index("requeues") - 1] == "2", "a queued run shows no time left"
    assert "2" not in second
    assert "requeues" not in render_plain([RUNNING])


def test_empty_columns_are_left_out() -> None:
    assert render_plain([RUNNING]).split("\n")[0].split() == ["run", "role", "state", "step", "left", "note"]


def test_the_time_left_follows_from_the_tokens_of_the_steps_so_far(tmp_path: Path) -> None:
    """With padding, the tokens of a step differ from sequences times length."""
    lab = Lab(tmp_path / "runs")
    config = lab.run(*FULL, "data.packing=pad", state="running")
    run = RunDir(config.run_dir)
    run.metrics_file.unlink()
    with MetricsLog.opened(run.metrics_file, exact=True) as log:
        for step in (1, 2, 10):
            log.log(step, {"perf/tokens_per_second": 60.0, "progress/tokens": 30.0 * step})
    with run.locked():
        lab.study(config)
        rows, _ = shown(lab)
    row = rows[config.name]
    assert (row.state.name, row.step, row.tokens_per_second) == ("running", 10, 60.0)
    assert row.seconds_left == (config.total_steps - 10) / 2


# ------------------------------------------------------------------------------------------------------- baselines


def shown(lab: Lab) -> tuple[dict[str, StatusRow], str]:
    """Return the rows of the study by run, and the table as text."""
    rows = status_rows(of_manifest(lab.runs_dir, "mine"))
    return {row.run: row for row in rows}, render_plain(rows)


def at_rate(lab: Lab, rate: str, loss: float, *overrides: str, **changes):
    return lab.run(*FULL, f"optimizer.learning_rate={rate}", *overrides, loss=loss, **changes)


def test_the_baseline_shown_is_the_best_on_validation_and_not_on_test(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs")
    best = at_rate(lab, "1e-3", 2.9, summary={"test_loss": 3.3, "test_perplexity": 27.1})
    worse = at_rate(lab, "2e-3", 3.0, summary={"test_loss": 2.0, "test_perplexity": 7.4})
    arm = lab.run(*RELORA, loss=3.3)
    lab.study(best, worse, arm)
    rows, text = shown(lab)
    assert rows[arm.name].baseline == best.name
    assert rows[arm.name].gap_to_full == pytest.approx(2.718281828 ** (3.4 - 3.3) - 1)
    assert rows[best.name].gap_to_full == 0
    assert rows[best.name].rates == "the best of 2 rates"
    assert text.splitlines()[-1].split()[-1] == best.name
    assert worse.name not in text.splitlines()[-1]


def test_each_run_is_compared_with_the_full_rank_run_of_its_seed(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs")
    full = [at_rate(lab, "1e-3", 3.0 + seed, f"trainer.seed={seed}") for seed in range(2)]
    arms = [lab.run(*RELORA, f"trainer.seed={seed}", loss=3.2 + seed) for seed in range(3)]
    lab.study(*full, *arms)
    rows, text = shown(lab)
    assert [rows[config.name].baseline for config in arms] == [full[0].name, full[1].name, None]
    assert rows[arms[2].name].gap_to_full is None
    assert all(config.name in text.splitlines()[-1] for config in full)


def test_a_full_rank_run_with_a_warm_start_or_of_another_length_is_no_baseline(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs")
    warm = at_rate(lab, "1e-3", 2.0, "method.warm_start_steps=5")
    short = at_rate(lab, "1e-3", 2.0, "trainer.total_steps=20")
    arm = lab.run(*RELORA, loss=3.2)
    lab.study(warm, short, arm)
    rows, text = shown(lab)
    assert {row.baseline for row in rows.values()} == {None, short.name}, (
        "the short run is the baseline only of its length"
    )
    assert rows[arm.name].baseline is rows[warm.name].baseline is None
    assert rows[arm.name].gap_to_full is None
    assert text.splitlines()[-1].endswith(f"against {short.name}")


def test_the_role_shows_an_added_full_rank_run_that_is_not_the_baseline(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs")
    best, other, arm = at_rate(lab, "1e-3", 2.9), at_rate(lab, "2e-3", 3.0), lab.run(*RELORA, loss=3.2)
    lab.study(best, other, arm)
    file = lab.runs_dir / "studies" / "mine" / "study.json"
    manifest = json.loads(file.read_text())
    for config in (best, other):  # a launch that adds these runs writes this role
        manifest["runs"][config.name]["role"] = "baseline"
    file.write_text(json.dumps(manifest))
    rows, _ = shown(lab)
    roles = [rows[config.name].role for config in (best, other, arm)]
    assert roles == ["baseline", "baseline, other rate", "arm"]
