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

from relora.budget.cost import Cost, LlamaShape, control_shape, cost
from relora.common.errors import ConfigError, shown
from relora.config.checks import at_most, check_name, check_strings, parse_count
from relora.config.cluster import ClusterConfig, LocalConfig, SlurmConfig
from relora.config.groups import (
    MOST_STEPS,
    UNHASHED,
    ControlConfig,
    DataConfig,
    GaLoreConfig,
    LoRAConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    ReLoRAMethodConfig,
    ScheduleConfig,
    TargetedConfig,
    TrackerConfig,
    TrainerConfig,
)
from relora.config.rates import RatesConfig
from relora.core.schedule import RestartClock

OF_A_RESTART = ("schedule.restart_warmup_steps", "method.optimizer_reset.")
NAME_BYTES = 255
RUNS_DIR_BYTES = 3500
"""Of the 4096 bytes of a path."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """All of one run. Raises ConfigError, before torch is imported, for anything that cannot run."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    optimizer: OptimizerConfig
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
        self._check_targets()
        self._check_control()
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

    def _check_targets(self) -> None:
        method = self.method
        if not isinstance(method, TargetedConfig):
            return
        linears = self.model.shape(vocab_size=1).linears()
        endings = sorted({name.rpartition(".")[2] for name in linears})
        if not method.target_modules:
            raise ConfigError(f"method.target_modules is empty; name some of {', '.join(endings)}")
        known = {ending for name in linears for ending in _endings(name)}
        for ending in method.target_modules:
            if ending not in known:
                raise ConfigError(
                    f"method.target_modules: {shown(repr(ending))} matches no linear layer; the model has "
                    f"{', '.join(endings)}"
                )
        chosen = set(method.target_modules)
        for name, (i, o) in linears.items():
            if method.rank > min(i, o) and not chosen.isdisjoint(_endings(name)):
                raise ConfigError(
                    f"rank={shown(method.rank)} exceeds min(in, out)={min(i, o)} of {name}; lower method.rank"
                )

    def _check_control(self) -> None:
        """Before the tokenizer is there, the vocabulary is the one that the config asks for."""
        if isinstance(self.method, ControlConfig):
            if self.method.warm_start_steps:
                raise ConfigError(
                    "method=control has no warm start: the whole model cannot become a smaller one; "
                    "set method.warm_start_steps=0"
                )
            self.trained_shape(self.model.vocab_size or self.data.vocab_size)

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
        return self.method.rank if isinstance(self.method, TargetedConfig) else None

    @property
    def reset_interval_steps(self) -> int | None:
        """Updates between restarts, None where the method never restarts."""
        return self.method.reset_interval_steps if isinstance(self.method, ReLoRAMethodConfig) else None

    @property
    def clock(self) -> RestartClock:
        """The run's clock."""
        return RestartClock(
            total_steps=self.total_steps,
            restart_interval_steps=self.reset_interval_steps,
            warm_start_steps=self.method.warm_start_steps,
        )

    @property
    def warm_start_learning_rate(self) -> float:
        """Base learning rate of the warm start."""
        return self.method.warm_start_learning_rate or self.optimizer.learning_rate

    def trained_shape(self, vocab_size: int) -> LlamaShape:
        """The sizes that are trained: the configured ones, but for the control arm, which is sized to match.

        Raises ConfigError where no such control exists.
        """
        shape, method = self.model.shape(vocab_size), self.method
        if not isinstance(method, ControlConfig):
            return shape
        matched = cost(
            shape,
            sequence_length_tokens=self.data.sequence_length_tokens,
            rank=method.rank,
            target_modules=method.target_modules,
        )
        try:
            return control_shape(shape, matched.trainable_parameters)
        except ValueError as error:
            raise ConfigError(f"method=control, method.rank={method.rank}: {error}") from error

    def cost(self, vocab_size: int, *, warm_start: bool = False) -> Cost:
        """What the run's model and method take; with `warm_start`, what the model takes at full rank."""
        method: MethodConfig | None = None if warm_start else self.method
        return cost(
            self.model.shape(vocab_size) if warm_start else self.trained_shape(vocab_size),
            sequence_length_tokens=self.data.sequence_length_tokens,
            precision=self.trainer.precision,
            rank=method.rank if isinstance(method, LoRAConfig) else None,
            target_modules=method.target_modules if isinstance(method, TargetedConfig) else (),
            trainable_scaling=isinstance(method, LoRAConfig) and method.trainable_scaling,
            mergeable=not isinstance(method, LoRAConfig) or method.dropout == 0,
            galore_rank=method.rank if isinstance(method, GaLoreConfig) else None,
            galore_interval_steps=method.update_interval_steps if isinstance(method, GaLoreConfig) else 1,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change the mathematics and differ from their default, flat, by dotted name.

        Values that mean the same are written the same, and fields that have no effect beside the others are left out.
        """
        fields = self._fields_of_the_first_version
        phase_steps = self.total_steps - self.method.warm_start_steps
        if isinstance(self.method, TargetedConfig):
            fields["method.target_modules"] = self._targeted()
        if isinstance(self.method, GaLoreConfig) and self.method.update_interval_steps > phase_steps:
            fields["method.update_interval_steps"] = phase_steps
        if self.reset_interval_steps is None or self.reset_interval_steps >= phase_steps:  # nothing is restarted
            fields = {name: value for name, value in fields.items() if not name.startswith(OF_A_RESTART)}
            if isinstance(self.method, ReLoRAMethodConfig):
                fields["method.reset_interval_steps"] = None
        elif isinstance(self.method, ReLoRAMethodConfig):
            fields = {name: value for name, value in fields.items() if not name.startswith("method.optimizer_reset.")}
            reset = _flat_fields(self.method.optimizer_reset.effective)
            fields |= {f"method.optimizer_reset.{name}": value for name, value in reset.items()}
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
        if isinstance(self.method, LoRAConfig):
            fields["method.alpha"] = float(self.method.alpha or 0.25 * self.method.rank)
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

    def _targeted(self) -> list[str]:
        """`target_modules` in the model's order, each matrix once: by its ending, or whole where not all layers are."""
        assert isinstance(self.method, TargetedConfig)
        chosen = set(self.method.target_modules)
        by_ending: dict[str, list[str]] = {}
        for name in self.model.shape(vocab_size=1).linears():
            by_ending.setdefault(name.rpartition(".")[2], []).append(name)
        targeted: list[str] = []
        for ending, names in by_ending.items():
            found = [name for name in names if not chosen.isdisjoint(_endings(name))]
            targeted += [ending] if found == names else found
        return targeted

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


def _endings(name: str) -> list[str]:
    """What a name in `target_modules` may be to match the module `name` (relora.budget.cost.module_matches)."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


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
