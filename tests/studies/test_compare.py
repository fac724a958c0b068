import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import FULL, RELORA, Lab
from scipy.stats import ttest_rel

from relora.cli import main as cli
from relora.common.errors import ConfigError
from relora.studies.compare import Study, labels_of, load_study
from relora.studies.report import answer, write_report


def cost(axis: str, value: float) -> dict[str, Any]:
    return {axis: value}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


def arm(study: Study, method: str) -> Any:
    return next(arm for arm in study.arms if arm.label.split()[0] == method)


# ------------------------------------------------------------------------------------------------------ equal tokens


def test_a_run_is_paired_with_the_full_rank_run_of_the_same_seed(lab: Lab) -> None:
    configs = []
    for seed, full, relora in ((0, 3.0, 3.2), (1, 3.5, 3.6), (2, 2.9, 3.2)):
        configs.append(lab.run(*FULL, f"trainer.seed={seed}", loss=full))
        configs.append(lab.run(*RELORA, f"trainer.seed={seed}", loss=relora))
    found = arm(lab.study(*configs), "relora")
    assert [member.tokens.loss for member in found.members] == pytest.approx([0.2, 0.1, 0.3])
    assert [member.baseline.config.trainer.seed for member in found.members] == [0, 1, 2]


def test_mean_and_interval_are_equal_to_a_paired_t_test(lab: Lab) -> None:
    pairs = [(3.0, 3.2), (3.5, 3.6), (2.9, 3.2), (3.1, 3.15)]
    configs = []
    for seed, (full, relora) in enumerate(pairs):
        configs += [lab.run(*FULL, f"trainer.seed={seed}", loss=full)]
        configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=relora)]
    gap = arm(lab.study(*configs), "relora").gap("tokens")
    reference = ttest_rel([relora for _, relora in pairs], [full for full, _ in pairs])
    interval = reference.confidence_interval(0.95)  # type: ignore[union-attr]
    assert gap.seeds == 4
    assert math.log1p(gap.relative) == pytest.approx(sum(b - a for a, b in pairs) / 4)
    assert (math.log1p(gap.low), math.log1p(gap.high)) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_there_is_no_interval_and_the_answer_says_so(lab: Lab, seeds: int) -> None:
    configs = [lab.run(*method, f"trainer.seed={seed}") for seed in range(seeds) for method in (FULL, RELORA)]
    study = lab.study(*configs)
    gap = arm(study, "relora").gap("tokens")
    assert (gap.low, gap.high, gap.seeds) == (None, None, seeds)
    assert any("no interval can be given" in line for line in answer(study))


def test_the_baseline_is_the_rate_that_is_best_on_validation_and_not_on_test(lab: Lab) -> None:
    good_on_test: dict[str, Any] = {"summary": {"test_loss": 1.0, "test_perplexity": math.e}}
    configs = [
        lab.run(*FULL, "optimizer.learning_rate=1e-3", loss=3.0),
        lab.run(*FULL, "optimizer.learning_rate=2e-3", loss=2.8),
        lab.run(*FULL, "optimizer.learning_rate=4e-3", loss=3.4, **good_on_test),
        lab.run(*RELORA, loss=2.9),
    ]
    found = arm(lab.study(*configs), "relora").members[0]
    assert found.baseline.config.optimizer.learning_rate == 2e-3
    assert found.tokens.loss == pytest.approx(0.1)


def test_a_full_rank_run_of_another_study_is_the_baseline_if_this_study_has_none(lab: Lab) -> None:
    full = lab.run(*FULL, loss=3.0)
    config = lab.run(*RELORA, loss=3.3)
    lab.study(config, full)
    manifest = lab.runs_dir / "studies" / "mine" / "study.json"
    values = json.loads(manifest.read_text())
    del values["runs"][full.name]
    manifest.write_text(json.dumps(values))
    found = load_study(lab.runs_dir, "mine").members[0]
    assert found.baseline is not None
    assert found.baseline.role == "other"
    assert found.tokens.loss == pytest.approx(0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        ("trainer.seed=1",),
        ("trainer.total_steps=50",),
        ("model=llama_20m",),
        ("trainer.precision=bf16",),
        ("trainer.sequences_per_step=32",),
        ("data.sequence_length_tokens=64",),
        ("method.warm_start_steps=5",),
    ],
)
def test_a_full_rank_run_of_another_setting_is_no_baseline(lab: Lab, other: tuple[str, ...]) -> None:
    lab.run(*FULL, *other)
    study = lab.study(lab.run(*RELORA))
    member = arm(study, "relora").members[0]
    assert member.baseline is None
    assert member.tokens.relative is None
    assert "no finished full-rank run" in member.tokens.note


