"""The config of a run: all groups, the checks that involve several groups, and the names of the run.

A RunConfig is validated when it is made, saved as run_dir/config.yaml, and never changed after that. Values that follow
from other fields are properties, and are not in the file.
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
from relora.config.data import DataConfig
from relora.config.groups import (
    ModelConfig,
    PlanConfig,
    ScheduleConfig,
    TrackerConfig,
    TrainerConfig,
)
from relora.config.published import PublishedConfig
from relora.config.rates import RatesConfig
from relora.core.schedule import RestartClock
from relora.methods.base import Method
from relora.optimizers.base import Optimizer

NAME_BYTES = 255
RUNS_DIR_BYTES = 3500
"""The most bytes of runs_dir, of the 4096 bytes of a path."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The full config of one run. Raises ConfigError, before torch is imported, for a config that cannot run."""

    model: ModelConfig
    data: DataConfig
    method: Method
    optimizer: Optimizer
    schedule: ScheduleConfig
    trainer: TrainerConfig
    cluster: ClusterConfig = field(default_factory=lambda: LocalConfig(name="local"), metadata=UNHASHED)
    tracker: TrackerConfig = field(default_factory=TrackerConfig, metadata=UNHASHED)
    plan: PlanConfig = field(default_factory=PlanConfig, metadata=UNHASHED)
    runs_dir: str = field(default="runs", metadata=UNHASHED)
    study: str | None = field(default=None, metadata=UNHASHED)
    rates: RatesConfig = field(default_factory=RatesConfig, metadata=UNHASHED)
    published: PublishedConfig | None = field(default=None, metadata=UNHASHED)

    def __post_init__(self) -> None:
        if not self.runs_dir:
            raise ConfigError("runs_dir= is empty; name a folder, or leave it out for the folder runs")
        if self.study is not None:
            check_name("study", self.study)
        check_strings("", self)
        self._check_budget()
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

    def _check_budget(self) -> None:
        if self.data.packing == "pad" and self.trainer.total_tokens is not None:
            raise ConfigError(
                f"trainer.total_tokens={shown(self.trainer.total_tokens)} is no budget with data.packing=pad, because "
                "the tokens of a step depend on its documents; set trainer.total_steps, and trainer.total_tokens=null"
            )

    def _check_warm_start(self) -> None:
        """A warm start has the configured model sizes, because runs of different methods share it."""
        vocab_size = self.model.vocab_size or self.data.vocab_size
        if self.trained_shape(vocab_size) != self.model.shape(vocab_size) and self.method.warm_start_steps:
            raise ConfigError(
                f"method={self.method.name} has no warm start: the sizes of its model differ from the configured "
                "sizes; set method.warm_start_steps=0"
            )

    def _check_clock(self) -> None:
        warm, total = self.method.warm_start_steps, self.total_steps
        at_most("trainer.total_steps", total, MOST_STEPS, "no run has that many steps")
        if warm >= total:
            raise ConfigError(
                f"method.warm_start_steps={warm} leaves no step of the run's {total} steps; "
                "lower it or raise trainer.total_steps"
            )
        phase, warmup, rewarm = total - warm, self.schedule.warmup_steps, self.schedule.restart_warmup_steps
        if warmup >= phase:
            raise ConfigError(
                f"schedule.warmup_steps={warmup} does not fit into the {phase} steps "
                f"{'after the warm start' if warm else 'of the run'}; lower it or raise trainer.total_steps"
            )
        interval, name_of_interval = self.reset_interval_steps, f"method.{self.method.restart_interval_field}"
        if interval is None:
            return
        if interval > phase:
            raise ConfigError(
                f"{name_of_interval}={interval} is longer than the {phase} steps "
                f"{'after the warm start' if warm else 'of the run'}; lower it, or set it to null for no restarts"
            )
        for name, value in (("warmup_steps", warmup), ("restart_warmup_steps", rewarm)):
            if value > interval:
                raise ConfigError(
                    f"schedule.{name}={value} does not fit into {name_of_interval}={interval}; lower schedule.{name}"
                )
        last = (phase - 1) // interval * interval
        if last and phase - last < rewarm:
            raise ConfigError(
                f"the last restart, at step {warm + last}, leaves {phase - last} steps, fewer than "
                f"schedule.restart_warmup_steps={rewarm}; change {name_of_interval}={interval} or "
                f"trainer.total_steps={total}"
            )

    def _check_length_of_paths(self) -> None:
        longest = max((len(os.fsencode(part)) for part in Path(self.runs_dir).parts), default=0)
        if longest > NAME_BYTES or len(os.fsencode(self.runs_dir)) > RUNS_DIR_BYTES:
            raise ConfigError(
                f"runs_dir={shown(self.runs_dir)} is too long: each folder's name may have {NAME_BYTES} bytes, and "
                f"runs_dir {RUNS_DIR_BYTES} bytes, which leaves room for the runs' files; use a shorter path"
            )

    def _check_processes(self) -> None:
        name = "cluster.nodes * cluster.tasks_per_node"
        check_divides(name, self.world_size, "trainer.sequences_per_step", self.trainer.sequences_per_step)

    def _check_update_in_backward(self) -> None:
        if not self.trainer.update_in_backward:
            return
        if type(self.method).before_update is not Method.before_update:
            raise ConfigError(
                f"trainer.update_in_backward=true does not work with method={self.method.name}: its before_update "
                "needs all gradients at once; set it to false"
            )
        norm, micro = self.optimizer.max_grad_norm, self.trainer.sequences_per_micro_step
        if norm is not None:
            raise ConfigError(
                f"trainer.update_in_backward=true cannot clip to optimizer.max_grad_norm={norm}: that needs all "
                "gradients first; set optimizer.max_grad_norm=null"
            )
        if micro is not None and micro < self.trainer.sequences_per_step:
            raise ConfigError(
                f"trainer.update_in_backward=true needs all {self.trainer.sequences_per_step} sequences of a batch "
                f"at once, not trainer.sequences_per_micro_step={micro} at a time; set it to null"
            )
        if self.world_size > 1:
            raise ConfigError(
                "trainer.update_in_backward=true works only with one process: several must sum gradients first; set "
                "cluster.nodes=1 cluster.tasks_per_node=1"
            )

    @property
    def world_size(self) -> int:
        """Number of processes that train the run, according to the config. torchrun may start more."""
        return self.cluster.world_size if isinstance(self.cluster, SlurmConfig) else 1

    @property
    def sequences_per_process(self) -> int:
        """Number of sequences of each step's batch that one process trains on."""
        return self.trainer.sequences_per_step // self.world_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, with the warm start. A budget in tokens is rounded up to whole steps."""
        if self.trainer.total_tokens is not None:
            return -(-parse_count("trainer.total_tokens", self.trainer.total_tokens) // self.tokens_per_step)
        assert self.trainer.total_steps is not None
        return self.trainer.total_steps

    @property
    def validation_interval_steps(self) -> int:
        """Steps between validations. It is a tenth of the run if the setting exceeds the run, to get a curve.

        A run is always validated at its start and at its end.
        """
        given, total = self.trainer.validation_interval_steps, self.total_steps
        return given if given <= total else max(1, total // 10)

    @property
    def remarks(self) -> list[str]:
        """Messages of a launch about settings that the run changes."""
        given, total = self.trainer.validation_interval_steps, self.total_steps
        if given <= total:
            return []
        return [
            f"trainer.validation_interval_steps={given} exceeds the run's {total} steps; the run validates every "
            f"{self.validation_interval_steps} steps (set it to {total} to validate only at the start and at the end)"
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step computes. With data.packing=pad some of them are padding."""
        return self.trainer.sequences_per_step * self.data.sequence_length_tokens

    @property
    def rank(self) -> int | None:
        """The method's rank; None at full rank."""
        return getattr(self.method, "rank", None)

    @property
    def reset_interval_steps(self) -> int | None:
        """Optimizer steps between restarts; None if the method never restarts."""
        return self.method.interval_steps

    @property
    def clock(self) -> RestartClock:
        """The clock that says at which steps the run restarts."""
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
        """Return the sizes of the model that is trained. The method may change them. Raises ConfigError."""
        return self.method.trained_shape(self.model.shape(vocab_size), self)

    def cost(self, vocab_size: int, *, warm_start: bool = False) -> Cost:
        """Return the cost of the run's model with its method, or, with `warm_start`, of the model at full rank."""
        if warm_start:
            return Method.cost(self.method, self.model.shape(vocab_size), self)
        return self.method.cost(self.trained_shape(vocab_size), self)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change the results, by dotted name (relora.config.identity)."""
        return identity.canonical(self)

    @property
    def config_hash(self) -> str:
        """The hash of the identity in the run's name: 8 hex digits."""
        return self.name.rpartition("-")[2]

    @property
    def comparison_key(self) -> str:
        """Hash of the fields that two runs must share to be compared.

        The fields are model, data, held-out sets, tokens, batch and precision, but not the seed.
        """
        return identity.digest({**identity.setting(self), "trainer.total_steps": self.total_steps})

    @property
    def setting_key(self) -> str:
        """The comparison_key without the budget. A shorter and a longer run of one setting share it."""
        return identity.digest(identity.setting(self))

    @property
    def variant(self) -> str:
        """The label and hash that runs share if they differ only in the seed."""
        fields = {name: value for name, value in self.identity.items() if name != "trainer.seed"}
        return self._label + identity.digest(fields)

    @property
    def name(self) -> str:
        """The run's name: a readable label and the hash of the identity.

        A run that an earlier version started keeps its earlier name.
        """
        names = [self._label + digits for digits in identity.hashes(self)]
        return next((name for name in names if (Path(self.runs_dir) / name).exists()), names[0])

    @property
    def _label(self) -> str:
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.model.name}-{self.method.name}{rank}-"

    @property
    def mlflow_uri(self) -> str:
        """The configured MLflow store, or a sqlite file in runs_dir."""
        return self.tracker.uri or f"sqlite:///{Path(self.runs_dir).absolute() / 'mlflow.db'}"

    @property
    def run_dir(self) -> Path:
        """The folder of the run: runs_dir/NAME."""
        return Path(self.runs_dir) / self.name


def fitting(share: int, wanted: int | None) -> int:
    """Return the largest number of sequences at a time that divides a process's `share` and is at most `wanted`.

    `wanted=None` means no limit.
    """
    return next(count for count in range(wanted or share, 0, -1) if share % count == 0)
