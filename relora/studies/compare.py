"""Compare the runs of a study with their full-rank runs: gaps, means over seeds, intervals.

No run is dropped: a run that failed or has no baseline has a row that says so. Baselines are chosen on the validation
split. Results are read on the test split.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relora.config import credentials
from relora.config.identity import every_field, spelled_out
from relora.config.run import RunConfig
from relora.runs.results import Run, best_on_validation, deviation, mean
from relora.runs.rundir import RunDir
from relora.runs.state import observe
from relora.studies.gaps import Baseline, Compared, FullRank, Gap, compared, relative
from relora.studies.manifest import manifest_of

CONFIDENCE = 0.95
SEEDS_FOR_AN_INTERVAL = 3


@dataclass(kw_only=True)
class Estimate:
    """The mean gap over seeds as a relative difference of perplexity, and its interval if there are enough seeds."""

    relative: float
    deviation: float | None
    """The standard deviation over seeds. None for one seed."""
    low: float | None
    high: float | None
    seeds: int


@dataclass(kw_only=True)
class Arm:
    """Runs that differ only in their seed."""

    label: str
    variant: str
    members: list[Compared]

    @property
    def finished(self) -> list[Compared]:
        """The runs with results."""
        return [member for member in self.members if member.run.finished]

    @property
    def config(self) -> RunConfig | None:
        """The config of the first run whose config is known."""
        return next((member.run.config for member in self.members if member.run.config), None)

    @property
    def is_full_rank(self) -> bool:
        """Whether the method is full rank, the reference of the other methods."""
        return self.config is not None and self.config.method.is_full_rank

    def values(self, name: str) -> list[float]:
        """Return the value `name` of the summary of every finished run. Runs without this value are left out.

        Runs of earlier versions have fewer values.
        """
        return [float(member.run.summary[name]) for member in self.finished if name in member.run.summary]

    def gap(self, axis: str) -> Estimate | None:
        """Return the mean paired difference to full rank, with a t interval for three or more seeds.

        If the gaps of the seeds were measured in different ways (Gap.kind), only the gaps of the most frequent way are
        used. A mean never mixes two ways.

        Args:
            axis: "tokens", "flops" or "seconds".
        """
        found: list[Gap] = [getattr(member, axis) for member in self.finished]
        by_kind: dict[str, list[float]] = defaultdict(list)
        for gap in found:
            if gap.loss is not None:
                by_kind[gap.kind].append(gap.loss)
        if not by_kind:
            return None
        losses = max(by_kind.values(), key=len)
        low = high = None
        if len(losses) >= SEEDS_FOR_AN_INTERVAL:
            from scipy.stats import t

            half = float(t.ppf(0.5 + CONFIDENCE / 2, len(losses) - 1)) * deviation(losses) / math.sqrt(len(losses))
            low, high = relative(mean(losses) - half), relative(mean(losses) + half)
        spread = deviation([relative(loss) for loss in losses]) if len(losses) > 1 else None
        return Estimate(relative=relative(mean(losses)), deviation=spread, low=low, high=high, seeds=len(losses))

    def notes(self, axis: str) -> list[str]:
        """Return how the gaps of an axis were measured, each note once."""
        return list(dict.fromkeys(getattr(member, axis).note for member in self.finished))


@dataclass(kw_only=True)
class Study:
    """A question, its runs and their baselines."""

    name: str
    question: str
    launches: list[list[str]]
    arms: list[Arm]
    labels: dict[str, str]
    """variant -> short name, for the variants of the study and the candidates for its baselines."""

    @property
    def members(self) -> list[Compared]:
        """All runs, arm by arm."""
        return [member for arm in self.arms for member in arm.members]

    @property
    def unfinished(self) -> list[Compared]:
        """The runs without results."""
        return [member for member in self.members if not member.run.finished]

    def settings(self) -> list["Study"]:
        """Return the parts of the study whose runs can be compared: one part for each comparison_key."""
        known = [arm.config.comparison_key for arm in self.arms if arm.config] or [""]
        keys = {arm.variant: arm.config.comparison_key if arm.config else known[0] for arm in self.arms}
        parts = [[arm for arm in self.arms if keys[arm.variant] == key] for key in dict.fromkeys(keys.values())]
        return [replace(self, arms=arms) for arms in parts]

    def best(self) -> Arm | None:
        """Return the best arm that is not full rank, by the mean validation loss (best_on_validation)."""
        arms = {arm.variant: arm for arm in self.arms if not arm.is_full_rank and arm.finished}
        best = best_on_validation(
            {variant: {m.run.seed: m.run.validation_loss for m in arm.finished} for variant, arm in arms.items()}
        )
        return None if best is None else arms[best]

    def full_rank(self) -> Arm | None:
        """Return the full-rank arm that is the baseline of most runs. Its runs may be those of another study."""
        choice = self.baseline()
        if choice is None:
            return None
        own = next((arm for arm in self.arms if arm.variant == choice.variant), None)
        if own is not None:
            return own
        label = self.labels[choice.variant]
        itself = Gap(loss=0.0, note="itself")
        members = [
            Compared(run=run, label=label, choice=choice, baseline=run, tokens=itself, flops=itself, seconds=itself)
            for _, run in sorted(choice.runs.items())
        ]
        return Arm(label=label, variant=choice.variant, members=members)

    def baseline(self) -> Baseline | None:
        """Return the baseline of most runs."""
        choices = [
            member.choice for member in self.members if member.choice is not None and member.baseline is not None
        ]
        return max(choices, key=choices.count, default=None)

    def baseline_remarks(self) -> list[str]:
        """Return sentences that explain the choice of the baseline, if the reader could expect another baseline."""
        choice, sentences = self.baseline(), list[str]()
        if choice is None:
            return sentences
        name = self.labels[choice.variant]
        if not choice.is_of_the_study:
            sentences.append(
                f"The baseline {name} is not a run of this study: another launch trained it in the same runs_dir."
            )
        for variant in choice.rivals.keys() - {choice.variant}:
            if (shared := choice.compared_with(variant)) is None:
                continue
            seeds, theirs, ours = shared
            over = f"over {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
            losses = f"{theirs:.4f} against {ours:.4f}, {over}"
            if theirs < ours:
                lacking = ", ".join(map(str, sorted(choice.runs.keys() - choice.rivals[variant].keys())))
                sentences.append(
                    f"{self.labels[variant]} is better on validation than the baseline {name} ({losses}), but it has "
                    f"no run of seed {lacking}; train the missing runs to make it the baseline."
                )
            elif not choice.is_of_the_study and any(run.role != "other" for run in choice.rivals[variant].values()):
                sentences.append(f"{self.labels[variant]} of this study is worse on validation ({losses}).")
        return sorted(sentences, key=lambda text: not text.startswith("The baseline"))


def load_study(runs_dir: Path, name: str) -> Study:
    """Read the runs of a study and compute their gaps.

    Raises:
        ConfigError: The study was never launched in `runs_dir`.
        DamagedFile: Its manifest cannot be read.
    """
    manifest = manifest_of(runs_dir, name)
    roles = {runs_dir / run: entry["role"] for run, entry in manifest["runs"].items()}
    states = observe([RunDir(path) for path in roles])
    own = [Run.of(path, role, state) for (path, role), state in zip(roles.items(), states, strict=True)]
    full = FullRank(runs_dir, own)
    rivals = [config for run in own if run.finished for config in full.configs_for(run)]
    labels = labels_of([*(run.config for run in own if run.config is not None), *rivals])
    by_variant: dict[str, list[Compared]] = defaultdict(list)
    # A manifest may have hashes of an earlier scheme. The variant of an unreadable run is known only from the manifest.
    noted: dict[str, str] = {run.name: manifest["runs"][run.name]["variant"] for run in own}
    known = {noted[run.name]: run.config.variant for run in own if run.config is not None}
    for run in own:
        variant: str = run.config.variant if run.config is not None else known.get(noted[run.name], noted[run.name])
        by_variant[variant].append(compared(run, labels.get(variant) or variant, full))
    arms = [Arm(label=members[0].label, variant=variant, members=members) for variant, members in by_variant.items()]
    # Earlier versions did not remove passwords from the manifest.
    launches = [credentials.without_passwords(launch) for launch in manifest["launches"]]
    return Study(name=name, question=manifest.get("question", ""), launches=launches, arms=arms, labels=labels)


def labels_of(configs: Sequence[RunConfig]) -> dict[str, str]:
    """Return a short name for each variant: the method, and the values that differ among the runs of the method."""
    labels: dict[str, str] = {}
    for method in dict.fromkeys(config.method.name for config in configs):
        own = [config for config in configs if config.method.name == method]
        fields = [{**spelled_out(config), "trainer.seed": None} for config in own]
        varied = sorted(
            name
            for name in {name for values in fields for name in values}
            if len({str(values.get(name)) for values in fields}) > 1
        )
        # A value that was not set follows from other values, for example alpha from the rank.
        given = [every_field(config) for config in own]
        varied = [name for name in varied if not all(values.get(name, name) is None for values in given)]
        models = {(config.model.name, str(config.model)) for config in own}
        if len(models) == len({name for name, _ in models}):
            varied = [name for name in varied if not name.startswith("model.") or name == "model.name"]
        for config, values in zip(own, fields, strict=True):
            parts = [f"{_short(name, config)}={_brief(name, values.get(name), config)}" for name in varied]
            labels[config.variant] = " ".join([method, *parts])
    return labels


SHORT_NAMES = {
    "schedule.restart_warmup_steps": "rewarm",
    "optimizer.name": "optimizer",
    "optimizer.learning_rate": "lr",
    "optimizer.embedding_learning_rate": "embedding_lr",
    "trainer.total_steps": "steps",
    "model.name": "model",
}
"""Short names, in labels, of settings that belong to no method (see Method.short_names)."""


def _short(name: str, config: RunConfig) -> str:
    return {**SHORT_NAMES, **config.method.short_names}.get(name, name.rpartition(".")[2])


def _brief(name: str, value: Any, config: RunConfig) -> str:
    if name == f"method.{config.method.restart_interval_field}" and not value:
        return "never"
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_row(member: Compared) -> dict[str, Any]:
    """Return a run as a flat record, for results.csv and JSON. A value that is not known is None."""
    run = member.run
    row: dict[str, Any] = {
        "run": run.name,
        "arm": member.label,
        "role": member.role,
        "rates": run.config.rates.in_full if run.config else None,
        "state": run.state,
        "message": member.tokens.note if run.diverged else run.message if not run.finished else "",
        "seed": run.config.trainer.seed if run.config else None,
        "method": run.config.method.name if run.config else None,
        "rank": run.config.rank if run.config else None,
        "reset_interval_steps": run.config.reset_interval_steps if run.config else None,
    }
    names = ["test_perplexity", "eval_perplexity", "test_loss", "eval_loss", "tokens", "flops", "training_seconds"]
    names += ["peak_memory_bytes", "parameters", "trainable_parameters", "restarts", "skipped_updates"]
    names += ["test_tokens", "test_bits_per_byte", "test_perplexity_as_published", "test_batches_as_published"]
    row |= {name: run.summary.get(name) if run.finished else None for name in names}
    published = run.config.published if run.config else None
    row["published_perplexity"] = published.perplexity.get(run.config.method.name) if run.config and published else None
    row["published_source"] = published.source if published else None
    row["tokens_per_second"] = run.summary["tokens"] / run.summary["training_seconds"] if run.finished else None
    row["baseline"] = member.baseline.name if member.baseline else None
    for axis in ("tokens", "flops", "seconds"):
        gap: Gap = getattr(member, axis)
        row[f"gap_at_equal_{axis}"], row[f"gap_at_equal_{axis}_note"] = gap.relative, gap.note
    row["tokens_to_baseline"] = member.tokens_to_baseline
    row["tokens_per_second_note"], row["peak_memory_bytes_note"] = member.speed_note, member.memory_note
    return row
