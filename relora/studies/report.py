"""The report of a study: the answer in sentences, tables and pictures."""

import csv
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from relora.common.files import publishing
from relora.runs.results import mean
from relora.studies.cells import Notes, mean_figure, memory_text, one_line, percent, spread
from relora.studies.compare import Arm, Estimate, Study, as_row
from relora.studies.curves import draw_curves
from relora.studies.doubts import doubts, rates_of, tokenizer_words, untuned, untuned_words
from relora.studies.drawing import save
from relora.studies.gaps import FEWEST_EVALUATIONS, SAME_BUDGET, Compared, Gap
from relora.studies.manifest import study_dir
from relora.studies.memory_picture import draw_memory
from relora.studies.page import Page
from relora.studies.pictures import draw_gaps, draw_heat_map, draw_schedule, heat_map, restarts
from relora.studies.published import COLUMNS, HEADING, READING, beside_the_paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -------------------------------------------------------------------------------------------------------------- words


def answer(study: Study) -> list[str]:
    """Return the answer of the study in sentences. If there are several settings, each has separate sentences."""
    parts, sentences = study.settings(), tokenizer_words(study)
    if len(parts) == 1:
        return [*sentences, *_answer(study)]
    for part in parts:
        config = next((arm.config for arm in part.arms if arm.config), None)
        name = f"{config.model.name}, {config.total_steps} steps" if config else "unknown setting"
        sentences += [f"{name}: {line}" for line in _answer(part)]
    return sentences


def _answer(study: Study) -> list[str]:
    sentences: list[str] = []
    full, best = study.full_rank(), study.best()
    if full is not None and full.finished:
        sentences.append(
            f"Full rank ({full.label}) reaches perplexity {spread(full.values('test_perplexity'))} on test."
        )
    else:
        sentences.append("There is no finished full-rank run to compare with.")
    sentences += study.baseline_remarks()
    sentences += untuned_words(study)
    if best is not None:
        sentences.append(_best_arm(study, best, full))
    sentences += doubts(study, best, full)
    cells = None if untuned(study) else heat_map(study)
    if best is not None and cells is not None and best.config is not None and restarts(best.config):
        interval = best.config.reset_interval_steps
        sentences.append(
            f"Rank and interval: use rank {best.config.rank} and "
            + ("no restarts." if interval is None else f"a restart every {interval} steps.")
        )
    seeds = min((len(arm.finished) for arm in study.arms if arm.finished), default=0)
    if 0 < seeds < 3:
        sentences.append(
            f"There {'is one seed' if seeds == 1 else 'are two seeds'} for at least one arm: no interval can be given, "
            f"and a small difference may be chance. Train three seeds: {_command(study, 'trainer.seed', '0,1,2')}"
        )
    if study.unfinished:
        sentences.append(f"{len(study.unfinished)} of {len(study.members)} runs have no result; they are listed below.")
    return sentences


def _command(study: Study, key: str, values: str) -> str:
    """Return the command of the study's last launch, with other values of a key."""
    kept = [text for text in study.launches[-1] if not text.startswith(f"{key}=")]
    return shlex.join(["python", "run.py", "-m", *kept, f"{key}={values}"])


def _best_arm(study: Study, best: Arm, full: Arm | None) -> str:
    """Return sentences on the best arm. The arm is chosen on validation, and its result is read on test."""
    text = f"Best other arm on validation: {best.label}, test perplexity {spread(best.values('test_perplexity'))}"
    gap = best.gap("tokens")
    if gap is not None:
        text += f", {percent(gap)} against full rank at equal tokens"
        if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
            text += " (the interval contains zero: no difference is shown)"
    if full is not None and full.finished:
        ratios = {
            name: mean(best.values(key)) / mean(full.values(key))
            for name, key in (("trainable parameters", "trainable_parameters"), ("peak memory", "peak_memory_bytes"))
        }
        speed = _speed(best) / _speed(full)
        text += ". It has " + " and ".join(f"{ratio:.2f} times the {name}" for name, ratio in ratios.items())
        text += f" of full rank, and runs at {speed:.2f} times its tokens/s"
        unlike = dict.fromkeys(note for m in best.finished for note in (m.memory_note, m.speed_note) if note)
        if unlike:
            text += f" (no fair comparison: {'; '.join(unlike)})"
    return text + "."


def _speed(arm: Arm) -> float:
    return mean([member.run.summary["tokens"] / member.run.summary["training_seconds"] for member in arm.finished])


# --------------------------------------------------------------------------------------------------------- the report