# ------------------------------------------------------------------------------------------- equal FLOPs and seconds


@pytest.mark.parametrize(("axis", "budget"), [("flops", 8e8), ("seconds", 80.0)])
def test_at_equal_cost_a_run_that_ends_there_is_preferred_to_a_curve(lab: Lab, axis: str, budget: float) -> None:
    configs = [
        lab.run(*FULL, loss=3.0),
        lab.run(*FULL, "trainer.total_steps=30", loss=3.2, **cost(axis, budget * 1.005)),
        lab.run(*RELORA, loss=3.1, **cost(axis, budget)),
    ]
    gap = getattr(arm(lab.study(*configs), "relora").members[0], axis)
    assert gap.loss == pytest.approx(3.1 - 3.2)
    assert "whose schedule ends there" in gap.note


@pytest.mark.parametrize(("axis", "low", "high", "budget"), [("flops", 5e8, 1e9, 7e8), ("seconds", 50.0, 100.0, 70.0)])
def test_between_the_ends_of_two_runs_the_loss_is_interpolated_and_labelled(
    lab: Lab, axis: str, low: float, high: float, budget: float
) -> None:
    configs = [
        lab.run(*FULL, loss=3.0, **cost(axis, high)),
        lab.run(*FULL, "trainer.total_steps=20", loss=3.4, **cost(axis, low)),
        lab.run(*RELORA, loss=3.1, **cost(axis, budget)),
    ]
    gap = getattr(arm(lab.study(*configs), "relora").members[0], axis)
    expected = 3.4 + (3.0 - 3.4) * math.log(budget / low) / math.log(high / low)
    assert gap.loss == pytest.approx(3.1 - expected)
    assert gap.note.startswith("interpolated between full-rank runs")
    assert f"{low:.3g} and {high:.3g}" in gap.note


def test_a_curve_before_the_decay_of_the_rate_is_labelled_as_favourable(lab: Lab) -> None:
    configs = [lab.run(*FULL, loss=3.0, flops=1e9), lab.run(*RELORA, loss=3.1, flops=7.5e8)]
    gap = arm(lab.study(*configs), "relora").members[0].flops
    assert gap.loss == pytest.approx(3.1 - (3.0 + 2 * 0.25))
    assert re.search("before .*rate has decayed.* favours this arm", gap.note)


@pytest.mark.slow
def test_the_report_names_missing_full_rank_budgets_until_they_exist(lab: Lab) -> None:
    cheap = lab.run(*RELORA, loss=3.1, flops=7.5e8)
    dear = lab.run(*RELORA, "method.rank=8", loss=3.1, flops=1.25e9)
    full = lab.run(*FULL, loss=3.0, flops=1e9)
    command = "python run.py -m sweeps=baseline_budgets trainer.total_steps=30,50"
    assert command in (write_report(lab.study(cheap, dear, full), lab.runs_dir) / "report.md").read_text()
    lab.run(*FULL, "trainer.total_steps=30", flops=7.5e8)
    lab.run(*FULL, "trainer.total_steps=50", flops=1.25e9)
    assert "baseline_budgets" not in (write_report(lab.study(full), lab.runs_dir) / "report.md").read_text()


def test_a_budget_beyond_every_full_rank_run_has_no_gap(lab: Lab) -> None:
    configs = [lab.run(*FULL, flops=1e9), lab.run(*RELORA, flops=2e9)]
    gap = arm(lab.study(*configs), "relora").members[0].flops
    assert gap.relative is None
    assert re.search("no full-rank run .*used that many FLOPs", gap.note)


