"""The settings of a run: one dataclass per config group. Each dataclass checks its own fields.

The settings of data, methods, optimizers and clusters are in other files.

Fields with the metadata UNHASHED do not change the mathematics of a run, and its hash leaves them out. All errors are
ConfigError: the value, the rule and the remedy.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from relora.budget.cost import STORAGE_BYTES, LlamaShape
from relora.common.checks import (
    MOST_STEPS,
    UNHASHED,
    at_least,
    at_most,
    check_divides,
    check_name,
    fraction,
    one_of,
    parse_bytes,
    parse_count,
    positive,
)
from relora.common.errors import ConfigError, shown

TRACKERS = ("mlflow", "jsonl")

LARGEST_MODEL = {
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "layers": 1000,
    "heads": 2**15,
    "kv_heads": 2**15,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
}
"""Limits above all practical models. They keep the cost computation fast, because it loops over all layers."""
MOST_SEQUENCES = 2**20


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A Llama-style decoder. None means: `kv_heads` as many as `heads`, `vocab_size` that of the tokenizer."""

    name: str = field(metadata=UNHASHED)
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_name("model.name", self.name)
        for name, maximum in LARGEST_MODEL.items():
            at_least(f"model.{name}", getattr(self, name), 1)
            at_most(f"model.{name}", getattr(self, name), maximum, "no model is that large")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} must be an even multiple of model.heads={self.heads} "
                "(rotary embeddings turn pairs)"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads} (each head of keys and "
                "values serves the same number of query heads)"
            )
        positive("model.rms_norm_eps", self.rms_norm_eps)
        at_most("model.rms_norm_eps", self.rms_norm_eps, 1, "a larger value outweighs the values that it normalizes")

    def shape(self, vocab_size: int) -> LlamaShape:
        """Return the sizes from which costs are computed."""
        return LlamaShape(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            vocab_size=vocab_size,
        )


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The jagged cosine schedule (relora.core.schedule)."""

    name: str = "jagged_cosine"
    warmup_steps: int
    restart_warmup_steps: int = 0
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        one_of("schedule.name", self.name, ("jagged_cosine",))
        at_least("schedule.warmup_steps", self.warmup_steps, 0)
        at_least("schedule.restart_warmup_steps", self.restart_warmup_steps, 0, " (0: no re-warm-up)")
        for name in ("warmup_steps", "restart_warmup_steps"):
            at_most(f"schedule.{name}", getattr(self, name), MOST_STEPS, "no run has that many steps")
        fraction("schedule.min_lr_ratio", self.min_lr_ratio)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Budget, batch, precision and intervals of a run.

    total_tokens: If it is set, it replaces `total_steps`.
    sequences_per_step: The batch of one optimizer step, divided among all processes.
    sequences_per_micro_step: The most sequences of its share that a process trains on at a time. None: the most that
        fit into the memory of its device.
    """

    total_steps: int | None = field(default=None, metadata=UNHASHED)
    total_tokens: Any = field(default=None, metadata=UNHASHED)
    sequences_per_step: int
    sequences_per_micro_step: int | None = field(default=None, metadata=UNHASHED)
    precision: str = "fp32"
    seed: int = 0
    device: str = field(default="auto", metadata=UNHASHED)
    compile: bool = field(default=False, metadata=UNHASHED)
    activation_checkpointing: bool = field(default=False, metadata=UNHASHED)
    update_in_backward: bool = field(default=False, metadata=UNHASHED)
    log_interval_steps: int = field(default=1, metadata=UNHASHED)
    validation_interval_steps: int = field(default=100, metadata=UNHASHED)
    checkpoint_interval_steps: int = field(default=100, metadata=UNHASHED)
    max_consecutive_skipped_updates: int = field(default=10, metadata=UNHASHED)

    def __post_init__(self) -> None:
        if self.total_steps is None and self.total_tokens is None:
            raise ConfigError("the run has no budget; set trainer.total_steps or trainer.total_tokens")
        if self.total_tokens is not None:
            parse_count("trainer.total_tokens", self.total_tokens)
        whole, micro = self.sequences_per_step, self.sequences_per_micro_step
        at_least("trainer.sequences_per_step", whole, 1)
        at_most("trainer.sequences_per_step", whole, MOST_SEQUENCES, "no step has that many sequences")
        at_least("trainer.sequences_per_micro_step", micro, 1)
        if micro is not None:
            check_divides("trainer.sequences_per_micro_step", micro, "trainer.sequences_per_step", whole)
        one_of("trainer.precision", self.precision, tuple(STORAGE_BYTES))
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", self.device, re.ASCII):
            raise ConfigError(f"trainer.device={shown(self.device)} is not one of auto, cpu, cuda, cuda:N")
        at_least("trainer.seed", self.seed, 0)
        at_most("trainer.seed", self.seed, 2**63 - 1, "random number generators accept 63 bits")
        at_most("trainer.total_steps", self.total_steps, MOST_STEPS, "no run has that many steps")
        for name in ("total_steps", "log_interval_steps", "validation_interval_steps", "checkpoint_interval_steps"):
            at_least(f"trainer.{name}", getattr(self, name), 1)
        at_least("trainer.max_consecutive_skipped_updates", self.max_consecutive_skipped_updates, 1)


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What a plan assumes about the device on which a run trains. Nothing here changes the results of a run.

    device_memory: The memory of one process, such as 80GiB. The number of sequences at a time is chosen to fit into it,
        in plans and in runs. None means the memory that is free there.
    flops_per_second: The FLOPs that all processes together compute in a second, from which hours are estimated. None
        means what was measured in runs_dir.
    """

    device_memory: Any = None
    flops_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.device_memory is not None:
            parse_bytes("plan.device_memory", self.device_memory)
        positive("plan.flops_per_second", self.flops_per_second)

    @property
    def device_bytes(self) -> int | None:
        """`device_memory` as a number of bytes."""
        return None if self.device_memory is None else parse_bytes("plan.device_memory", self.device_memory)


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """The place to which metrics are also written, besides run_dir/metrics.jsonl.

    name: "mlflow" copies the metrics to the MLflow store `uri`. "jsonl" writes only the file.
    uri: None means a sqlite file in runs_dir.
    """

    name: str = "mlflow"
    uri: str | None = None
    experiment: str = "relora"

    def __post_init__(self) -> None:
        one_of("tracker.name", self.name, TRACKERS)
        if self.uri is not None and not re.match(r"(sqlite:///.|(https?|postgresql|mysql|mssql)[+a-z]*://.)", self.uri):
            raise ConfigError(
                f"tracker.uri={shown(self.uri)} is not a store; use sqlite:///FILE, http://HOST:PORT or a database URI"
            )
        if not self.experiment:
            raise ConfigError("tracker.experiment must not be empty")


OTHER_ARCHITECTURES = (
    *("bart", "bert", "bloom", "cohere", "deepseek", "electra", "falcon", "gemma", "gpt", "gptj", "gptneo", "gptneox"),
    *("granite", "jamba", "mamba", "mistral", "mixtral", "mpt", "nanogpt", "olmo", "opt", "phi", "pythia", "qwen"),
    *("roberta", "rwkv", "stablelm", "starcoder", "xlnet"),
)


def check_architecture(name: str) -> None:
    """Raise ConfigError for a model whose name is that of an architecture that relora cannot build.

    The name of a model is only a label, which the run's hash leaves out. So it cannot choose the architecture. Only a
    launch calls this.
    """
    family = re.match(r"[a-z]+(?=[^a-z]|$)", name.lower())
    if family and family[0] in OTHER_ARCHITECTURES:
        raise ConfigError(
            f"model.name={name} names another architecture, but every model here is a Llama-style decoder; "
            f"use another name, such as llama_{name}"
        )
