"""The full-rank runs that a sweep's other runs are measured against, where the sweep has none of its own."""

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
"""Of full rank's learning rate, where it is not tuned for the setting."""
NOT_ITS_OWN = ("method", "sweeps", "study", "runs_dir")
"""Keys without a dot that choose nothing of full rank's values."""
OF_FULL_RANK = ("optimizer", "schedule")
"""Groups that come from full rank's own config, whatever the other runs sweep of them."""
OF_RESTARTS = "schedule.restart_warmup_steps"
"""What full rank has no use for."""


class Baselines:
    """Full rank in the setting of other runs, with the optimizer and the schedule of its own config.

    What the command line fixes for all runs of the sweep holds for full rank too. What is swept, or set by one grid of
    a file, does not: the order of the values would decide.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._presets = Presets()
        self._own: dict[tuple[str, ...], tuple[Optimizer, ScheduleConfig]] = {}

    def of(self, config: RunConfig) -> RunConfig:
        """The full-rank run for `config`, one of the sweep. Raises ConfigError where full rank's values do not fit."""
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
                "one value, which then holds for full rank too, or name full-rank runs of your own: method=full,..."
            ) from error
        return self._presets.noted(made, [*overrides, f"method={BASELINE}"])

    def ladder(self, base: RunConfig) -> list[RunConfig]:
        """The full-rank run `base` at multiples of its learning rate, so that a bad rate is never the reference.

        Rates that were tuned for the setting had their ladder when they were tuned: they stand alone.
        """
        factors = self.sweep.baseline_rates
        if factors is None:
            factors = [1.0] if base.rates.basis == "tuned" else list(FACTORS)
        return [base if factor == 1 else _at(base, factor) for factor in factors]

    def _overrides(self, config: RunConfig) -> tuple[str, ...]:
        """What decides full rank's optimizer and schedule, in the order of the command line."""
        fixed = set(self.sweep.fixed)
        chosen: list[str] = []
        for key, texts in parsed(self.sweep.arguments.get(config.config_hash, self.sweep.fixed)):
            name = key.lstrip("+~")
            group = name.partition(".")[0]
            of_full_rank = group in OF_FULL_RANK and texts[0] in fixed and name != OF_RESTARTS
            if of_full_rank or ("." not in name and name not in (*NOT_ITS_OWN, *OF_FULL_RANK)):
                chosen += texts[:1]
        file = [] if self.sweep.file is None else [f"sweeps={self.sweep.file}"]
        return (*file, *chosen)


def in_words(baseline: RunConfig) -> str:
    """At which rates and by which schedule a baseline is trained, and where they come from; the same for every seed."""
    optimizer, schedule, rates = baseline.optimizer, baseline.schedule, baseline.rates
    embeddings = optimizer.embedding_learning_rate
    parts = [f"learning rate {optimizer.learning_rate:g}"]
    parts += [f"{embeddings:g} for embeddings, head and norms"] if embeddings is not None else []
    parts += [f"{schedule.warmup_steps} updates of warm-up, then down to {schedule.min_lr_ratio:g} of the rate"]
    given = f", with {' '.join(rates.given)} as given for all runs" if rates.given else ""
    return f"full rank as the baseline: {', '.join(parts)}; from {rates.source}{given}"


def _at(base: RunConfig, factor: float) -> RunConfig:
    """`base` with its learning rate times `factor`, in six digits so that the same rate is the same run.

    A rate of their own for embeddings, head and norms stays: lowered with the other one it is soon too low, and the
    lower steps would then look worse than they are.
    """
    rate = float(f"{factor * base.optimizer.learning_rate:.6g}")
    optimizer = replace(base.optimizer, learning_rate=rate)
    return replace(base, optimizer=optimizer, rates=replace(base.rates, basis="ladder"))


def launch_notes(baselines: Sequence[RunConfig], everything: Sequence[RunConfig]) -> list[str]:
    """What a launch says of the baselines that come by themselves; `everything`: all runs of the study."""
    notes = list(dict.fromkeys(in_words(run) for run in baselines if run.rates.basis != "ladder"))
    ladder = [run for run in baselines if run.rates.basis == "ladder"]
    if ladder:
        rates = sorted({run.optimizer.learning_rate for run in everything if run.method.is_full_rank})
        total_flops = sum(cost_of(run).total_flops for run in everything)
        share = sum(cost_of(run).total_flops for run in ladder) / total_flops
        notes.append(
            f"full rank is tried at other rates too ({', '.join(f'{rate:g}' for rate in rates)}) and the best on "
            f"validation becomes the baseline: {len(ladder)} of the {len(everything)} runs, {share:.0%} of the study's "
            "FLOPs; baseline_rates=[1] leaves them out"
        )
    return notes