def test_wall_clock_is_not_compared_across_machines(lab: Lab) -> None:
    configs = [lab.run(*FULL, host="one"), lab.run(*RELORA, host="other")]
    member = arm(lab.study(*configs), "relora").members[0]
    assert member.seconds.relative is None
    assert re.fullmatch(r"wall-clock: another machine .*\(host other against one\)", member.seconds.note)
    assert member.tokens.relative is not None


def test_tokens_to_the_baselines_loss_end_at_the_first_evaluation_that_reached_it(lab: Lab) -> None:
    configs = [lab.run(*FULL, loss=3.5), lab.run(*RELORA, loss=2.5), lab.run(*RELORA, "method.rank=8", loss=3.6)]
    study = lab.study(*configs)
    better, worse = (arm.members[0] for arm in study.arms if arm.label.split()[0] == "relora")
    # From 4.5 down to 2.5 in four evaluations: 3.5 is reached at the second.
    assert better.tokens_to_baseline == 20 * configs[1].tokens_per_step
    assert worse.tokens_to_baseline is None


@pytest.mark.slow
def test_too_few_evaluations_cannot_show_when_the_baselines_loss_was_reached(lab: Lab) -> None:
    ends: dict[str, Any] = {"validation_interval_steps": 40}
    configs = [lab.run(*FULL, loss=3.5), lab.run(*RELORA, loss=2.5, **ends)]
    configs.append(lab.run(*RELORA, "method.rank=8", loss=3.6, **ends))
    study = lab.study(*configs)
    better, worse = (arm.members[0] for arm in study.arms if arm.label.split()[0] == "relora")
    assert (better.tokens_to_baseline, better.evaluated_too_rarely) == (None, True)
    assert (worse.tokens_to_baseline, worse.evaluated_too_rarely) == (None, False)
    text = (write_report(study, lab.runs_dir) / "report.md").read_text()
    assert re.search("fewer than 4 evaluations .*cannot show when", text)
    rows = [line for line in text[text.index("## Runs\n") :].splitlines() if "| relora" in line]
    assert ["never" in row for row in rows] == ["rank=8" in row for row in rows]


# --------------------------------------------------------------------------------------------------- uneven studies


@pytest.mark.slow
def test_a_seed_without_a_baseline_is_named_and_the_report_is_written(lab: Lab) -> None:
    configs = [lab.run(*FULL, f"trainer.seed={seed}", loss=3.0) for seed in (0, 1)]
    configs.append(lab.run(*FULL, "trainer.seed=2", state="failed", message="no luck"))
    configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=3.2) for seed in range(3)]
    study = lab.study(*configs)
    assert arm(study, "relora").gap("tokens").seeds == 2
    page = (write_report(study, lab.runs_dir) / "report.md").read_text()
    assert "+22.1% ± 0.0% of 2 seeds" in page
    alone = page.partition("## Runs without a baseline")[2].partition("##")[0]
    assert configs[-1].name in alone
    assert "no finished full-rank run" in alone
    assert "2 of 2 never" in page


def test_the_best_arm_is_chosen_over_the_seeds_that_all_arms_have(lab: Lab) -> None:
    configs = [lab.run(*FULL, f"trainer.seed={seed}", loss=3.0 + seed) for seed in range(3)]
    configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=2.9 + seed) for seed in range(3)]
    configs += [lab.run(*RELORA, "method.rank=8", loss=3.05)]
    best = lab.study(*configs).best()
    assert best is not None
    assert best.label == "relora rank=32"


def test_a_baseline_with_more_seeds_is_preferred(lab: Lab) -> None:
    configs = [lab.run(*FULL, "optimizer.learning_rate=1e-3", f"trainer.seed={seed}", loss=3.0) for seed in range(3)]
    configs += [lab.run(*FULL, "optimizer.learning_rate=2e-3", loss=2.9)]
    configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=3.2) for seed in range(3)]
    gap = arm(lab.study(*configs), "relora").gap("tokens")
    assert (gap.seeds, math.log1p(gap.relative)) == (3, pytest.approx(0.2))


