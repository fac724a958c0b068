"""A study as a page: what came out, tables, pictures. The one importer of matplotlib."""

import base64
import csv
import html
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from relora.compare import Arm, Compared, Estimate, Gap, Run, Study, as_row, deviation, mean, study_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB, MIB = 2**30, 2**20
SMOOTHED_SHARE = 0.02
"""Of a training curve that each drawn point averages over."""
STYLES = ("-", "--", ":", "-.")


# ---------------------------------------------------------------------------------------------------------- the page


@dataclass
class Page:
    """Blocks that are written as Markdown and as HTML alike."""

    title: str
    blocks: list[tuple[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """A section begins."""
        self.blocks.append(("heading", text))

    def paragraph(self, text: str) -> None:
        """Running text."""
        self.blocks.append(("paragraph", text))

    def listing(self, items: Sequence[str]) -> None:
        """A bullet each."""
        self.blocks.append(("listing", list(items)))

    def code(self, text: str) -> None:
        """As it is typed."""
        self.blocks.append(("code", text))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are figures."""
        self.blocks.append(("table", (list(header), [list(row) for row in rows])))

    def figure(self, file: str, caption: str) -> None:
        """A picture beside the page."""
        self.blocks.append(("figure", (file, caption)))

    def markdown(self) -> str:
        """report.md."""
        return "\n\n".join([f"# {self.title}", *(_markdown(kind, content) for kind, content in self.blocks)]) + "\n"

    def html(self, folder: Path) -> str:
        """report.html, whole in one file."""
        body = "\n".join(_html(kind, content, folder) for kind, content in self.blocks)
        title = html.escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{CSS}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )


CSS = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:90rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;display:block;overflow-x:auto}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}figure{margin:1.5rem 0}"
    "figcaption{color:#555}pre{background:#f5f5f5;padding:.8rem;overflow-x:auto}"
)


def _markdown(kind: str, content: Any) -> str:
    if kind == "heading":
        return f"## {content}"
    if kind == "listing":
        return "\n".join(f"- {item}" for item in content)
    if kind == "code":
        return "\n".join(f"    {line}" for line in content.splitlines())
    if kind == "table":
        header, rows = content
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
        rule = ["---", *["---:"] * (len(header) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))
    if kind == "figure":
        return f"![{content[1]}]({content[0]})\n\n{content[1]}"
    return content


def _html(kind: str, content: Any, folder: Path) -> str:
    def escaped(text: str) -> str:
        return html.escape(text, quote=False)

    if kind == "heading":
        return f"<h2>{escaped(content)}</h2>"
    if kind == "listing":
        return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in content)}</ul>"
    if kind == "code":
        return f"<pre>{escaped(content)}</pre>"
    if kind == "table":
        header, rows = content
        head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if kind == "figure":
        data = base64.b64encode((folder / content[0]).read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(content[1])}">'
        return f"<figure>{image}<figcaption>{escaped(content[1])}</figcaption></figure>"
    return f"<p>{escaped(content)}</p>"


# ----------------------------------------------------------------------------------------------------------- figures


def draw_curves(study: Study) -> "Figure | None":
    """Training loss and validation perplexity, over tokens and over FLOPs."""
    drawn = [arm for arm in study.arms if any(len(member.run.rows) > 1 for member in arm.members)]
    if not drawn:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, axis in enumerate(("tokens", "flops")):
        for arm, style in zip(drawn, _styles(len(drawn)), strict=True):
            for number, member in enumerate(arm.members):
                label = arm.label if number == 0 else None
                axes[0, column].plot(*_training_curve(member.run, axis), label=label, lw=1, **style)
                points = [(x, math.exp(loss)) for x, loss in member.run.curve(axis) if x > 0 and loss < 20]
                axes[1, column].plot(*_columns(points), label=label, marker=".", lw=1.2, **style)
        axes[1, column].set_yscale("log")
        _plain_log_ticks(axes[1, column])
        axes[0, column].set_ylabel("training loss (nats)")
        axes[1, column].set_ylabel("validation perplexity")
        for row in (0, 1):
            axes[row, column].set_xlabel("training FLOPs" if axis == "flops" else "tokens")
            axes[row, column].xaxis.set_major_formatter(EngFormatter(sep=""))
            axes[row, column].grid(alpha=0.25)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def draw_schedule(study: Study) -> "Figure | None":
    """Learning rate over the updates, one run for each shape of schedule; restarts as marks."""
    shapes: dict[tuple[Any, ...], tuple[str, Run]] = {}
    for arm in study.arms:
        for member in arm.members[:1]:
            if member.run.config is not None and any("train/lr" in row for row in member.run.rows):
                shapes.setdefault(_shape(member.run), (arm.label, member.run))
    if not shapes:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots()
    for (label, run), style in zip(shapes.values(), _styles(len(shapes)), strict=True):
        rates = {row["step"]: row["train/lr"] for row in run.rows if "train/lr" in row}
        axes.plot(list(rates), list(rates.values()), label=label, lw=1.2, **style)
        restarts = [row["step"] for row in run.rows if "restart/number" in row]
        axes.plot(restarts, [0.0] * len(restarts), "|", color=style["color"], ms=12)
    axes.set_xlabel("update (marks: restarts)")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_gaps(study: Study) -> "Figure | None":
    """The gap of every arm, its seeds and its interval."""
    found = [(arm, arm.gap("tokens")) for arm in study.arms if arm.method != "full"]
    rows = [(arm, gap) for arm, gap in found if gap is not None and math.isfinite(gap.relative)]
    if not rows:
        return None
    from matplotlib.figure import Figure

    rows.sort(key=lambda row: row[1].relative, reverse=True)
    figure = Figure(figsize=(12, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (arm, gap) in enumerate(rows):
        axes.barh(y, 100 * gap.relative, color="#9ab8d4")
        if gap.low is not None and gap.high is not None:
            axes.plot([100 * gap.low, 100 * gap.high], [y, y], color="#1f3b57", lw=2)
        seeds = [100 * gap for member in arm.finished if (gap := member.tokens.relative) is not None]
        axes.plot(seeds, [y] * len(seeds), "o", color="#1f3b57", ms=4)
    axes.set_yticks(range(len(rows)), [arm.label for arm, _ in rows], fontsize=8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("test perplexity over full rank's, at equal tokens (%)")
    return figure


def draw_heat_map(study: Study) -> "Figure | None":
    """Gap (or, without a baseline, test perplexity) by rank and reset interval, where both or one are swept."""
    cells = heat_map(study)
    if cells is None:
        return None
    from matplotlib.figure import Figure

    ranks = sorted({rank for rank, _ in cells.values})
    intervals = sorted(
        {interval for _, interval in cells.values}, key=lambda value: math.inf if value is None else value
    )
    grid = [[cells.values.get((rank, interval), math.nan) for interval in intervals] for rank in ranks]
    figure = Figure(figsize=(2.5 + 1.2 * len(intervals), 1.8 + 0.7 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis_r", aspect="auto")
    axes.set_xticks(range(len(intervals)), ["never" if value is None else str(value) for value in intervals])
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlabel("reset interval (updates)")
    axes.set_ylabel("rank")
    finite = [value for row in grid for value in row if not math.isnan(value)]
    middle = (min(finite) + max(finite)) / 2
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            text = "-" if math.isnan(value) else cells.text(value)
            axes.text(x, y, text, ha="center", va="center", color="white" if value > middle else "black")
    figure.colorbar(image, label=cells.caption)
    return figure


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """What is drawn by rank and interval."""

    values: dict[tuple[int, int | None], float]
    caption: str
    text: Callable[[float], str]


def heat_map(study: Study) -> HeatMap | None:
    """The ReLoRA arms that differ in rank or interval; None where neither is swept or another setting is, too."""
    arms = [arm for arm in study.arms if arm.method == "relora" and arm.finished and arm.config is not None]
    places = [(arm.config.rank, arm.config.reset_interval_steps) for arm in arms if arm.config is not None]
    if len(set(places)) < max(len(arms), 2):
        return None
    gaps = [arm.gap("tokens") for arm in arms]
    if all(gap is not None for gap in gaps):
        values = {place: 100 * gap.relative for place, gap in zip(places, gaps, strict=True) if gap is not None}
        return HeatMap(values=_with_rank(values), caption="gap to full rank (%)", text=lambda value: f"{value:+.1f}%")
    values = {place: mean(arm.values("test_perplexity")) for place, arm in zip(places, arms, strict=True)}
    return HeatMap(values=_with_rank(values), caption="test perplexity", text=lambda value: f"{value:.2f}")


def _with_rank(values: dict[tuple[int | None, int | None], float]) -> dict[tuple[int, int | None], float]:
    return {(rank or 0, interval): value for (rank, interval), value in values.items()}


def _shape(run: Run) -> tuple[Any, ...]:
    config = run.config
    assert config is not None
    steps = (config.total_steps, config.method.warm_start_steps, config.reset_interval_steps)
    return (*steps, config.optimizer.learning_rate, config.schedule.warmup_steps, config.schedule.restart_warmup_steps)


def _styles(count: int) -> list[dict[str, Any]]:
    """A colour each, and a new kind of line whenever the ten colours are used up."""
    return [{"color": f"C{number % 10}", "ls": STYLES[number // 10 % len(STYLES)]} for number in range(count)]


def _training_curve(run: Run, axis: str) -> tuple[list[float], list[float]]:
    points = [(row[f"progress/{axis}"], row["train/loss"]) for row in run.rows if "train/loss" in row]
    width = max(1, round(SMOOTHED_SHARE * len(points)))
    smooth = [points[start : start + width] for start in range(0, len(points), width)]
    return _columns([(mean([x for x, _ in part]), mean([y for _, y in part])) for part in smooth])


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain_log_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=()))


# -------------------------------------------------------------------------------------------------------------- words


class Notes:
    """Remarks on figures, each told once and referred to by a letter."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """The letter of a remark."""
        if text not in self.texts:
            self.texts.append(text)
        number = self.texts.index(text)
        return chr(ord("a") + number % 26) * (1 + number // 26)


def percent(estimate: Estimate | None, seeds: int | None = None) -> str:
    """A gap, ± its deviation over seeds, its interval where there is one, its seeds where they are not the arm's."""
    if estimate is None:
        return "-"
    text = f"{estimate.relative:+.1%}"
    if estimate.deviation is not None:
        text += f" ± {estimate.deviation:.1%}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:+.1%}, {estimate.high:+.1%}]"
    return text if seeds in (None, estimate.seeds) else f"{text} of {estimate.seeds} seeds"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ± {deviation(values):.2f}" if len(values) > 1 else "")


def _figure(values: Sequence[float], text: Callable[[float], str]) -> str:
    return text(mean(values)) if values else "-"


def answer(study: Study) -> list[str]:
    """What came out, in sentences; the first thing that a reader wants. Each setting of several is told by itself."""
    parts = study.settings()
    if len(parts) == 1:
        return _answer(study)
    told: list[str] = []
    for part in parts:
        config = next((arm.config for arm in part.arms if arm.config), None)
        name = f"{config.model.name}, {config.total_steps} updates" if config else "unknown setting"
        told += [f"{name}: {line}" for line in _answer(part)]
    return told


def _answer(study: Study) -> list[str]:
    told: list[str] = []
    full, best = study.full_rank(), study.best()
    if full is not None and full.finished:
        told.append(f"Full rank ({full.label}) reaches perplexity {_spread(full.values('test_perplexity'))} on test.")
    else:
        told.append("There is no finished full-rank run to measure against.")
    if best is not None:
        told.append(_best_arm(study, best, full))
    cells = heat_map(study)
    if best is not None and cells is not None and best.method == "relora" and best.config is not None:
        interval = best.config.reset_interval_steps
        told.append(
            f"Rank and interval: take rank {best.config.rank} and "
            + ("no restarts." if interval is None else f"a restart every {interval} updates.")
        )
    seeds = min((len(arm.finished) for arm in study.arms if arm.finished), default=0)
    if 0 < seeds < 3:
        told.append(
            f"There {'is one seed' if seeds == 1 else 'are two seeds'} for at least one arm: no interval can be given, "
            "and a small difference may be chance. Three seeds from `-m ... trainer.seed=0,1,2` give one."
        )
    if study.unfinished:
        told.append(f"{len(study.unfinished)} of {len(study.members)} runs have no result; they are listed below.")
    return told


def _best_arm(study: Study, best: Arm, full: Arm | None) -> str:
    """Chosen on validation, read on test."""
    text = f"Best on validation of the others: {best.label}, test perplexity {_spread(best.values('test_perplexity'))}"
    gap = best.gap("tokens")
    if gap is not None:
        text += f", {percent(gap)} against full rank at equal tokens"
        if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
            text += " (the interval holds zero: no difference is shown)"
    if full is not None and full.finished:
        ratios = {
            name: mean(best.values(key)) / mean(full.values(key))
            for name, key in (("trainable parameters", "trainable_parameters"), ("peak memory", "peak_memory_bytes"))
        }
        speed = _speed(best) / _speed(full)
        text += ". It has " + " and ".join(f"{ratio:.2f} times the {name}" for name, ratio in ratios.items())
        text += f" of full rank, and runs at {speed:.2f} times its tokens/s"
    return text + "."


def _line(text: str) -> str:
    """On one line, so that no message becomes a heading."""
    return " ".join(text.split())


def _speed(arm: Arm) -> float:
    return mean([member.run.summary["tokens"] / member.run.summary["training_seconds"] for member in arm.finished])


# --------------------------------------------------------------------------------------------------------- the report

ARM_COLUMNS = (
    "arm",
    "seeds",
    "test perplexity",
    "gap, equal tokens",
    "gap, equal FLOPs",
    "gap, equal wall-clock",
    "tokens to full rank's",
    "trainable",
    "peak memory",
    "tokens/s",
)
RUN_COLUMNS = (
    "run",
    "arm",
    "seed",
    "state",
    "validation",
    "test",
    "gap, equal tokens",
    "gap, equal FLOPs",
    "gap, equal wall-clock",
    "measured against",
    "tokens to full rank's",
    "trainable",
    "peak memory",
    "skipped",
)
FIGURES: tuple[tuple[str, Callable[[Study], "Figure | None"], str], ...] = (
    ("gaps.png", draw_gaps, "Gap to full rank at equal tokens; points are seeds, dark lines 95% intervals."),
    ("heat_map.png", draw_heat_map, "Rank against reset interval."),
    ("curves.png", draw_curves, "Training loss (smoothed) and validation perplexity over tokens and training FLOPs."),
    ("schedule.png", draw_schedule, "Learning rates; marks on the axis are restarts."),
)


def _arm_row(arm: Arm, notes: Notes) -> list[str]:
    cells = [arm.label, f"{len(arm.finished)}/{len(arm.members)}", _spread(arm.values("test_perplexity"))]
    for axis in ("tokens", "flops", "seconds"):
        gap, told = arm.gap(axis), arm.notes(axis)
        if axis == "tokens":
            told = [] if gap is not None and gap.seeds == len(arm.finished) else [t for t in told if "no finished" in t]
        marks = ", ".join(notes.mark(text) for text in told)
        cells.append(percent(gap, len(arm.finished)) + (f" ({marks})" if marks else ""))
    measured = [member.tokens_to_baseline for member in arm.finished if member.baseline is not None]
    reached = [tokens for tokens in measured if tokens is not None]
    never = len(measured) - len(reached)
    parts = [f"{mean(reached):,.0f}"] if reached else []
    parts += [f"{never} of {len(measured)} never"] if never else []
    cells.append(", ".join(parts) or "-")
    cells.append(_figure(arm.values("trainable_parameters"), lambda value: f"{value / 1e6:.2f}M"))
    cells.append(_figure(arm.values("peak_memory_bytes"), _memory))
    cells.append(f"{_speed(arm):,.0f}" if arm.finished else "-")
    return cells


def _memory(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= 10 * GIB else f"{value / MIB:,.0f} MiB"


def _run_gap(member: Compared, axis: str, notes: Notes) -> str:
    """A run's gap, and how it was read where that is not plain."""
    gap: Gap = getattr(member, axis)
    mark = f" ({notes.mark(gap.note)})" if axis != "tokens" and member.run.finished else ""
    return ("-" if gap.relative is None else f"{gap.relative:+.1%}") + mark


def _run_row(member: Compared, notes: Notes) -> list[str]:
    run, finished = member.run, member.run.finished
    reached = member.tokens_to_baseline
    return [
        run.name,
        member.label,
        str(run.config.trainer.seed) if run.config else "?",
        run.state,
        f"{run.summary['eval_perplexity']:.2f}" if finished else "-",
        f"{run.summary['test_perplexity']:.2f}" if finished else "-",
        *(_run_gap(member, axis, notes) for axis in ("tokens", "flops", "seconds")),
        "-" if member.baseline is None else "itself" if member.baseline is run else member.baseline.name,
        "-" if member.baseline is None else "never" if reached is None else f"{reached:,}",
        f"{run.summary['trainable_parameters'] / 1e6:.2f}M" if finished else "-",
        _memory(run.summary["peak_memory_bytes"]) if finished else "-",
        str(run.summary["skipped_updates"]) if finished else "-",
    ]


def write_report(study: Study, runs_dir: Path) -> Path:
    """Write report.md, report.html, results.csv and the pictures; returns their folder, always whole."""
    target = study_dir(runs_dir, study.name) / "report"
    folder = target.with_name(f"report.tmp.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    page, notes = Page(f"Study {study.name}"), Notes()
    if study.question:
        page.paragraph(study.question)
    page.heading("What came out")
    page.listing(answer(study))
    page.heading("Arms")
    page.table(ARM_COLUMNS, [_arm_row(arm, notes) for arm in study.arms])
    run_rows = [_run_row(member, notes) for member in study.members]
    page.paragraph(
        "A gap is test perplexity over that of the full-rank run of the same setting and seed, less 1, averaged over "
        "seeds as a difference of losses; baselines have no warm start and are chosen on validation. ± is the standard "
        "deviation over seeds, brackets hold a 95% interval. Wall-clock is that of updates and restarts, and means "
        "little where runs shared a machine; peak memory on a CPU is all that the process held while it trained."
    )
    page.listing([f"({notes.mark(text)}) {text}" for text in notes.texts])
    if study.unfinished:
        page.heading("Runs without a result")
        page.listing([_line(f"{m.run.name} ({m.label}): {m.run.state}: {m.run.message}") for m in study.unfinished])
    alone = [m for m in study.members if m.run.finished and m.tokens.loss is None]
    if alone:
        page.heading("Runs without a baseline")
        page.listing([_line(f"{m.run.name} ({m.label}): {m.tokens.note}") for m in alone])
    page.heading("Pictures")
    for file, draw, caption in FIGURES:
        figure = draw(study)
        if figure is not None:
            figure.savefig(folder / file, dpi=110)
            page.figure(file, caption)
    page.heading("Runs")
    page.table(RUN_COLUMNS, run_rows)
    page.heading("To have this again")
    page.code("\n".join(f"python run.py -m {shlex.join(launch)}" for launch in study.launches))
    (folder / "report.md").write_text(page.markdown())
    (folder / "report.html").write_text(page.html(folder))
    rows = [as_row(member) for member in study.members]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with FileLock(target.with_name(".lock")):
        shutil.rmtree(target, ignore_errors=True)
        folder.replace(target)
    return target


def as_json(study: Study) -> str:
    """The study as one JSON object."""
    arms = [
        {
            "arm": arm.label,
            "seeds": len(arm.finished),
            **{f"gap_at_equal_{axis}": _estimate(arm.gap(axis)) for axis in ("tokens", "flops", "seconds")},
        }
        for arm in study.arms
    ]
    values = {"study": study.name, "answer": answer(study), "arms": arms, "runs": [as_row(m) for m in study.members]}
    return json.dumps(_finite(values))


def _finite(values: Any) -> Any:
    """JSON knows no infinity: null instead."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _estimate(estimate: Estimate | None) -> dict[str, float | int | None] | None:
    return None if estimate is None else vars(estimate)
