"""What a run is: all groups together, the checks across them, and the names that follow.

A RunConfig is made once, validated by being made, frozen as run_dir/config.yaml and never changed. What follows from
other fields is a property and stands in no file.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora.budget.cost import Cost, LlamaShape
from relora.common.checks import MOST_STEPS, UNHASHED, at_most, check_divides, check_name, check_strings, parse_count
from relora.common.errors import ConfigError, shown
from relora.config import identity
from relora.config.cluster import ClusterConfig, LocalConfig, SlurmConfig
from relora.config.groups import (
    DataConfig,
    ModelConfig,
    ScheduleConfig,
    TrackerConfig,
    TrainerConfig,
)
from relora.config.rates import RatesConfig
from relora.core.schedule import RestartClock
from relora.methods.base import Method
from relora.optimizers.base import Optimizer

NAME_BYTES = 255
RUNS_DIR_BYTES = 3500
"""Of the 4096 bytes of a path."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """All of one run. Raises ConfigError, before torch is imported, for anything that cannot run."""

    model: ModelConfig
    data: DataConfig
    method: Method
    optimizer: Optimizer
    schedule: ScheduleConfig
    trainer: TrainerConfig
    cluster: ClusterConfig = field(default_factory=lambda: LocalConfig(name="local"), metadata=UNHASHED)
    tracker: TrackerConfig = field(default_factory=TrackerConfig, metadata=UNHASHED)
    runs_dir: str = field(default="runs", metadata=UNHASHED)
    study: str | None = field(default=None, metadata=UNHASHED)
    rates: RatesConfig = field(default_factory=RatesConfig, metadata=UNHASHED)

    def __post_init__(self) -> None:
        if not self.runs_dir:
            raise ConfigError("runs_dir= is empty; name a folder, or leave it out for runs")
        if self.study is not None:
            check_name("study", self.study)
        check_strings("", self)
        self.method.check(self)
        self._check_warm_start()
        self._check_clock()
        self._check_processes()
        self._check_update_in_backward()
        if self.data.sequence_length_tokens > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.sequence_length_tokens={self.data.sequence_length_tokens} exceeds "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        vocab_size = self.model.vocab_size
        if vocab_size is not None and self.data.tokenizer is None and vocab_size < self.data.vocab_size:
            raise ConfigError(
                f"model.vocab_size={vocab_size} is below data.vocab_size={self.data.vocab_size}; "
                "leave model.vocab_size null or lower data.vocab_size"
            )
        self._check_length_of_paths()

    def _check_warm_start(self) -> None:
        """Runs of different methods share a warm start, so it has the configured sizes."""
        vocab_size = self.model.vocab_size or self.data.vocab_size
        if self.trained_shape(vocab_size) != self.model.shape(vocab_size) and self.method.warm_start_steps:
            raise ConfigError(
                f"method={self.method.name} has no warm start: it trains a model of other sizes than the configured "
                "one; set method.warm_start_steps=0"
            )

    def _check_clock(self) -> None:
        warm, total = self.method.warm_start_steps, self.total_steps
        at_most("trainer.total_steps", total, MOST_STEPS, "no run has as many updates")
        if warm >= total:
            raise ConfigError(
                f"method.warm_start_steps={warm} leaves nothing of the run's {total} steps; "
                "lower it or raise trainer.total_steps"
            )
        phase, warmup, rewarm = total - warm, self.schedule.warmup_steps, self.schedule.restart_warmup_steps
        if warmup >= phase:
            raise ConfigError(
                f"schedule.warmup_steps={warmup} does not fit into the {phase} steps "
                f"{'after the warm start' if warm else 'of the run'}; lower it or raise trainer.total_steps"
            )
        interval = self.reset_interval_steps
        if interval is None:
            return
        if interval > phase:
            raise ConfigError(
                f"method.reset_interval_steps={interval} is longer than the {phase} steps "
                f"{'after the warm start' if warm else 'of the run'}; lower it, or set it to null for no restarts"
            )
        for name, value in (("warmup_steps", warmup), ("restart_warmup_steps", rewarm)):
            if value > interval:
                raise ConfigError(
                    f"schedule.{name}={value} does not fit into method.reset_interval_steps={interval}; "
                    f"lower schedule.{name}"
                )
        last = (phase - 1) // interval * interval
        if last and phase - last < rewarm:
            raise ConfigError(
                f"the last restart, at step {warm + last}, leaves {phase - last} steps, fewer than "
                f"schedule.restart_warmup_steps={rewarm}; change method.reset_interval_steps={interval} or "
                f"trainer.total_steps={total}"
            )

    def _check_length_of_paths(self) -> None:
        longest = max((len(os.fsencode(part)) for part in Path(self.runs_dir).parts), default=0)
        if longest > NAME_BYTES or len(os.fsencode(self.runs_dir)) > RUNS_DIR_BYTES:
            raise ConfigError(
                f"runs_dir={shown(self.runs_dir)} is too long: a file system takes {NAME_BYTES} bytes for each "
                f"folder's name and {RUNS_DIR_BYTES} for runs_dir, so that the runs' files have room"
            )

    def _check_processes(self) -> None:
        name = "cluster.nodes * cluster.tasks_per_node"
        check_divides(name, self.world_size, "trainer.sequences_per_step", self.trainer.sequences_per_step)

    def _check_update_in_backward(self) -> None:
        if not self.trainer.update_in_backward:
            return
        if type(self.method).before_update is not Method.before_update:
            raise ConfigError(
                f"trainer.update_in_backward=true does not serve method={self.method.name}, whose before_update needs "
                "all gradients at once; set it to false"
            )
        norm, micro = self.optimizer.max_grad_norm, self.trainer.sequences_per_micro_step
        if norm is not None:
            raise ConfigError(
                f"trainer.update_in_backward=true cannot clip to optimizer.max_grad_norm={norm}: that needs all "
                "gradients first; set optimizer.max_grad_norm=null"
            )
        if micro is not None and micro < self.trainer.sequences_per_step:
            raise ConfigError(
                f"trainer.update_in_backward=true takes a batch at once, not trainer.sequences_per_micro_step={micro} "
                f"of {self.trainer.sequences_per_step} sequences at a time; set it to null"
            )
        if self.world_size > 1:
            raise ConfigError(
                "trainer.update_in_backward=true is for one process: several sum their gradients first; set "
                "cluster.nodes=1 cluster.tasks_per_node=1"
            )

    @property
    def world_size(self) -> int:
        """That train the run together, as far as its config knows: torchrun may start more."""
        return self.cluster.world_size if isinstance(self.cluster, SlurmConfig) else 1

    @property
    def sequences_per_process(self) -> int:
        """The share of each in an update's batch."""
        return self.trainer.sequences_per_step // self.world_size

    @property
    def total_steps(self) -> int:
        """Updates of the whole run, warm start included; a token budget is rounded up to whole updates."""
        if self.trainer.total_tokens is not None:
            return -(-parse_count("trainer.total_tokens", self.trainer.total_tokens) // self.tokens_per_step)
        assert self.trainer.total_steps is not None
        return self.trainer.total_steps

    @property
    def validation_interval_steps(self) -> int:
        """Updates between validations; a tenth of the run where the setting exceeds it, else no curve could be drawn.

        The start and the end of a run are validated in any case.
        """
        given, total = self.trainer.validation_interval_steps, self.total_steps
        return given if given <= total else max(1, total // 10)

    @property
    def remarks(self) -> list[str]:
        """What a launch says of values that the run adapts."""
        given, total = self.trainer.validation_interval_steps, self.total_steps
        if given <= total:
            return []
        return [
            f"trainer.validation_interval_steps={given} exceeds the run's {total} updates; it validates every "
            f"{self.validation_interval_steps} instead (set {total} to validate at the start and at the end alone)"
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens trained on by one update."""
        return self.trainer.sequences_per_step * self.data.sequence_length_tokens

    @property
    def rank(self) -> int | None:
        """The method's rank, None at full rank."""
        return getattr(self.method, "rank", None)

    @property
    def reset_interval_steps(self) -> int | None:
        """Updates between restarts, None where the method never restarts."""
        return getattr(self.method, "reset_interval_steps", None)

    @property
    def clock(self) -> RestartClock:
        """The run's clock."""
        return RestartClock(
            total_steps=self.total_steps,
            reset_interval_steps=self.reset_interval_steps,
            warm_start_steps=self.method.warm_start_steps,
        )

    @property
    def warm_start_learning_rate(self) -> float:
        """Base learning rate of the warm start."""
        return self.method.warm_start_learning_rate or self.optimizer.learning_rate

    def trained_shape(self, vocab_size: int) -> LlamaShape:
        """The sizes of the model that is trained, which a method may change. Raises ConfigError."""
        return self.method.trained_shape(self.model.shape(vocab_size), self)

    def cost(self, vocab_size: int, *, warm_start: bool = False) -> Cost:
        """What the run's model and method take; with `warm_start`, what the model takes at full rank."""
        if warm_start:
            return Method.cost(self.method, self.model.shape(vocab_size), self)
        return self.method.cost(self.trained_shape(vocab_size), self)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change the results, by dotted name (relora.config.identity)."""
        return identity.canonical(self)

    @property
    def config_hash(self) -> str:
        """8 hex digits of the identity: those in the run's name."""
        return self.name.rpartition("-")[2]

    @property
    def comparison_key(self) -> str:
        """What two runs must share to be compared: model, data, held-out sets, tokens, batch and precision, no seed."""
        return identity.digest({**identity.setting(self), "trainer.total_steps": self.total_steps})

    @property
    def setting_key(self) -> str:
        """The comparison_key without the budget: what a shorter and a longer run of one setting share."""
        return identity.digest(identity.setting(self))

    @property
    def variant(self) -> str:
        """What runs share that differ in their seed alone."""
        fields = {name: value for name, value in self.identity.items() if name != "trainer.seed"}
        return self._label + identity.digest(fields)

    @property
    def name(self) -> str:
        """The run's name: a label for people, and the hash of its identity.

        A run that an earlier version began keeps the name that it had there.
        """
        names = [self._label + digits for digits in identity.hashes(self)]
        return next((name for name in names if (Path(self.runs_dir) / name).exists()), names[0])

    @property
    def _label(self) -> str:
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.model.name}-{self.method.name}{rank}-"

    @property
    def mlflow_uri(self) -> str:
        """The configured MLflow store, or a sqlite file under runs_dir."""
        return self.tracker.uri or f"sqlite:///{Path(self.runs_dir).absolute() / 'mlflow.db'}"

    @property
    def run_dir(self) -> Path:
        """runs_dir/NAME-HASH."""
        return Path(self.runs_dir) / self.name


def fitting(share: int, wanted: int | None) -> int:
    """The most sequences at a time, up to `wanted` (None: any number), that divide a process's `share` evenly."""
    return next(count for count in range(wanted or share, 0, -1) if share % count == 0)