@pytest.mark.slow
def test_several_settings_are_answered_one_by_one(lab: Lab) -> None:
    configs = []
    for model, full, relora in (("llama_9m", 3.0, 3.1), ("llama_20m", 2.0, 2.3)):
        configs += [lab.run(*FULL, f"model={model}", loss=full), lab.run(*RELORA, f"model={model}", loss=relora)]
    sentences = answer(lab.study(*configs))
    assert any(line.startswith("llama_9m, 40 steps: Best") and "+10.5%" in line for line in sentences)
    assert any(line.startswith("llama_20m, 40 steps: Best") and "+35.0%" in line for line in sentences)


def test_runs_on_different_text_are_not_paired(lab: Lab) -> None:
    full = lab.run(*FULL, corpus={"corpus_digest": "a"})
    relora = lab.run(*RELORA, corpus={"corpus_digest": "b"})
    assert arm(lab.study(full, relora), "relora").members[0].baseline is None


def test_wall_clock_is_not_compared_across_devices(lab: Lab) -> None:
    configs = [lab.run(*FULL, device="cpu"), lab.run(*RELORA, device="NVIDIA H200")]
    assert "another machine or device" in arm(lab.study(*configs), "relora").members[0].seconds.note


def test_a_curve_is_not_read_outside_its_evaluations(lab: Lab) -> None:
    configs = [lab.run(*FULL, flops=1e9), lab.run(*RELORA, flops=1e8)]
    gap = arm(lab.study(*configs), "relora").members[0].flops
    assert gap.relative is None
    assert re.search("first evaluation .*is after that budget", gap.note)


def test_a_mean_does_not_mix_gaps_that_were_measured_in_different_ways(lab: Lab) -> None:
    configs = [lab.run(*FULL, f"trainer.seed={seed}", flops=1e9) for seed in range(3)]
    configs += [lab.run(*FULL, "trainer.total_steps=30", flops=7.5e8, loss=3.5)]
    configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=3.1, flops=7.5e8) for seed in range(3)]
    gap = arm(lab.study(*configs), "relora").gap("flops")
    assert (gap.seeds, math.log1p(gap.relative)) == (2, pytest.approx(3.1 - 3.5))


