"""The full-rank runs that a sweep's other runs are measured against, where the sweep has none of its own."""

from collections.abc import Sequence
from dataclasses import replace

from relora.compose import full_rank, parsed
from relora.config import RunConfig
from relora.errors import ConfigError
from relora.groups import FullConfig, OptimizerConfig, ScheduleConfig
from relora.sweeps import Sweep
from relora.tuned import Presets

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
        self._own: dict[tuple[str, ...], tuple[OptimizerConfig, ScheduleConfig]] = {}

    def of(self, config: RunConfig) -> RunConfig:
        """The full-rank run for `config`, one of the sweep. Raises ConfigError where full rank's values do not fit."""
        overrides = self._overrides(config)
        try:
            if overrides not in self._own:
                self._own[overrides] = full_rank(overrides)
            optimizer, schedule = self._own[overrides]
            made = replace(
                config,
                method=FullConfig(name="full"),
                optimizer=replace(optimizer),
                schedule=replace(schedule, restart_warmup_steps=0),
            )
        except ConfigError as error:
            raise ConfigError(
                f"the full-rank baseline of {config.name} cannot be made: {error}; give the key "
                "one value, which then holds for full rank too, or name full-rank runs of your own: method=full,..."
            ) from error
        return self._presets.noted(made, [*overrides, "method=full"])

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


def launch_notes(baselines: Sequence[RunConfig]) -> list[str]:
    """What a launch says of the baselines that come by themselves."""
    return list(dict.fromkeys(map(in_words, baselines)))