ARM_COLUMNS = (
    "arm",
    "rates",
    "seeds",
    "test perplexity",
    "bits per byte",
    "gap, equal tokens",
    "gap, equal FLOPs",
    "gap, equal wall-clock",
    "tokens to full rank's loss",
    "trainable",
    "peak memory",
    "tokens/s",
)
RUN_COLUMNS = (
    "run",
    "arm",
    "role",
    "seed",
    "state",
    "validation",
    "test",
    "gap, equal tokens",
    "gap, equal FLOPs",
    "gap, equal wall-clock",
    "measured against",
    "tokens to full rank's loss",
    "trainable",
    "peak memory",
    "skipped",
)
FIGURES: tuple[tuple[str, Callable[[Study], "Figure | None"], str], ...] = (
    ("gaps", draw_gaps, "Gap to full rank at equal tokens; points are seeds, dark lines 95% intervals."),
    (
        "memory",
        draw_memory,
        "Test perplexity against memory: weights, gradients and optimizer state, computed, without activations. Bars "
        "span the seeds. The dashed line is full rank. Hollow points need full rank's memory in their warm start.",
    ),
    ("heat_map", draw_heat_map, "Results by rank and reset interval; lighter is better."),
    (
        "curves",
        draw_curves,
        "Training loss (smoothed) and validation perplexity over tokens and training FLOPs: means over the finished "
        "seeds. Bands span the seeds.",
    ),
    ("schedule", draw_schedule, "Learning rates, one arm for each shape; marks on the axis are restarts."),
)
"""File name without its ending, function that draws, and caption. Each picture is saved as PNG and as SVG."""


TOO_FEW = f"the loss was reached, but fewer than {FEWEST_EVALUATIONS} evaluations after the start cannot show when"


def _rates_cell(study: Study, arm: Arm) -> str:
    """Return how the rates of an arm were chosen, after the role if the arm is a baseline."""
    roles = {member.role for member in arm.members} - {"arm"}
    return "; ".join(filter(None, [*sorted(roles), rates_of(study, arm)])) or "-"


def _arm_row(study: Study, arm: Arm, notes: Notes) -> list[str]:
    cells = [
        arm.label,
        _rates_cell(study, arm),
        f"{len(arm.finished)}/{len(arm.members)}",
        spread(arm.values("test_perplexity")),
        spread(arm.values("test_bits_per_byte"), digits=4),
    ]
    for axis in ("tokens", "flops", "seconds"):
        gap, sentences = arm.gap(axis), arm.notes(axis)
        if axis == "tokens":
            sentences = (
                []
                if gap is not None and gap.seeds == len(arm.finished)
                else [t for t in sentences if "no finished" in t]
            )
        marks = ", ".join(notes.mark(text) for text in sentences)
        cells.append(percent(gap, len(arm.finished)) + (f" ({marks})" if marks else ""))
    measured = [m for m in arm.finished if m.baseline is not None and not m.evaluated_too_rarely]
    reached = [m.tokens_to_baseline for m in measured if m.tokens_to_baseline is not None]
    never = len(measured) - len(reached)
    parts = [f"{mean(reached):,.0f}"] if reached else []
    if never:
        parts.append("never" if len(measured) == 1 else f"{never} of {len(measured)} never")
    if any(m.evaluated_too_rarely for m in arm.finished):
        parts.append(f"? ({notes.mark(TOO_FEW)})")
    cells.append(", ".join(parts) or "-")
    cells.append(mean_figure(arm.values("trainable_parameters"), lambda value: f"{value / 1e6:.2f}M"))
    memory, speed = ([getattr(m, name) for m in arm.finished] for name in ("memory_note", "speed_note"))
    cells.append(mean_figure(arm.values("peak_memory_bytes"), memory_text) + notes.marks(memory))
    cells.append((f"{_speed(arm):,.0f}" if arm.finished else "-") + notes.marks(speed))
    return cells


ARM_KEYS = (
    *("sweeps=", "study=", "method", "optimizer.learning_rate", "optimizer.embedding_learning_rate"),
    *("schedule.restart_warmup_steps", "trainer.total_steps", "trainer.total_tokens"),
)


def _missing_budgets(study: Study) -> str | None:
    """Return the command for the full-rank runs that are missing for a comparison at equal FLOPs."""
    steps: set[int] = set()
    for member in study.members:
        at_equal_flops, baseline = member.flops, member.baseline
        if baseline is None or baseline.config is None or at_equal_flops.kind == "interpolated":
            continue
        if at_equal_flops.loss is None or at_equal_flops.kind == "curve":
            steps.add(round(baseline.config.total_steps * member.run.budget("flops") / baseline.budget("flops")))
    if not steps:
        return None
    budgets: list[int] = []
    for needed in sorted(steps):
        if not budgets or needed / budgets[-1] - 1 > SAME_BUDGET:
            budgets.append(needed)
    kept = [text for text in study.launches[-1] if not text.startswith(ARM_KEYS)]
    wanted = f"trainer.total_steps={','.join(map(str, budgets))}"
    return shlex.join(["python", "run.py", "-m", "sweeps=baseline_budgets", *kept, wanted])


