"""The status table of a study: the state, the progress and the problem of each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relora.common.tables import aligned
from relora.runs.metrics import read_rows
from relora.runs.results import Run
from relora.runs.state import ObservedState, observe
from relora.studies.gaps import FullRank, gap_at_equal_tokens, role_against
from relora.studies.study import Planned, damaged_of
from relora.tracking.console import LiveTable, duration, is_terminal

NOTE_CHARACTERS = 100


@dataclass(frozen=True, kw_only=True)
class StatusRow:
    """One row of the table. A value that is not known yet is None."""

    run: str
    role: str
    state: ObservedState
    step: int
    total_steps: int
    seconds_left: float | None = None
    attempts: int = 0
    validation_perplexity: float | None = None
    test_perplexity: float | None = None
    gap_to_full: float | None = None
    """At equal tokens: the test perplexity divided by that of the baseline, minus 1."""
    baseline: str | None = None
    """The name of the full-rank run that the run is compared with."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    rates: str = ""
    """How the learning rates were chosen. Empty if they were tuned or if it is unknown."""

    def as_json(self) -> dict[str, Any]:
        """Return a flat object, for `relora status --json`."""
        state = {"state": self.state.name, "message": self.state.message, "requeues": self.state.requeues}
        return {**vars(self), **state}


def status_rows(planned: Sequence[Planned]) -> list[StatusRow]:
    """Return one row for each run."""
    states = observe([item.run for item in planned])
    runs = [Run.read(item.run.path, item.role, item.config, state) for item, state in zip(planned, states, strict=True)]
    full = FullRank(Path(planned[0].config.runs_dir), runs) if planned else None
    return [
        _finished(run, state, full)
        if full is not None and run.finished
        else _begun(item, _with_problem(state, run), run)
        for item, state, run in zip(planned, states, runs, strict=True)
    ]


def _with_problem(state: ObservedState, run: Run) -> ObservedState:
    return replace(state, name=run.state, message=run.problem) if run.problem else state


def unreadable(runs_dir: Path, study: str) -> list[StatusRow]:
    """Return a row for each run whose frozen config is damaged. It has only the name, the role and the reason."""
    return [
        StatusRow(run=name, role=role, state=ObservedState(name="unreadable", message=why), step=0, total_steps=0)
        for name, (role, why) in damaged_of(runs_dir, study).items()
    ]


def _finished(run: Run, state: ObservedState, full: FullRank) -> StatusRow:
    assert run.config is not None
    assert run.status is not None
    found, (gap, baseline) = run.summary, gap_at_equal_tokens(run, full)
    return StatusRow(
        run=run.name,
        role=role_against(run.role, run, baseline),
        state=replace(state, message=gap.note) if run.diverged else state,
        step=run.config.total_steps,
        total_steps=run.config.total_steps,
        attempts=run.status.attempt,
        validation_perplexity=found["eval_perplexity"],
        test_perplexity=found["test_perplexity"],
        gap_to_full=gap.relative,
        baseline=baseline.name if baseline is not None else None,
        tokens_per_second=found["tokens"] / found["training_seconds"],
        peak_memory_bytes=found["peak_memory_bytes"],
        rates=_rates(run, baseline, full),
    )


def _rates(run: Run, baseline: Run | None, full: FullRank) -> str:
    """Return how the rates of a finished run were chosen. A baseline may have the best of several rates."""
    assert run.config is not None
    if baseline is not None and baseline.name == run.name:
        tried = {config.optimizer.learning_rate for config in full.configs_for(run)}
        if len(tried) > 1:
            return f"the best of {len(tried)} rates"
    return run.config.rates.words


def _begun(item: Planned, state: ObservedState, run: Run) -> StatusRow:
    status, recorded = run.status, [] if run.problem else read_rows(item.run.metrics_file)
    step = max((row["step"] for row in recorded), default=0)
    perplexities = [row["eval/perplexity"] for row in recorded if "eval/perplexity" in row]
    measured = [row for row in recorded[-5:] if "perf/tokens_per_second" in row]
    rate = measured[-1]["perf/tokens_per_second"] if measured else None
    left = None
    if rate is not None:
        # With padding, each step has another number of tokens. Those of the steps so far say how many are to come.
        per_step = measured[-1]["progress/tokens"] / measured[-1]["step"]
        left = (item.config.total_steps - step) * per_step / rate
    return StatusRow(
        run=item.config.name,
        role=item.role,
        state=state,
        step=step,
        total_steps=item.config.total_steps,
        seconds_left=left if state.name == "running" else None,
        attempts=status.attempt if status else 0,
        validation_perplexity=perplexities[-1] if perplexities else None,
        tokens_per_second=rate,
        rates=item.config.rates.words,
    )


COLUMNS = (
    *("run", "role", "state", "step", "left", "requeues", "validation", "test", "gap to full"),
    *("tokens/s", "memory", "rates", "note"),
)


def _cells(row: StatusRow) -> tuple[str, ...]:
    def shown(value: float | None, form: Callable[[float], str]) -> str:
        return "" if value is None else form(value)

    return (
        row.run,
        row.role,
        row.state.name,
        f"{row.step}/{row.total_steps}",
        shown(row.seconds_left, duration),
        str(row.state.requeues or ""),
        shown(row.validation_perplexity, lambda value: f"{value:.2f}"),
        shown(row.test_perplexity, lambda value: f"{value:.2f}"),
        shown(row.gap_to_full, lambda value: f"{value:+.1%}"),
        shown(row.tokens_per_second, lambda value: f"{value:,.0f}"),
        shown(row.peak_memory_bytes, lambda value: f"{value / 2**20:,.0f} MiB"),
        row.rates,
        row.state.message.splitlines()[0][:NOTE_CHARACTERS] if row.state.message else "",
    )


def table(rows: Sequence[StatusRow]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells as text. Empty columns are left out."""
    cells = [_cells(row) for row in rows]
    used = [number for number in range(len(COLUMNS)) if any(row[number] for row in cells)]
    return [COLUMNS[number] for number in used], [[row[number] for number in used] for row in cells]


def render_plain(rows: Sequence[StatusRow]) -> str:
    """Return the table as aligned text, followed by the names of the baselines that the gaps use."""
    headings, cells = table(rows)
    texts = [aligned([headings, *cells])]
    baselines = list(dict.fromkeys(row.baseline for row in rows if row.baseline is not None))
    if baselines:
        texts.append(f"gap to full: at equal tokens, for the same seed, against {', '.join(baselines)}")
    return "\n".join(texts)


def show_progress(planned: Sequence[Planned]) -> Callable[[bool], list[ObservedState]]:
    """Return a function that shows the progress of the runs and returns their states.

    The caller calls it repeatedly, the last time with True. On a terminal it shows a live table. Elsewhere it prints a
    line for each change.
    """
    if is_terminal():
        live = LiveTable()

        def show_table(last: bool) -> list[ObservedState]:
            try:
                rows = status_rows(planned)
                live.draw(*table(rows))
            finally:
                if last:
                    live.close()
            return [row.state for row in rows]

        return show_table
    last_states: dict[str, str] = {}

    def show_changes(last: bool) -> list[ObservedState]:
        states = observe([item.run for item in planned])
        for item, state in zip(planned, states, strict=True):
            if last_states.get(item.config.name, "missing") != state.name:
                print(f"{item.config.name}: {state.name}", flush=True)
            last_states[item.config.name] = state.name
        return states

    return show_changes
