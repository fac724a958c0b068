"""The pictures of a report: what they draw is what the runs reached."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import FULL, RELORA, Lab
from matplotlib.figure import Figure

from relora.config.plan import run_plan
from relora.studies import curves, memory_picture
from relora.studies.curves import draw_curves, over_seeds, smoothed
from relora.studies.drawing import log_scale, save
from relora.studies.memory_picture import draw_memory, label_places, points

LORA = ("method=lora",)
GALORE = ("method=galore",)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


def with_bytes(lab: Lab, *overrides: str, **changes: Any) -> Any:
    """A run that has recorded the bytes of its plan, as training does."""
    plan = run_plan(lab.config(*overrides))
    return lab.run(*overrides, **changes, summary={"state_bytes": plan.state_bytes})


# ------------------------------------------------------------------------------------------------------------ curves


def test_an_arm_is_the_mean_of_its_seeds_and_the_band_spans_them(lab: Lab) -> None:
    losses = {0: 3.0, 1: 3.2, 2: 3.1}
    study = lab.study(*(lab.run(*RELORA, f"trainer.seed={seed}", loss=loss) for seed, loss in losses.items()))
    figure = draw_curves(study)
    assert figure is not None
    axes = figure.axes[2]
    (line,) = axes.get_lines()
    ends = [math.exp(loss) for loss in losses.values()]
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert y[-1] == pytest.approx(sum(ends) / 3)
    (band,) = axes.collections
    edge = np.asarray(band.get_paths()[0].vertices)
    last = edge[edge[:, 0] == x[-1]][:, 1]
    assert (last.min(), last.max()) == (pytest.approx(min(ends)), pytest.approx(max(ends)))


def test_one_seed_has_no_band_and_an_unfinished_seed_is_not_in_the_mean(lab: Lab) -> None:
    done, failed = lab.run(*RELORA, loss=3.0), lab.run(*RELORA, "trainer.seed=1", loss=9.0, state="failed")
    figure = draw_curves(lab.study(done, failed))
    assert figure is not None
    axes = figure.axes[2]
    assert not axes.collections
    assert np.asarray(axes.get_lines()[0].get_ydata())[-1] == pytest.approx(math.exp(3.0))


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=300))
def test_a_smoothed_curve_is_the_moving_mean(values: list[float]) -> None:
    width = max(1, round(curves.SMOOTHED_SHARE * len(values)))
    found = smoothed({step: (10.0 * step, value) for step, value in enumerate(values)})
    kernel = np.ones(width) / width
    assert [y for _, y in found.values()] == pytest.approx(np.convolve(values, kernel, "valid").tolist(), abs=1e-9)
    xs = np.convolve(10.0 * np.arange(len(values)), kernel, "valid")
    assert [x for x, _ in found.values()] == pytest.approx(xs.tolist())


def test_a_long_curve_is_thinned(lab: Lab) -> None:
    found = smoothed({step: (float(step), 0.0) for step in range(100_000)})
    assert curves.MOST_POINTS / 2 < len(found) <= curves.MOST_POINTS


def test_seeds_meet_at_the_steps_that_all_have() -> None:
    found = over_seeds([{1: (10.0, 4.0), 2: (20.0, 2.0)}, {2: (30.0, 4.0), 3: (40.0, 1.0)}])
    assert found == [(25.0, 3.0, 2.0, 4.0)]


def test_the_first_losses_do_not_set_the_limits(lab: Lab) -> None:
    figure = draw_curves(lab.study(lab.run(*RELORA, loss=3.0, validation_interval_steps=10)))
    assert figure is not None
    # The evaluation at step 0 has exp(5): it is not drawn, and does not set the limits.
    low, high = figure.axes[2].get_ylim()
    assert low < math.exp(3.0) < math.exp(4.5) < high < math.exp(5.0)


@pytest.mark.parametrize(("low", "high"), [(41.6, 53.0), (20.0, 95.0), (18.0, 900.0), (3.0, 40_000.0), (15.2, 15.9)])
def test_log_axes_have_several_plain_ticks(low: float, high: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [low, high])
    log_scale(axes)
    figure.canvas.draw()
    inside = [
        label.get_text()
        for label, tick in zip(axes.yaxis.get_ticklabels(), axes.yaxis.get_ticklocs(), strict=True)
        if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
    ]
    assert 3 <= len(inside) <= 14
    assert all(float(text.replace(",", "")) > 0 for text in inside)


# ------------------------------------------------------------------------------------------------------------ memory


def test_a_point_has_the_memory_of_the_plan_and_the_mean_of_the_seeds(lab: Lab) -> None:
    configs = [with_bytes(lab, *FULL, loss=3.0)]
    configs += [with_bytes(lab, *GALORE, f"trainer.seed={seed}", loss=3.2 + seed / 10) for seed in range(2)]
    study = lab.study(*configs)
    full, galore = points(study)
    assert (full.is_full_rank, galore.is_full_rank) == (True, False)
    assert galore.state_bytes == run_plan(configs[1]).state_bytes
    assert galore.perplexity == pytest.approx((math.exp(3.3) + math.exp(3.4)) / 2)
    figure = draw_memory(study)
    assert figure is not None
    (axes,) = figure.axes
    (dashed,) = (line for line in axes.get_lines() if line.get_linestyle() == "--")
    assert np.asarray(dashed.get_ydata()).tolist() == pytest.approx([math.exp(3.1)] * 2)
    assert {text.get_text() for text in axes.texts} == {"full", "galore"}
    assert axes.get_xlabel().endswith("(MiB)")


def test_only_the_baseline_of_several_full_rank_rates_has_a_point(lab: Lab) -> None:
    rates = [with_bytes(lab, *FULL, f"optimizer.learning_rate={rate}", loss=3 + rate) for rate in (0.01, 0.02, 0.04)]
    study = lab.study(*rates, with_bytes(lab, *GALORE, loss=3.2))
    assert [point.is_full_rank for point in points(study)] == [True, False]
    assert points(study)[0].perplexity == pytest.approx(math.exp(3.11))


def test_a_run_of_an_earlier_version_has_its_plan(lab: Lab) -> None:
    config = lab.config(*GALORE)
    plan = run_plan(config)
    as_planned = lab.run(*GALORE, summary={"parameters": plan.parameters})
    other_vocabulary = lab.run(*LORA, summary={"parameters": 12})
    found = points(lab.study(as_planned, other_vocabulary))
    assert [(point.label, point.state_bytes) for point in found] == [("galore", plan.state_bytes)]


def test_arms_of_one_size_have_no_picture(lab: Lab) -> None:
    rates = [with_bytes(lab, *LORA, f"optimizer.learning_rate={rate}") for rate in (0.01, 0.02)]
    assert draw_memory(lab.study(*rates)) is None


def test_a_diverged_seed_is_not_in_the_mean(lab: Lab) -> None:
    nothing = {"test_loss": math.inf, "test_perplexity": math.inf, "eval_loss": math.inf}
    config = lab.config(*GALORE)
    states = {"state_bytes": run_plan(config).state_bytes}
    study = lab.study(
        lab.run(*GALORE, loss=3.0, summary=states), lab.run(*GALORE, "trainer.seed=1", summary={**states, **nothing})
    )
    (point,) = points(study)
    assert point.perplexities == [pytest.approx(math.exp(3.1))]


def test_settings_have_parts_of_their_own(lab: Lab) -> None:
    sizes = [
        with_bytes(lab, *method, model) for model in ("model=llama_tiny", "model=llama_20m") for method in (FULL, LORA)
    ]
    figure = draw_memory(lab.study(*sizes))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["llama_tiny, 40 steps", "llama_20m, 40 steps"]


def test_the_warm_start_is_a_hollow_point(lab: Lab) -> None:
    warm = with_bytes(lab, "method=relora", "method.warm_start_steps=10", "method.reset_interval_steps=10")
    found = points(lab.study(warm, with_bytes(lab, *LORA)))
    assert [point.has_warm_start for point in found] == [True, False]


@given(
    at=st.lists(
        st.tuples(
            st.integers(10, int(memory_picture.WIDTH_POINTS) - 10),
            st.integers(20, int(memory_picture.HEIGHT_POINTS) - 20),
        ),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_labels_stay_inside_and_cover_each_other_only_where_points_do(at: list[tuple[int, int]]) -> None:
    widths = [50.0] * len(at)
    places = label_places([(float(x), float(y)) for x, y in at], widths, [False] * len(at))
    assert all(0 <= x <= memory_picture.WIDTH_POINTS - 50 for x, _ in places)
    far = all(abs(a[0] - b[0]) > 80 or abs(a[1] - b[1]) > 40 for a in at for b in at if a is not b)
    if far:
        height = memory_picture.FONT_POINTS
        for i, (x, y) in enumerate(places):
            for other_x, other_y in places[:i]:
                assert abs(x - other_x) >= 50 or abs(y - other_y) >= height


def test_two_points_side_by_side_have_labels_apart() -> None:
    first, second = label_places([(100.0, 100.0), (112.0, 100.0)], [60.0, 60.0], [False, False])
    assert abs(first[0] - second[0]) >= 60 or abs(first[1] - second[1]) >= memory_picture.FONT_POINTS


# ------------------------------------------------------------------------------------------------------------- files


def test_a_picture_is_saved_for_the_screen_and_for_print_with_the_same_bytes(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        figure = Figure()
        figure.subplots().plot([1, 2], [3, 4])
        save(figure, folder / "line")
    first, second = ((tmp_path / name / "line.svg").read_bytes() for name in "ab")
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert (tmp_path / "a" / "line.png").read_bytes().startswith(b"\x89PNG")
