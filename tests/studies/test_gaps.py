"""The baseline that a run is compared with. Every command uses the same rule."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from lab import FULL, RELORA, Lab

from relora.cli import main as cli
from relora.config import frozen
from relora.config.run import RunConfig
from relora.runs.metrics import read_rows, row_metrics
from relora.runs.results import best_on_validation
from relora.studies.compare import Study, load_study
from relora.studies.report import answer, as_json, write_report
from relora.studies.status import render_plain, status_rows
from relora.studies.study import of_manifest

RATES = ("1e-3", "2e-3", "4e-3")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


def full(lab: Lab, rate: str, losses: dict[int, float]) -> list[RunConfig]:
    return [
        lab.run(*FULL, f"optimizer.learning_rate={rate}", f"trainer.seed={seed}", loss=loss)
        for seed, loss in losses.items()
    ]


def relora(lab: Lab, losses: dict[int, float], *overrides: str) -> list[RunConfig]:
    return [lab.run(*RELORA, *overrides, f"trainer.seed={seed}", loss=loss) for seed, loss in losses.items()]


def baselines(study: Study) -> dict[int, str | None]:
    """Return the baselines of the ReLoRA runs, by seed."""
    members = [member for arm in study.arms if arm.label.split()[0] == "relora" for member in arm.members]
    return {member.run.seed: member.baseline and member.baseline.name for member in members}


# ------------------------------------------------------------------------------------------------- the commands agree


@pytest.mark.slow
def test_status_report_csv_and_json_show_the_same_gaps(lab: Lab) -> None:
    """Each seed has another best full-rank rate. The baseline is the rate with the best mean."""
    losses = {"1e-3": {0: 2.8, 1: 3.3, 2: 3.1}, "2e-3": {0: 3.0, 1: 2.9, 2: 3.05}, "4e-3": {0: 3.2, 1: 3.1, 2: 2.9}}
    full_runs = [config for rate in RATES for config in full(lab, rate, losses[rate])]
    arms = relora(lab, {0: 3.1, 1: 3.2, 2: 3.3}) + relora(lab, {0: 3.4, 1: 3.5, 2: 3.6}, "method.rank=8")
    study = lab.study(*full_runs, *arms)
    means = {rate: sum(losses[rate].values()) / 3 for rate in RATES}
    best = losses[min(RATES, key=lambda rate: means[rate])]
    loss_of = {config.name: loss for config, loss in zip(arms, (3.1, 3.2, 3.3, 3.4, 3.5, 3.6), strict=True)}
    seed_of = {config.name: config.trainer.seed for config in arms}
    expected = {name: math.expm1(loss - best[seed_of[name]]) for name, loss in loss_of.items()}

    rows = {row.run: row.gap_to_full for row in status_rows(of_manifest(lab.runs_dir, "mine"))}
    with (write_report(study, lab.runs_dir) / "results.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    records = {row["run"]: row for row in json.loads(as_json(study))["runs"]}
    for name, gap in expected.items():
        assert rows[name] == pytest.approx(gap)
        assert float(table[name]["gap_at_equal_tokens"]) == rows[name]
        assert records[name]["gap_at_equal_tokens"] == rows[name]
    assert len(rows) == len(table) == len(records) == 15
    for name in rows.keys() - expected.keys():
        assert rows[name] == records[name]["gap_at_equal_tokens"]


@pytest.mark.slow
def test_the_commands_agree(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.study(
        *full(lab, "1e-3", {0: 2.8, 1: 3.4}), *full(lab, "2e-3", {0: 3.0, 1: 3.0}), *relora(lab, {0: 3.1, 1: 3.1})
    )
    where = f"runs_dir={lab.runs_dir}"
    assert cli.main(["status", "--json", "mine", where]) == 0
    status = {row["run"]: (row["gap_to_full"], row["baseline"]) for row in json.loads(capsys.readouterr().out)}
    assert cli.main(["report", "--json", "mine", where]) == 0
    report = {
        row["run"]: (row["gap_at_equal_tokens"], row["baseline"]) for row in json.loads(capsys.readouterr().out)["runs"]
    }
    assert status == report
    assert len(status) == 6


# ------------------------------------------------------------------------------ all runs of runs_dir are candidates


@pytest.mark.slow
def test_a_better_full_rank_run_of_the_runs_dir_is_used_and_named(lab: Lab) -> None:
    own, (arm,) = full(lab, "2e-3", {0: 3.2}), relora(lab, {0: 3.0})
    (elsewhere,) = full(lab, "1e-3", {0: 2.5})
    study = lab.study(*own, arm)
    assert baselines(study) == {0: elsewhere.name}
    headline = " ".join(answer(study))
    assert "(full lr=0.001) reaches perplexity 13.46" in headline
    assert "baseline full lr=0.001 is not a run of this study" in headline
    assert re.search(r"full lr=0\.002 [^.]*worse on validation \(3\.2000 against 2\.5000, over seed 0\)", headline)
    assert re.search(r"\+64\.9% [^.]*at equal tokens", headline)
    page = (write_report(study, lab.runs_dir) / "report.md").read_text()
    assert elsewhere.name in page
    text = render_plain(status_rows(of_manifest(lab.runs_dir, "mine")))
    assert text.splitlines()[-1].endswith(f"against {elsewhere.name}")
    assert "+64.9%" in text


def test_a_worse_full_rank_run_of_the_runs_dir_changes_nothing(lab: Lab) -> None:
    own, (arm,) = full(lab, "2e-3", {0: 3.2}), relora(lab, {0: 3.0})
    full(lab, "1e-3", {0: 3.5})
    study = lab.study(*own, arm)
    assert baselines(study) == {0: own[0].name}
    assert not study.baseline_remarks()


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_a_full_rank_run_that_is_not_finished_is_no_baseline(lab: Lab, state: str) -> None:
    own, (arm,) = full(lab, "2e-3", {0: 3.2}), relora(lab, {0: 3.0})
    lab.run(*FULL, "optimizer.learning_rate=1e-3", loss=2.5, state=state)
    assert baselines(lab.study(*own, arm)) == {0: own[0].name}


@pytest.mark.slow
def test_every_config_is_read_once_and_configs_of_other_methods_are_not_read(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = relora(lab, {0: 3.0, 1: 3.0})
    full_runs = [config for rate in RATES for config in full(lab, rate, {0: 3.2, 1: 3.1})]
    relora(lab, dict.fromkeys(range(10, 20), 3.0))
    lab.study(*arms)
    planned = of_manifest(lab.runs_dir, "mine")
    status_rows(planned)
    read: list[str] = []
    thaw = frozen.thaw

    def counted(path: Path) -> RunConfig:
        read.append(path.parent.name)
        return thaw(path)

    monkeypatch.setattr(frozen, "thaw", counted)
    status_rows(planned)
    assert read == [], "an unchanged config is not read again"
    moved = lab.runs_dir.rename(lab.runs_dir.with_name("moved"))
    load_study(moved, "mine")
    assert sorted(read) == sorted(config.name for config in [*arms, *full_runs])


# --------------------------------------------------------------------------------------------------- uneven variants


def test_a_better_variant_that_lacks_seeds_is_not_the_baseline_but_is_reported(lab: Lab) -> None:
    many = full(lab, "2e-3", {0: 3.0, 1: 3.0, 2: 3.0})
    study = lab.study(*many, *full(lab, "1e-3", {1: 2.9}), *relora(lab, {0: 3.2, 1: 3.2, 2: 3.2}))
    assert baselines(study) == {config.trainer.seed: config.name for config in many}
    (remark,) = study.baseline_remarks()
    assert re.match(r"full lr=0\.001 is better .*the baseline full lr=0\.002", remark)
    assert "(2.9000 against 3.0000, over seed 1)" in remark
    assert "no run of seed 0, 2" in remark
    assert "train the missing runs" in remark


def test_variants_are_compared_over_the_seeds_that_the_study_needs(lab: Lab) -> None:
    """A study of one seed takes the best rate at this seed, also if another rate has more seeds in the runs_dir."""
    full(lab, "2e-3", {0: 3.0, 1: 2.0, 2: 2.0})
    (best,) = full(lab, "1e-3", {0: 2.9})
    assert baselines(lab.study(*relora(lab, {0: 3.2}))) == {0: best.name}


def test_a_seed_that_the_chosen_variant_lacks_is_reported(lab: Lab) -> None:
    study = lab.study(
        *full(lab, "2e-3", {0: 3.0, 1: 3.0}), *full(lab, "1e-3", {2: 2.0}), *relora(lab, {0: 3.2, 1: 3.2, 2: 3.2})
    )
    assert baselines(study)[2] is None
    notes = [m.tokens.note for m in study.members if m.run.seed == 2 and m.baseline is None]
    assert all("no finished full-rank run" in note and "has only seeds 0, 1" in note for note in notes)


@pytest.mark.parametrize(
    ("losses", "needed", "best"),
    [
        ({"a": {0: 3.0}, "b": {0: 2.0}}, {0}, "b"),
        ({"a": {0: 3.0, 1: 3.0}, "b": {0: 2.0}}, {0, 1}, "a"),
        ({"a": {0: 3.0, 1: 1.0}, "b": {0: 2.0}}, {0}, "b"),
        ({"a": {0: math.nan}, "b": {0: 9.0}}, {0}, "b"),
        ({"b": {0: 9.0}, "a": {0: -math.inf}}, set(), "b"),
        ({"a": {0: 1.0, 1: math.nan}, "b": {0: 9.0}}, {0, 1}, "b"),
        ({"a": {0: 1.0, 7: math.nan}, "b": {0: 9.0}}, {0}, "a"),
        ({"a": {0: 3.0, 1: 2.0}, "b": {1: 2.5, 2: 1.0}}, {0, 1, 2}, "a"),
        ({"a": {0: math.nan}, "b": {0: math.inf}}, {0}, None),
        ({"a": {5: 2.0}, "b": {5: 1.0}}, {0}, "b"),
        ({"a": {}}, {0}, None),
        ({}, set(), None),
    ],
)
def test_the_best_on_validation(losses: dict[str, dict[int, float]], needed: set[int], best: str | None) -> None:
    assert best_on_validation(losses, needed) == best
    assert best_on_validation(dict(reversed(losses.items())), needed) == best


# ------------------------------------------------------------------------------------------------ curves over seconds


@pytest.mark.parametrize("recorded", [True, False])
def test_a_curve_over_seconds_has_every_evaluation_even_if_its_time_is_not_recorded(recorded: bool, lab: Lab) -> None:
    """The evaluations are at steps 10, 20, 30, 40. The times are logged at steps 15, 30, 40."""
    full_rank = lab.config(*FULL)
    lab.run(*FULL, loss=3.0, seconds=100.0)
    file = lab.runs_dir / full_rank.name / "metrics.jsonl"
    rows = [{**row_metrics(row), "step": row["step"], "time_ms": 0} for row in read_rows(file)]
    for row in rows:
        if not recorded and row["step"] in (10, 20):
            del row["perf/training_seconds"]
    if not recorded:
        rows.append({"step": 15, "time_ms": 0, "perf/training_seconds": 37.5})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = lab.study(full_rank, lab.run(*RELORA, loss=3.1, seconds=37.5))
    (member,) = (member for member in study.members if member.label == "relora")
    assert member.baseline is not None
    assert [x for x, _ in member.baseline.curve("seconds")] == [0.0, 25.0, 50.0, 75.0, 100.0]
    assert member.seconds.kind == "curve"
    between = 4.5 + (4.0 - 4.5) * math.log(37.5 / 25) / math.log(50 / 25)
    assert member.seconds.loss == pytest.approx(3.1 - between)


# --------------------------------------------------------------------------------------------------------- divergence

NAN = {"eval_loss": math.nan, "eval_perplexity": math.nan, "test_loss": math.nan, "test_perplexity": math.nan}


def test_a_baseline_that_diverged_never_wins(lab: Lab) -> None:
    diverged = lab.run(*FULL, "optimizer.learning_rate=1e-3", summary=NAN)
    (good,) = full(lab, "2e-3", {0: 3.0})
    study = lab.study(diverged, good, *relora(lab, {0: 3.2}))
    assert baselines(study) == {0: good.name}
    rows = {row.run: row for row in status_rows(of_manifest(lab.runs_dir, "mine"))}
    assert rows[diverged.name].gap_to_full is None
    assert "diverged" in render_plain([rows[diverged.name]])


def test_there_is_no_gap_if_every_full_rank_run_diverged_and_the_note_says_so(lab: Lab) -> None:
    study = lab.study(lab.run(*FULL, summary=NAN), *relora(lab, {0: 3.2}))
    (member,) = (member for member in study.members if not member.run.diverged)
    assert member.tokens.relative is None
    assert "all diverged" in member.tokens.note
    assert study.full_rank() is None


@pytest.mark.slow
def test_an_arm_that_diverged_is_never_the_best_and_is_shown_as_diverged(lab: Lab) -> None:
    diverged = lab.run(*RELORA, "method.rank=8", summary=NAN)
    one_seed = [lab.run(*RELORA, "method.rank=16", f"trainer.seed={seed}", loss=2.0) for seed in (0, 1)]
    lab.run(*RELORA, "method.rank=16", "trainer.seed=2", summary=NAN)
    one_seed.append(lab.config(*RELORA, "method.rank=16", "trainer.seed=2"))
    good = relora(lab, {0: 3.2, 1: 3.2, 2: 3.2}, "method.rank=4")
    study = lab.study(diverged, *one_seed, *good, *full(lab, "2e-3", {0: 3.0, 1: 3.0, 2: 3.0}))
    best = study.best()
    assert best is not None
    assert best.config is not None
    assert best.config.rank == 4
    folder = write_report(study, lab.runs_dir)
    page = (folder / "report.md").read_text()
    table = page.partition("## Arms")[2].partition("\n## ")[0]
    (row,) = (line for line in table.splitlines() if "rank=8" in line)
    assert "diverged" in row
    assert "| nan" not in page
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {diverged.name}"))
    assert "diverged" in row
    assert "NaN" not in as_json(study)
