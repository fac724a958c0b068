"""Estimate the parameters, FLOPs and bytes of a run, compared with full rank, before it starts. Needs no torch."""

from dataclasses import dataclass

from relora.budget.cost import STORAGE_BYTES, Cost
from relora.config.peak import Phases
from relora.config.run import RunConfig

KEPT_CHECKPOINTS = 2
"""The checkpoints that a run keeps (relora.runs.checkpoint)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of one process, as a plan sees it."""

    memory_bytes: int | None
    """The memory that the process may use. None if it is not known here."""
    name: str
    """What the memory is, for the user: "plan.device_memory", "free on the GPU"."""
    is_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimated cost of a run. FLOPs are those of all processes together; bytes are those of one process.

    FLOPs depend on the way in which each matrix is computed (relora.budget.cost).
    """

    name: str
    total_steps: int
    tokens: int
    """The tokens that are computed. With data.packing=pad some of them are padding."""
    restarts: int
    parameters: int
    trainable_parameters: int
    flops_per_update: int
    flops_per_update_at_full_rank: int
    total_flops: int
    weight_bytes: int
    merged_weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    bytes_at_full_rank: int
    peak_bytes: int
    """The most memory during an optimizer step of the method, with activations (relora.budget.memory).

    The warm start needs the memory of full rank.
    """
    peak_bytes_at_full_rank: int
    sequences_at_a_time: int
    """The sequences of a micro-step, for which the peaks are."""
    device_bytes: int | None
    """The memory of the device for which `sequences_at_a_time` was chosen. None if it is not known."""
    fits: bool
    """Whether the highest peak of the run fits into the device. True if its memory is not known."""
    checkpoint_bytes: int
    """The size of the largest checkpoint."""
    model_bytes: int
    """The size of the exported weights."""
    break_even_rank: int | None
    """The highest rank at which a step needs fewer FLOPs than at full rank; None if the method has no factors."""
    update_rank: int | None
    """The greatest rank that the sum of all updates of a matrix can reach; None if the method sets no limit."""

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state together, without activations."""
        return self.weight_bytes + self.merged_weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def disk_bytes(self) -> int:
        """The size of what a finished run keeps: its checkpoints and its model. The metrics are small."""
        return KEPT_CHECKPOINTS * self.checkpoint_bytes + self.model_bytes


def run_plan(config: RunConfig, vocab_size: int | None = None, *, device: Device | None = None) -> Plan:
    """Return the plan of `config`.

    Args:
        config: The run.
        vocab_size: Rows of the embedding. None: the configured size; that of the tokenizer may be another.
        device: The device of each process, into whose memory a micro-step must fit. None: as many sequences at a time
            as the config allows.
    """
    vocab_size = vocab_size or config.model.vocab_size or config.data.vocab_size
    phases = Phases(config=config, vocab_size=vocab_size)
    own, full = phases.of_method.cost, phases.at_full_rank.cost
    steps, warm, restarts = config.total_steps, config.method.warm_start_steps, config.clock.restarts_before
    restart_count, merged_weight = restarts(steps), config.method.merged_weight_in_use
    device_bytes = None if device is None else device.memory_bytes
    fitting = phases.most_at_a_time if device_bytes is None else phases.fitting(device_bytes)
    at_a_time = fitting or (1 if phases.may_be_divided else phases.most_at_a_time)
    micro_steps = phases.sequences // at_a_time
    of_update = own.flops_per_update(
        config.tokens_per_step, merged_weight=merged_weight, micro_steps=config.world_size * micro_steps
    )
    merged_weight_bytes = 0
    if merged_weight == "resident":
        tokens_at_a_time = at_a_time * config.data.sequence_length_tokens
        merged_weight_bytes = own.merged_weight_bytes(tokens_per_micro_step=tokens_at_a_time, micro_steps=micro_steps)
    of_full = full.flops_per_update(config.tokens_per_step)
    kept_bytes = [own.weight_bytes + own.optimizer_bytes, *([full.weight_bytes + full.optimizer_bytes] if warm else [])]
    gradient_bytes_at_full_rank = phases.at_full_rank.gradient_bytes(at_a_time)
    return Plan(
        name=config.name,
        total_steps=steps,
        tokens=steps * config.tokens_per_step,
        restarts=restart_count,
        parameters=own.parameters,
        trainable_parameters=own.trainable_parameters,
        flops_per_update=of_update,
        flops_per_update_at_full_rank=of_full,
        total_flops=warm * of_full + (steps - warm) * of_update + restart_count * own.merge_flops,
        weight_bytes=own.weight_bytes,
        merged_weight_bytes=merged_weight_bytes,
        gradient_bytes=phases.of_method.gradient_bytes(at_a_time),
        optimizer_bytes=own.optimizer_bytes,
        bytes_at_full_rank=full.weight_bytes + gradient_bytes_at_full_rank + full.optimizer_bytes,
        peak_bytes=phases.of_method.peak_bytes(at_a_time),
        peak_bytes_at_full_rank=phases.at_full_rank.peak_bytes(at_a_time),
        sequences_at_a_time=at_a_time,
        device_bytes=device_bytes,
        fits=fitting > 0,
        checkpoint_bytes=max(kept_bytes),
        model_bytes=_exported_bytes(config, own),
        break_even_rank=config.method.break_even_rank(
            config.model.shape(vocab_size), config, micro_steps=config.world_size * micro_steps
        ),
        update_rank=config.method.update_rank(config),
    )


def _exported_bytes(config: RunConfig, own: Cost) -> int:
    """Return the size of the exported weights. A model with its own modelling file keeps the method's layers."""
    if config.method.model_type is not None:
        return own.weight_bytes
    return STORAGE_BYTES[config.trainer.precision] * own.parameters
