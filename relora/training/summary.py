"""The messages of a run for its user: how it ended, and the commands to continue from there."""

import os
import shlex
from typing import Any

from relora.config import credentials
from relora.config.run import RunConfig
from relora.methods.registry import BASELINE
from relora.runs.rundir import RunDir, Status, read_json
from relora.runs.spent import other_switches


def finished_already(run: RunDir, config: RunConfig, status: Status, *, commit: str | None) -> str:
    """Return the message for a launch of a finished run. `commit` is the commit of the code that is launched."""
    text = f"{run.path} is finished already; change a setting or trainer.seed for another run, or remove the folder"
    if commit != status.git_commit:
        text += f"\nnote: it was trained by commit {status.git_commit}, and this is commit {commit}"
    if switches := other_switches(config, status.spent):
        text += f"\nnote: it was trained with {switches}; its speed and memory were measured with those"
    return text


def _overrides(run: RunDir) -> list[str]:
    return credentials.without_passwords(read_json(run.launch_file).get("overrides", []))


def relaunch_command(run: RunDir) -> str:
    """Return the command that resumes the run."""
    return shlex.join(["python", "run.py", *_overrides(run)])


def baseline_command(run: RunDir) -> str:
    """Return the command of the full-rank run to compare with. It has this run's overrides without the method's."""
    rates = ("optimizer.learning_rate", "optimizer.embedding_learning_rate")
    own = ("method", "+method", *rates, "schedule.restart_warmup_steps")
    kept = [override for override in _overrides(run) if not override.startswith(own)]
    return shlex.join(["python", "run.py", f"method={BASELINE}", *kept])


def _verb(verb: str, *arguments: str, run: RunDir) -> str:
    """Return a relora command, with the overrides that locate this run's folder and store."""
    where = [override for override in _overrides(run) if override.startswith(("runs_dir=", "tracker."))]
    return shlex.join(["relora", verb, *arguments, *where])


def summary_text(run: RunDir, config: RunConfig, status: Status) -> str:
    """Return the summary table of a finished run, with its sample text if there is one."""
    found = status.summary
    rows = [
        ("perplexity", f"{found['test_perplexity']:.2f} on test, {found['eval_perplexity']:.2f} on validation"),
        *_test_rows(config, found),
        ("tokens", f"{found['tokens']:,} in {config.total_steps} updates, {found['skipped_updates']} skipped"),
        ("restarts", f"{found['restarts']}"),
        (
            "parameters",
            f"{found['parameters'] / 1e6:.2f}M, {found['trainable_parameters'] / 1e6:.2f}M trainable",
        ),
        (
            "wall-clock",
            f"{found['wall_clock_seconds']:.0f} s"
            + (f" in attempt {status.attempt}" if status.attempt > 1 else "")
            + f", {found['training_seconds']:.0f} s of it in updates"
            + f" ({found['tokens'] / found['training_seconds']:,.0f} tokens/s)",
        ),
        *(("machine", f"another one from step {step} on: {machine}") for step, machine in status.machine_changes),
        ("peak memory", f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("model", f"{run.model}"),
        ("run", f"{run.path}"),
    ]
    if (run.model / "tokenizer.json").exists():
        rows.append(("write more", _verb("sample", os.fspath(run.model), "--prompt", prompt_for(config), run=run)))
    if config.tracker.name == "mlflow":
        rows.append(("MLflow UI", _verb("ui", run=run)))
    # A study adds its baselines by itself.
    if not config.method.is_full_rank and "-m" not in _overrides(run):
        rows.append(("baseline", baseline_command(run)))
    if status.message:
        rows.append(("warning", status.message))
    width = max(len(name) for name, _ in rows)
    lines = ["", *(f"{name:<{width}}  {value}" for name, value in rows)]
    if "sample" in found:
        text = "\n".join(f"  | {line}" for line in found["sample"].splitlines())
        lines = ["", "the model writes:", text, *lines]
    return "\n".join(lines)


def _test_rows(config: RunConfig, found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows for bits per byte and for the paper's figure. A run may have neither."""
    rows: list[tuple[str, str]] = []
    if "test_bits_per_byte" in found:
        rows.append(("bits per byte", f"{found['test_bits_per_byte']:.4f} on test"))
    published = config.published
    if published is not None and "test_perplexity_as_published" in found:
        figure = published.perplexity.get(config.method.name)
        theirs = "the paper has no figure" if figure is None else f"the paper's figure is {figure:.2f}"
        setting = ", in another setting" if published.differs else ""
        printed = found["test_perplexity_as_published"]
        rows.append(
            ("as published", f"{printed:.2f}, as the paper's code prints it; {theirs}{setting} ({published.source})")
        )
    return rows


def prompt_for(config: RunConfig) -> str:
    """Return the prompt of the closing sample: a Python definition, or empty for the beginning of a text."""
    return "def " if config.data.name == "stdlib" else ""