def _run_gap(member: Compared, axis: str, notes: Notes) -> str:
    """Return the gap of a run. At equal FLOPs or wall-clock, the letter of the note on how it was measured follows."""
    gap: Gap = getattr(member, axis)
    mark = f" ({notes.mark(gap.note)})" if axis != "tokens" and member.run.finished else ""
    return ("-" if gap.relative is None else f"{gap.relative:+.1%}") + mark


def _tokens_cell(member: Compared, notes: Notes) -> str:
    """Return the tokens after which a run reached the loss of full rank."""
    if member.baseline is None:
        return "-"
    if member.evaluated_too_rarely:
        return f"? ({notes.mark(TOO_FEW)})"
    return "never" if member.tokens_to_baseline is None else f"{member.tokens_to_baseline:,}"


def _run_row(member: Compared, notes: Notes) -> list[str]:
    run, finished = member.run, member.run.finished
    return [
        run.name,
        member.label,
        member.role,
        str(run.config.trainer.seed) if run.config else "?",
        "diverged" if run.diverged else run.state,
        *(spread([run.summary[name]] if finished else []) for name in ("eval_perplexity", "test_perplexity")),
        *(_run_gap(member, axis, notes) for axis in ("tokens", "flops", "seconds")),
        "-" if member.baseline is None else "itself" if member.baseline is run else member.baseline.name,
        _tokens_cell(member, notes),
        f"{run.summary['trainable_parameters'] / 1e6:.2f}M" if finished else "-",
        memory_text(run.summary["peak_memory_bytes"]) + notes.marks([member.memory_note]) if finished else "-",
        str(run.summary["skipped_updates"]) if finished else "-",
    ]


def write_report(study: Study, runs_dir: Path) -> Path:
    """Write report.md, report.html, results.csv and the pictures, and return their folder.

    The folder is replaced as a whole, so it is complete at any time.

    Raises:
        OSError: The folder cannot be written. The message names it.
    """
    target = study_dir(runs_dir, study.name) / "report"
    with FileLock(target.with_name(".lock")), publishing(target) as folder:
        _write(study, folder)
    return target


def _write(study: Study, folder: Path) -> None:
    page, notes = Page(f"Study {study.name}"), Notes()
    if study.question:
        page.paragraph(study.question)
    page.heading("Results")
    page.listing(answer(study))
    page.heading("Arms")
    page.table(ARM_COLUMNS, [_arm_row(part, arm, notes) for part in study.settings() for arm in part.arms])
    run_rows = [_run_row(member, notes) for member in study.members]
    page.paragraph(
        "A gap is test perplexity divided by that of the full-rank run of the same setting and seed, minus 1. It is "
        "averaged over seeds as a difference of losses. Baselines have no warm start and are chosen on validation. "
        "± is the standard deviation over seeds. Brackets contain a 95% interval. Wall-clock is the time of optimizer "
        "steps and restarts. It means little if runs shared a machine. Peak memory on a CPU is all memory that the "
        "process held while it trained."
    )
    page.listing([f"({notes.mark(text)}) {text}" for text in notes.texts])
    beside = beside_the_paper(study)
    if beside is not None:
        page.heading(HEADING)
        page.table(COLUMNS, beside.rows)
        page.paragraph(READING)
        page.listing(beside.remarks)
    for command in filter(None, map(_missing_budgets, study.settings())):
        page.paragraph(
            "Some gaps at equal FLOPs are missing or were read from a curve. They need full-rank runs whose schedule "
            "ends at that budget. This command trains them. The next report uses them, also at equal wall-clock:"
        )
        page.code(command)
    if study.unfinished:
        page.heading("Runs without a result")
        page.listing([one_line(f"{m.run.name} ({m.label}): {m.run.state}: {m.run.message}") for m in study.unfinished])
    remarks = [one_line(f"{m.run.name} ({m.label}): {text}") for m in study.members for text in m.run.remarks]
    if remarks:
        page.heading("Remarks on runs")
        page.listing(remarks)
    alone = [m for m in study.members if m.run.finished and m.tokens.loss is None]
    if alone:
        page.heading("Runs without a baseline")
        page.listing([one_line(f"{m.run.name} ({m.label}): {m.tokens.note}") for m in alone])
    page.heading("Pictures")
    for name, draw, caption in FIGURES:
        figure = draw(study)
        if figure is not None:
            save(figure, folder / name)
            page.figure(f"{name}.png", f"{caption} For print: {name}.svg.")
    page.heading("Runs")
    page.table(RUN_COLUMNS, run_rows)
    page.heading("Reproduce this study")
    page.code("\n".join(f"python run.py -m {shlex.join(launch)}" for launch in study.launches))
    (folder / "report.md").write_text(page.markdown())
    (folder / "report.html").write_text(page.html(folder))
    rows = [as_row(member) for member in study.members]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_json(study: Study) -> str:
    """Return the study as one JSON object."""
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
    """Replace infinity and NaN by None, because JSON does not have them."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _estimate(estimate: Estimate | None) -> dict[str, float | int | None] | None:
    return None if estimate is None else vars(estimate)