@pytest.mark.slow
def test_a_report_is_written_if_a_perplexity_is_infinite(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    wild = {"test_loss": 1000.0, "test_perplexity": math.inf, "eval_loss": 1000.0, "eval_perplexity": math.inf}
    lab.study(lab.run(*FULL), lab.run(*RELORA, summary=wild), lab.run(*RELORA, "method.rank=8"))
    assert cli.main(["report", "--json", "mine", f"runs_dir={lab.runs_dir}"]) == 0
    values = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["arms"][1]["gap_at_equal_tokens"]["relative"] is None


def test_labels_show_the_name_of_a_model_or_its_sizes_if_the_names_are_equal(lab: Lab) -> None:
    overrides = (("model=llama_9m",), ("model=llama_20m",), ("model=llama_20m", "model.layers=2"))
    configs = [lab.config(*FULL, *chosen) for chosen in overrides]
    assert list(labels_of(configs[:2]).values()) == ["full model=llama_9m", "full model=llama_20m"]
    assert len(set(labels_of(configs).values())) == 3
    assert list(labels_of(configs[1:]).values()) == ["full layers=4", "full layers=2"]


def test_the_label_of_an_arm_without_restarts_says_never(lab: Lab) -> None:
    configs = [lab.config(*RELORA[:2], f"method.reset_interval_steps={steps}") for steps in ("20", "null")]
    assert list(labels_of(configs).values()) == ["relora interval=20", "relora interval=never"]


def test_arms_that_differ_in_alpha_have_different_labels(lab: Lab) -> None:
    study = lab.study(*(lab.run(*RELORA, f"method.alpha={alpha}") for alpha in (8, 16)))
    assert {arm.label for arm in study.arms if arm.label.split()[0] == "relora"} == {
        "relora alpha=8",
        "relora alpha=16",
    }


@pytest.mark.parametrize("content", ["- a\n- list\n", "a: [1\n", "method: {name: other}\n", ""])
def test_an_odd_folder_in_runs_dir_does_not_break_a_study(lab: Lab, content: str) -> None:
    odd = lab.runs_dir / "odd"
    odd.mkdir(parents=True)
    (odd / "config.yaml").write_text(content)
    (odd / "status.json").write_text('{"state": "finished", "unknown": 1}')
    assert len(lab.study(lab.run(*FULL), lab.run(*RELORA)).members) == 2


# -------------------------------------------------------------------------------------------------- nothing is dropped


@pytest.mark.slow
def test_runs_that_failed_diverged_stopped_or_did_not_start_are_named(lab: Lab) -> None:
    configs = [
        lab.run(*FULL),
        lab.run(*RELORA),
        lab.run(*RELORA, "method.rank=8", state="failed", message="the run diverged"),
        lab.run(*RELORA, "method.rank=4", state="interrupted", message="SIGTERM after step 3"),
        lab.run(*RELORA, "method.rank=2", state="running"),
        lab.config(*RELORA, "method.rank=1"),
    ]
    study = lab.study(*configs)
    outcomes = {member.run.name: (member.run.state, member.run.message) for member in study.unfinished}
    assert outcomes[configs[2].name] == ("failed", "the run diverged")
    assert outcomes[configs[3].name] == ("interrupted", "SIGTERM after step 3")
    assert outcomes[configs[4].name][0] == "interrupted", "no process trains it"
    assert outcomes[configs[5].name] == ("missing", "it was never started")
    page = (write_report(study, lab.runs_dir) / "report.md").read_text()
    for config in configs:
        assert config.name in page
    assert "the run diverged" in page


def test_a_study_with_only_failed_runs_has_a_report(lab: Lab) -> None:
    study = lab.study(lab.run(*RELORA, state="failed", message="no luck"))
    page = (write_report(study, lab.runs_dir) / "report.md").read_text()
    assert "no luck" in page
    assert "There is no finished full-rank run" in page


def test_the_error_about_an_unknown_study_names_the_known_studies(lab: Lab) -> None:
    lab.study(lab.run(*RELORA))
    with pytest.raises(ConfigError, match=r"study other does not exist in .*: mine\."):
        load_study(lab.runs_dir, "other")


# ---------------------------------------------------------------------------------------------------------- the report


def ranks_and_intervals(lab: Lab, values: Callable[[int, int], float]) -> Study:
    configs = [lab.run(*FULL, f"trainer.seed={seed}", loss=3.0) for seed in range(3)]
    for rank in (4, 8):
        for interval in (10, 20):
            for seed in range(3):
                overrides = (f"method.rank={rank}", f"method.reset_interval_steps={interval}", f"trainer.seed={seed}")
                config = lab.run(*RELORA, *overrides, loss=values(rank, interval) + 0.01 * seed)
                configs.append(config)
    return lab.study(*configs)


@pytest.mark.slow
def test_the_report_names_the_best_rank_and_interval_and_the_gap(lab: Lab) -> None:
    study = ranks_and_intervals(lab, lambda rank, interval: 3.1 if (rank, interval) == (8, 10) else 3.4)
    headline = "\n".join(answer(study))
    assert re.search("use rank 8 .*restart every 10 steps", headline)
    gap = math.expm1(0.11)
    assert re.search(re.escape(f"{gap:+.1%} ± ") + r"\d\.\d% \[", headline)
    assert "0.60 times the trainable parameters" in headline
    folder = write_report(study, lab.runs_dir)
    names = {path.name for path in folder.iterdir()}
    pictures = {"gaps.png", "heat_map.png", "curves.png", "schedule.png"}
    for_print = {name.replace(".png", ".svg") for name in pictures}
    assert names == {"report.md", "report.html", "results.csv"} | pictures | for_print
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert 'src="http' not in html
    assert "Which one?" in html


@pytest.mark.slow
def test_the_runs_table_has_the_values_of_the_runs(lab: Lab) -> None:
    configs = []
    for seed, (full, relora) in enumerate([(3.0, 3.2), (3.0, 3.1)]):
        configs += [lab.run(*FULL, f"trainer.seed={seed}", loss=full)]
        configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=relora)]
    study = lab.study(*configs, lab.run(*RELORA, "trainer.seed=7", loss=3.2))
    text = (write_report(study, lab.runs_dir) / "report.md").read_text()
    head, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text[text.index("## Runs\n") :].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    for cells in rows:
        row = dict(zip(head, cells, strict=True))
        member = next(member for member in study.members if member.run.name == row["run"])
        if not member.run.finished:
            assert set(list(row.values())[5:]) == {"-"}
            continue
        for column, gap in (("tokens", member.tokens), ("FLOPs", member.flops), ("wall-clock", member.seconds)):
            assert row[f"gap, equal {column}"].startswith("-" if gap.relative is None else f"{gap.relative:+.1%}")
        assert row["trainable"] == f"{member.run.summary['trainable_parameters'] / 1e6:.2f}M"
        assert row["peak memory"] == f"{member.run.summary['peak_memory_bytes'] / 2**20:,.0f} MiB"
        reached = member.tokens_to_baseline
        assert row["tokens to full rank's loss"] == (
            "-" if member.baseline is None else "never" if reached is None else f"{reached:,}"
        )
    spread = (math.expm1(0.2) - math.expm1(0.1)) / math.sqrt(2)
    assert f"{math.expm1(0.15):+.1%} ± {spread:.1%} of 2 seeds" in text
    marks = set(re.findall(r"\(([a-z]+)\)", text[text.index("## Runs\n") :]))
    assert marks
    assert all(f"- ({mark}) " in text for mark in marks)


