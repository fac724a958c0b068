"""A study in the MLflow UI, at the link that `relora ui` prints."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import PAGE_SECONDS, SCREEN, Ui, plots, setting
from mlflow import MlflowClient
from small import eventually

from relora.config.compose import compose
from relora.launching.launch import launch_study
from relora.studies.compare import Study, load_study
from relora.studies.sweeps import expand
from relora.studies.view import gap_metric

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc"),
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sweep of two ranks and two intervals."""
    return [
        *setting(tmp_path_factory.mktemp("study")),
        "method.rank=2,4",
        "method.reset_interval_steps=8,16",
        "study=ranks",
        "cluster=debug",
    ]


@pytest.fixture(scope="module")
def study(overrides: list[str]) -> Study:
    """The study with finished runs."""
    assert launch_study(expand(overrides), overrides)
    return load_study(Path(expand(overrides).runs[0].runs_dir), "ranks")


@pytest.fixture(scope="module")
def ui(study: Study) -> Iterator[Ui]:
    """A running UI."""
    with Ui(study.members[0].run.path.parent) as started:
        yield started


@pytest.fixture(scope="module")
def links(ui: Ui) -> dict[str, Any]:
    """The links that the UI prints."""
    return ui.links()


@pytest.fixture(scope="module")
def link(links: dict[str, Any]) -> str:
    """The link to the prepared view."""
    return links["studies"]["ranks"]


CELLS = "return [...document.querySelectorAll('[role=gridcell]')].map(cell => cell.innerText.split('\\n').pop())"
"""The texts of all cells. The cell of a run has one more line for its colour."""


HEADER = """
const left = cell => cell.getBoundingClientRect().left;
const cells = [...document.querySelectorAll('[role=columnheader][col-id]')];
return cells.sort((a, b) => left(a) - left(b)).map(cell => cell.innerText.trim());
"""
"""The column names from left to right. Their order in the document differs from the order on the screen."""


PARALLEL_LINES = """
for (const axes of document.querySelectorAll('[class*=parcoords]')) {
  const key = Object.keys(axes).find(name => name.startsWith('__reactFiber$'));
  for (let node = axes[key]; node; node = node.return) {
    const data = node.memoizedProps && node.memoizedProps.data;
    if (Array.isArray(data)) return JSON.parse(JSON.stringify(data));
  }
}
return null;
"""
"""The lines are drawn on a canvas. Their values are in the records that React has."""


def best_first(study: Study) -> list[str]:
    return [m.run.name for m in sorted(study.members, key=lambda m: m.run.summary["test_perplexity"])]


def test_the_table_shows_the_runs_in_the_order_of_their_perplexity(
    study: Study, link: str, page: Any, screenshots: Path
) -> None:
    page.set_window_size(2600, 1000)  # a column out of view is not drawn
    columns = [
        "method.name",
        "method.rank",
        "method.reset_interval_steps",
        "summary/test_perplexity",
        gap_metric("ranks"),
        "summary/eval_perplexity",
    ]

    def cells() -> list[str] | None:
        found = page.execute_script(CELLS)
        return found if set(best_first(study)) <= set(found) else None

    def shown_in_order() -> list[str] | None:
        # Each try loads the page again. The grid of MLflow 3.17 saves its first order after 250 ms. If the prepared
        # view is not applied by then, the columns are in alphabetical order until the page is loaded again.
        page.get(link.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
        shown = eventually(cells, "a row for every run", PAGE_SECONDS)
        return shown if [name for name in page.execute_script(HEADER) if name in columns] == columns else None

    shown = eventually(shown_in_order, f"the columns {columns} from left to right", PAGE_SECONDS)
    page.save_screenshot(str(screenshots / "study_table.png"))
    names = [text for text in shown if text in best_first(study)]
    assert names == best_first(study), "sorted by test perplexity"
    for member in study.members:
        figures = [member.run.summary[key] for key in ("test_perplexity", "eval_perplexity", "peak_memory_bytes")]
        if member.tokens.relative:
            figures.append(100 * member.tokens.relative)
        for value in figures:
            assert any(text.startswith(f"{value:.10f}"[:7]) for text in shown), (member.run.name, value)


def test_the_charts_are_drawn(study: Study, link: str, page: Any, screenshots: Path) -> None:
    page.set_window_size(1600, 1800)
    page.get(link)
    runs = len(study.members)

    def perplexity_over_tokens() -> dict[str, Any] | None:
        found = [
            plot for plot in plots(page) if plot["axis"] == "progress/tokens" and "eval/perplexity" in plot["card"]
        ]
        return found[0] if found and len(found[0]["lines"]) >= runs else None

    plot = eventually(perplexity_over_tokens, "a curve of every run", PAGE_SECONDS)
    page.save_screenshot(str(screenshots / "study_charts.png"))
    by_tokens = {tuple(point) for curve in plot["curves"] for point in curve}
    for member in study.members:
        tokens, _ = member.run.curve("tokens")[-1]
        assert any(x == tokens and y == pytest.approx(member.run.summary["eval_perplexity"]) for x, y in by_tokens)
    body = page.find_element("tag name", "body").text
    for text in ("what matters", "Parallel Coordinates", gap_metric("ranks"), f"{runs} matching runs"):
        assert text in body
    lines = eventually(lambda: page.execute_script(PARALLEL_LINES), "the parallel coordinates", PAGE_SECONDS)
    perplexities = [line["summary/test_perplexity"] for line in lines]
    assert sorted(perplexities) == pytest.approx(sorted(m.run.summary["test_perplexity"] for m in study.members))
    full_rank = [member for member in study.members if member.run.config and member.run.config.method.name == "full"]
    assert [line["method.rank"] for line in lines].count("0") == len(full_rank) > 0, (
        "the lines of full rank are drawn too"
    )


def test_the_client_finds_the_study_and_its_gaps(study: Study, overrides: list[str]) -> None:
    config = compose([item for item in overrides if "," not in item])
    client = MlflowClient(config.mlflow_uri)
    experiment = client.get_experiment_by_name(config.tracker.experiment)
    assert experiment is not None
    found = client.search_runs(
        [experiment.experiment_id], "tags.`study.ranks` = '1'", order_by=["metrics.`summary/test_perplexity` ASC"]
    )
    assert [run.info.run_name for run in found] == best_first(study)
    for member in study.members:
        recorded = next(run for run in found if run.info.run_name == member.run.name).data
        assert recorded.metrics[gap_metric("ranks")] == pytest.approx(100 * (member.tokens.relative or 0.0))
    report = client.search_runs([experiment.experiment_id], "tags.report_of = 'ranks'")
    assert len(report) == 1
    files = {Path(item.path).name for item in client.list_artifacts(report[0].info.run_id, "report")}
    assert {"report.md", "report.html", "results.csv", "heat_map.png", "memory.png", "memory.svg"} <= files


def test_the_report_page_is_readable(study: Study, browser: Any, screenshots: Path) -> None:
    page = study.members[0].run.path.parent / "studies" / "ranks" / "report" / "report.html"
    browser.set_window_size(*SCREEN)
    browser.get(page.as_uri())
    images = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(images) == 5
    assert all(complete and width > 300 for complete, width in images)
    body = browser.find_element("tag name", "body").text
    assert "Caution, rates not tuned" in body
    assert "use rank" not in body
    narrow = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == 400, "tables scroll, not the page"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(1600, 4000)
    browser.save_screenshot(str(screenshots / "report.png"))
