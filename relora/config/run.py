"""What a run is: all groups together, the checks across them, and the hash and names that follow.

A RunConfig is made once, validated by being made, frozen as run_dir/config.yaml and never changed. What follows from
other fields is a property and stands in no file.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora.budget.cost import Cost, LlamaShape
from relora.common.checks import MOST_STEPS, UNHASHED, at_most, check_name, check_strings, parse_count
from relora.common.errors import ConfigError, shown
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
        processes, whole = self.processes, self.trainer.sequences_per_step
        if whole % processes:
            raise ConfigError(
                f"trainer.sequences_per_step={whole} cannot be shared evenly by cluster.nodes * cluster.tasks_per_node "
                f"= {processes} processes; take a multiple of {processes}"
            )

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
        if self.processes > 1:
            raise ConfigError(
                "trainer.update_in_backward=true is for one process: several sum their gradients first; set "
                "cluster.nodes=1 cluster.tasks_per_node=1"
            )

    @property
    def processes(self) -> int:
        """That train the run together, as far as its config knows: torchrun may start more."""
        return self.cluster.processes if isinstance(self.cluster, SlurmConfig) else 1

    @property
    def sequences_per_process(self) -> int:
        """The share of each in an update's batch."""
        return self.trainer.sequences_per_step // self.processes

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
        """The fields that change the mathematics and differ from their default, flat, by dotted name.

        Values that mean the same are written the same, and fields that have no effect beside the others are left out.
        """
        interval, phase_steps = self.reset_interval_steps, self.total_steps - self.method.warm_start_steps
        fields = self.method.canonical(self._fields_of_the_first_version, self)
        if interval is None or interval >= phase_steps:  # nothing is restarted
            fields.pop("schedule.restart_warmup_steps", None)
        if self.data.tokenizer is not None:
            fields.pop("data.vocab_size", None)
        if self.data.name == "stdlib":
            fields.pop("data.text_field", None)
        # -0.0 is 0.0, but JSON writes another text.
        return {name: value + 0.0 if isinstance(value, float) else value for name, value in sorted(fields.items())}

    @property
    def _fields_of_the_first_version(self) -> dict[str, Any]:
        """What version 0.1 made the hash from, so that the folders of its runs are found (`name`).

        A token budget is written as its steps, an `alpha` of None as its value.
        """
        fields = _flat_fields(self)
        fields["trainer.total_steps"] = self.total_steps
        fields |= self.method.written_out
        if self.method.warm_start_steps:
            fields["method.warm_start_learning_rate"] = self.warm_start_learning_rate
        else:
            fields.pop("method.warm_start_learning_rate", None)
        if self.reset_interval_steps is None:
            fields.pop("schedule.restart_warmup_steps", None)
        rates = {self.optimizer.learning_rate}
        if self.method.warm_start_steps:
            rates.add(self.warm_start_learning_rate)
        if rates == {self.optimizer.embedding_learning_rate}:
            fields.pop("optimizer.embedding_learning_rate")
        return dict(sorted(fields.items()))

    @property
    def config_hash(self) -> str:
        """8 hex digits of the identity."""
        return _digest(self.identity)

    @property
    def comparison_key(self) -> str:
        """What two runs must share to be compared: model, data, held-out sets, tokens, batch and precision, no seed."""
        return _digest({**self._setting, "trainer.total_steps": self.total_steps})

    @property
    def setting_key(self) -> str:
        """The comparison_key without the budget: what a shorter and a longer run of one setting share."""
        return _digest(self._setting)

    @property
    def _setting(self) -> dict[str, Any]:
        batch = ("trainer.sequences_per_step", "trainer.precision")
        return {
            name: value
            for name, value in self.identity.items()
            if name.startswith(("model.", "data.")) or name in batch
        }

    @property
    def variant(self) -> str:
        """What runs share that differ in their seed alone."""
        return self._named({name: value for name, value in self.identity.items() if name != "trainer.seed"})

    @property
    def name(self) -> str:
        """The run's name: what people read, and the hash that tells it from its neighbours.

        A run that an earlier version began, under the hash that it had there, keeps that name.
        """
        name, earlier = self._named(self.identity), self._named(self._fields_of_the_first_version)
        runs_dir = Path(self.runs_dir)
        if earlier != name and (runs_dir / earlier).exists() and not (runs_dir / name).exists():
            return earlier
        return name

    def _named(self, identity: dict[str, Any]) -> str:
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.model.name}-{self.method.name}{rank}-{_digest(identity)}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Every field that changes the mathematics, flat, for a tracker's table.

        What a method does not have of rank, interval and pruning ratio is 0: the UI's parallel coordinates leave out
        whatever lacks one of its axes.
        """
        return {
            "method.optimizer_reset.pruning_ratio": 0.0,
            **_flat_fields(self, include_defaults=True),
            **self.identity,
            "method.rank": self.rank or 0,
            "method.reset_interval_steps": self.reset_interval_steps or 0,
            "model.name": self.model.name,
        }

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


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def _flat_fields(node: Any, prefix: str = "", *, include_defaults: bool = False) -> dict[str, Any]:
    """The hashed fields by dotted name; those at their default only where asked."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(node):
        if not item.metadata.get("identity", True):
            continue
        value, name = getattr(node, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            found.update(_flat_fields(value, name + ".", include_defaults=include_defaults))
        elif include_defaults or item.default is dataclasses.MISSING or value != item.default:
            found[name] = value
    return found