@pytest.mark.slow
def test_the_csv_has_every_run_and_can_be_read_again(lab: Lab) -> None:
    study = ranks_and_intervals(lab, lambda rank, interval: 3.2)
    with (write_report(study, lab.runs_dir) / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    for row in rows:
        member = next(member for member in study.members if member.run.name == row["run"])
        assert float(row["test_perplexity"]) == member.run.summary["test_perplexity"]
        assert float(row["gap_at_equal_tokens"]) == pytest.approx(member.tokens.relative)


def test_a_label_shows_the_values_that_differ_between_arms_of_a_method(lab: Lab) -> None:
    study = ranks_and_intervals(lab, lambda rank, interval: 3.2)
    assert [arm.label for arm in study.arms] == [
        "full",
        "relora rank=4 interval=10",
        "relora rank=4 interval=20",
        "relora rank=8 interval=10",
        "relora rank=8 interval=20",
    ]


def test_the_text_of_a_message_is_not_html(lab: Lab) -> None:
    study = lab.study(lab.run(*RELORA, state="failed", message="<script>alert(1)</script>"))
    assert "<script>" not in (write_report(study, lab.runs_dir) / "report.html").read_text()


@pytest.mark.slow
def test_a_second_report_replaces_the_first(lab: Lab) -> None:
    study = lab.study(lab.run(*FULL), lab.run(*RELORA))
    folder = write_report(study, lab.runs_dir)
    (folder / "stale.png").write_text("old")
    assert write_report(study, lab.runs_dir) == folder
    assert not (folder / "stale.png").exists()
    assert [path.name for path in folder.parent.glob("report*")] == ["report"]


@pytest.mark.slow
def test_relora_report_prints_the_answer_or_json(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.study(lab.run(*FULL, loss=3.0), lab.run(*RELORA, loss=3.2))
    where = f"runs_dir={lab.runs_dir}"
    assert cli.main(["report", "mine", where]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\+22\.1% against full rank .*equal tokens", text)
    assert "report.html" in text
    assert cli.main(["report", "--json", "mine", where]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["study"] == "mine"
    assert values["arms"][1]["gap_at_equal_tokens"]["relative"] == pytest.approx(math.expm1(0.2))
    assert cli.main(["report", "other", where]) == 2
    assert "the studies there: mine" in capsys.readouterr().err
