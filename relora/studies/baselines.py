"""Add full-rank runs as baselines to a sweep that lacks them."""

from collections.abc import Sequence
from dataclasses import replace

from relora.common.errors import ConfigError
from relora.config.compose import full_rank
from relora.config.groups import ScheduleConfig
from relora.config.overrides import parsed
from relora.config.plan import run_plan as cost_of
from relora.config.run import RunConfig
from relora.config.tuned import Presets
from relora.methods.registry import BASELINE, METHODS
from relora.optimizers.base import Optimizer
from relora.studies.sweeps import Sweep

FACTORS = (0.25, 0.5, 1.0, 2.0)
"""If full rank's learning rate was not tuned for the setting, these multiples of it are tried."""
OTHER_GROUPS = ("method", "sweeps", "study", "runs_dir")
"""Keys without a dot that set no optimizer or schedule value of full rank."""
FULL_RANK_GROUPS = ("optimizer", "schedule")
"""Config groups that come from full rank's own config, even if the sweep varies their values for the other runs."""
RESTART_KEY = "schedule.restart_warmup_steps"
"""A key that full rank does not use."""


class Baselines:
    """Makes the full-rank baselines of the runs of a sweep.

    A baseline has the setting of its run. Its optimizer and schedule come from full rank's own config. If the command
    line gives one value for all runs of the sweep, full rank uses that value too. Full rank does not use a value that
    is swept or that comes from one grid of a file: the order of the values would decide which one it gets.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._presets = Presets()
        self._own: dict[tuple[str, ...], tuple[Optimizer, ScheduleConfig]] = {}

    def of(self, config: RunConfig) -> RunConfig:
        """Return the full-rank run for one run of the sweep. Raises ConfigError if full rank's values do not fit."""
        overrides = self._overrides(config)
        try:
            if overrides not in self._own:
                self._own[overrides] = full_rank(overrides)
            optimizer, schedule = self._own[overrides]
            made = replace(
                config,
                method=METHODS.find(BASELINE)(name=BASELINE),
                optimizer=replace(optimizer),
                schedule=replace(schedule, restart_warmup_steps=0),
            )
        except ConfigError as error:
            raise ConfigError(
                f"the full-rank baseline of {config.name} cannot be made: {error}; give the key "
                "one value, which full rank then uses too, or add full-rank runs to the sweep: method=full,..."
            ) from error
        return self._presets.noted(made, [*overrides, f"method={BASELINE}"])

    def ladder(self, base: RunConfig) -> list[RunConfig]:
        """Return the full-rank run `base` at several multiples of its learning rate.

        With several rates, a single bad rate does not become the reference. If the rate was tuned for the setting, only
        that rate is used: other rates were tried when it was tuned. The key baseline_rates sets the multiples for both
        cases.
        """
        factors = self.sweep.baseline_rates
        if factors is None:
            factors = [1.0] if base.rates.basis == "tuned" else list(FACTORS)
        return [base if factor == 1 else _at(base, factor) for factor in factors]

    def _overrides(self, config: RunConfig) -> tuple[str, ...]:
        """Return the overrides that decide full rank's optimizer and schedule, in the order of the command line."""
        fixed = set(self.sweep.fixed)
        chosen: list[str] = []
        for key, texts in parsed(self.sweep.arguments.get(config.config_hash, self.sweep.fixed)):
            name = key.lstrip("+~")
            group = name.partition(".")[0]
            of_full_rank = group in FULL_RANK_GROUPS and texts[0] in fixed and name != RESTART_KEY
            if of_full_rank or ("." not in name and name not in (*OTHER_GROUPS, *FULL_RANK_GROUPS)):
                chosen += texts[:1]
        file = [] if self.sweep.file is None else [f"sweeps={self.sweep.file}"]
        return (*file, *chosen)


def in_words(baseline: RunConfig) -> str:
    """Describe the rates and the schedule of a baseline, and their source. All seeds give the same text."""
    optimizer, schedule, rates = baseline.optimizer, baseline.schedule, baseline.rates
    embeddings = optimizer.embedding_learning_rate
    parts = [f"learning rate {optimizer.learning_rate:g}"]
    parts += [f"{embeddings:g} for embeddings, head and norms"] if embeddings is not None else []
    parts += [f"{schedule.warmup_steps} steps of warm-up, then down to {schedule.min_lr_ratio:g} of the rate"]
    given = f", with the values given for all runs: {' '.join(rates.given)}" if rates.given else ""
    return f"full rank as the baseline: {', '.join(parts)}; from {rates.source}{given}"


def _at(base: RunConfig, factor: float) -> RunConfig:
    """Return `base` with its learning rate times `factor`.

    The rate is rounded to six digits, so that equal rates give the same run. A separate rate for embeddings, head and
    norms does not change. If it were lowered too, it would soon be too low, and the lower rates would look worse than
    they are.
    """
    rate = float(f"{factor * base.optimizer.learning_rate:.6g}")
    optimizer = replace(base.optimizer, learning_rate=rate)
    return replace(base, optimizer=optimizer, rates=replace(base.rates, basis="ladder"))


def launch_notes(baselines: Sequence[RunConfig], everything: Sequence[RunConfig]) -> list[str]:
    """Return the notes for the user about the baselines that a launch adds.

    Args:
        baselines: The added full-rank runs.
        everything: All runs of the study.
    """
    notes = list(dict.fromkeys(in_words(run) for run in baselines if run.rates.basis != "ladder"))
    ladder = [run for run in baselines if run.rates.basis == "ladder"]
    if ladder:
        rates = sorted({run.optimizer.learning_rate for run in everything if run.method.is_full_rank})
        total_flops = sum(cost_of(run).total_flops for run in everything)
        share = sum(cost_of(run).total_flops for run in ladder) / total_flops
        notes.append(
            f"full rank is also trained at other rates ({', '.join(f'{rate:g}' for rate in rates)} in all) and the "
            f"best on validation becomes the baseline; the other rates are {len(ladder)} of the {len(everything)} runs "
            f"and {share:.0%} of the study's FLOPs; set baseline_rates=[1] to leave them out"
        )
    return notes
