"""Messages about rates that were not tuned and about results that are not plausible."""

from pathlib import Path

import pytest
from lab import FULL, RELORA, Lab

from relora.cli import main as cli
from relora.config.rates import NOT_TUNED
from relora.runs.metrics import MetricsLog
from relora.runs.results import Run
from relora.runs.state import ObservedState
from relora.studies.compare import Study
from relora.studies.doubts import rates_of, rise
from relora.studies.report import answer, write_report


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs", noted=True)


def line(study: Study, text: str) -> str:
    """Return the only line of the headline that contains `text`, or an empty string."""
    found = [sentence for sentence in answer(study) if text in sentence]
    assert len(found) < 2
    return found[0] if found else ""


def arm(study: Study, label: str):
    return next(arm for arm in study.arms if arm.label == label)


GRID = [(rank, interval) for rank in (8, 32) for interval in ("20", "null")]


def cells(lab: Lab, *overrides: str, loss: float = 3.1) -> list:
    return [
        lab.run(*RELORA, f"method.rank={rank}", f"method.reset_interval_steps={interval}", *overrides, loss=loss)
        for rank, interval in GRID
    ]


@pytest.mark.slow
def test_untuned_rates_are_reported_baseline_first_and_no_rank_is_recommended(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    study = lab.study(lab.run(*FULL, loss=3.0), *cells(lab))
    message = line(study, NOT_TUNED)
    assert message.index("full rank (full)") < message.index("relora")
    assert "trainer.total_steps=40, tuned at 600" in message
    assert line(study, "use rank") == ""
    page = (write_report(study, lab.runs_dir) / "report.md").read_text()
    assert page.count(f"| {NOT_TUNED} |") == 5
    assert cli.main(["status", "mine", f"runs_dir={lab.runs_dir}"]) in (0, 1)
    assert capsys.readouterr().out.count(NOT_TUNED) == 5


def test_many_untuned_arms_of_a_method_are_counted(lab: Lab) -> None:
    arms = [lab.run(*RELORA, f"method.rank={rank}", loss=3.1) for rank in range(2, 8)]
    message = line(lab.study(lab.run(*FULL, loss=3.0), *arms, lab.run("method=lora", loss=3.1)), NOT_TUNED)
    assert "full rank (full), 6 arms of relora, lora" in message


def test_rates_that_were_given_or_chosen_in_the_study_are_not_called_untuned(lab: Lab) -> None:
    hand = "optimizer.learning_rate=4e-3"
    study = lab.study(lab.run(*FULL, hand, loss=3.0), *cells(lab, hand))
    assert line(study, NOT_TUNED) == ""
    assert line(study, "use rank") != ""
    assert {rates_of(study, arm) for arm in study.arms} == {"rates set by hand"}
    ladder = [lab.run(*FULL, f"optimizer.learning_rate={rate}", loss=loss) for rate, loss in ((1e-3, 2.9), (2e-3, 2.8))]
    study = lab.study(*ladder, lab.run(*FULL, loss=3.0), lab.run(*RELORA), name="ladder")
    best = study.full_rank()
    assert best is not None
    assert rates_of(study, best).startswith("the best of")
    assert "full rank" not in line(study, NOT_TUNED)
    assert "relora" in line(study, NOT_TUNED)


def test_runs_of_an_older_version_are_not_called_untuned(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs")
    study = lab.study(lab.run(*FULL, loss=3.0), *cells(lab))
    assert line(study, NOT_TUNED) == ""
    assert line(study, "use rank") != ""


def test_an_arm_far_ahead_of_full_rank_is_reported_as_not_plausible(lab: Lab) -> None:
    study = lab.study(
        lab.run(*FULL, loss=3.0), lab.run(*RELORA, loss=2.95), lab.run(*RELORA, "method.rank=8", loss=2.99)
    )
    message = line(study, "ahead of full rank")
    assert "by more than 2%: relora rank=32 (4.9%). " in message
    assert "optimizer.learning_rate" in message
    assert "optimizer.embedding_learning_rate" in message


def test_arms_far_ahead_of_full_rank_are_reported_in_one_sentence(lab: Lab) -> None:
    study = lab.study(
        lab.run(*FULL, loss=3.0), lab.run(*RELORA, loss=2.95), lab.run(*RELORA, "method.rank=8", loss=2.9)
    )
    sentences = [sentence for sentence in answer(study) if "ahead of full rank" in sentence]
    assert len(sentences) == 1
    assert "rank=32 (4.9%)" in sentences[0]
    assert "rank=8 (9.5%)" in sentences[0]


def test_a_best_rate_at_the_edge_is_reported_and_one_inside_is_not(lab: Lab) -> None:
    losses = {1e-3: 3.0, 2e-3: 2.8, 4e-3: 3.4}
    configs = [lab.run(*FULL, f"optimizer.learning_rate={rate}", loss=loss) for rate, loss in losses.items()]
    inside = lab.study(*configs, lab.run(*RELORA, loss=2.9))
    assert line(inside, "that were tried") == ""
    beyond = lab.run(*FULL, "optimizer.learning_rate=5e-4", loss=2.5)
    message = line(lab.study(*configs, beyond, lab.run(*RELORA, loss=2.9)), "that were tried")
    assert "0.0005, is the lowest" in message
    assert "of the 4 that" in message
    assert "optimizer.learning_rate=0.00025" in message


def test_a_gap_within_the_spread_of_two_seeds_is_no_difference(lab: Lab) -> None:
    configs = []
    for seed, relora in ((0, 3.05), (1, 2.99)):
        configs += [lab.run(*FULL, f"trainer.seed={seed}", loss=3.0)]
        configs += [lab.run(*RELORA, f"trainer.seed={seed}", loss=relora)]
    assert "no difference is shown" in line(lab.study(*configs), "spread of its seeds")


@pytest.mark.parametrize(
    ("validation", "training", "kind"),
    [
        ([4.0, 3.0, 2.9], [5 - 0.03 * n for n in range(40)], None),
        ([4.0, 3.0, 3.1], [5 - 0.03 * n for n in range(40)], "validation"),
        ([4.0, 3.0, 2.9], [5 - 0.03 * n + (0.4 if 20 <= n < 30 else 0) for n in range(40)], "training"),
        ([], [3.0] * 40, None),
    ],
)
def test_a_loss_that_rises_after_the_warm_up_is_found(
    validation: list[float], training: list[float], kind: str | None, lab: Lab
) -> None:
    config = lab.config(*FULL)
    config.run_dir.mkdir(parents=True)
    with MetricsLog.opened(config.run_dir / "metrics.jsonl", exact=True) as log:
        for step, loss in enumerate(training, start=1):
            log.log(step, {"train/loss": loss})
        for number, loss in enumerate(validation, start=1):
            log.log(10 * number, {"eval/loss": loss})
    run = Run.of(config.run_dir, "arm", ObservedState(name="finished"))
    run.config = config
    found = rise(run)
    assert (found[0] if found else None) == kind
