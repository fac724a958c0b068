"""Estimate the parameters, FLOPs and bytes of a run, compared with full rank, before it starts. Needs no torch."""

from dataclasses import asdict, dataclass

from relora.budget.cost import COMPUTE_BYTES, Cost, LlamaShape
from relora.budget.memory import peak_bytes, summed_gradient_bytes
from relora.config.run import RunConfig, fitting


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
    break_even_rank: int | None
    """The highest rank at which a step needs fewer FLOPs than at full rank; None if the method has no factors."""

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state together, without activations."""
        return self.weight_bytes + self.merged_weight_bytes + self.gradient_bytes + self.optimizer_bytes


def run_plan(config: RunConfig, vocab_size: int | None = None) -> Plan:
    """Return the plan of `config`.

    Args:
        config: The run.
        vocab_size: Rows of the embedding. None: the configured size; that of the tokenizer may be another.
    """
    vocab_size = vocab_size or config.model.vocab_size or config.data.vocab_size
    own, full = config.cost(vocab_size), config.cost(vocab_size, warm_start=True)
    steps, warm, restarts = config.total_steps, config.method.warm_start_steps, config.clock.restarts_before
    restart_count, merged_weight = restarts(steps), config.method.merged_weight_in_use
    tokens_at_a_time = _sequences_at_a_time(config) * config.data.sequence_length_tokens
    micro_steps = _micro_steps(config)
    of_update = own.flops_per_update(
        config.tokens_per_step, merged_weight=merged_weight, micro_steps=config.world_size * micro_steps
    )
    merged_weight_bytes = 0
    if merged_weight == "resident":
        merged_weight_bytes = own.merged_weight_bytes(tokens_per_micro_step=tokens_at_a_time, micro_steps=micro_steps)
    of_full = full.flops_per_update(config.tokens_per_step)
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
        gradient_bytes=_gradient_bytes(config, own),
        optimizer_bytes=own.optimizer_bytes,
        bytes_at_full_rank=full.weight_bytes + _gradient_bytes(config, full) + full.optimizer_bytes,
        peak_bytes=_peak_bytes(config, config.trained_shape(vocab_size), own),
        peak_bytes_at_full_rank=_peak_bytes(config, config.model.shape(vocab_size), full),
        break_even_rank=config.method.break_even_rank(
            config.model.shape(vocab_size), config, micro_steps=config.world_size * micro_steps
        ),
    )


def warning(made: Plan, config: RunConfig) -> str | None:
    """Return a warning if the rank is above the break-even rank, else None."""
    if made.break_even_rank is None or config.rank is None or config.rank <= made.break_even_rank:
        return None
    ratio = made.flops_per_update / made.flops_per_update_at_full_rank
    return (
        f"method.rank={config.rank} is above the break-even of {made.break_even_rank}: a step takes {ratio:.2f} "
        "times the FLOPs of a full-rank step; lower method.rank, or expect to save memory but no time"
    )


def text(made: Plan, config: RunConfig) -> str:
    """Return the plan as text for users, one line per item."""
    parts = [f"weights {_size(made.weight_bytes)}", f"gradients {_size(made.gradient_bytes)}"]
    parts += [f"optimizer {_size(made.optimizer_bytes)}"]
    if made.merged_weight_bytes:
        parts += [f"merged weights {_size(made.merged_weight_bytes)} (method.merged_weight=rebuilt: none)"]
    ratio = made.flops_per_update / made.flops_per_update_at_full_rank
    share, warm = made.trainable_parameters / made.parameters, config.method.warm_start_steps
    rows = {
        "run": made.name,
        "steps": f"{made.total_steps:,} of {config.tokens_per_step:,} tokens, {made.tokens:,} in all"
        + (", with padding" if config.data.packing == "pad" else ""),
        "restarts": f"{made.restarts}",
        "parameters": f"{made.parameters:,}, {made.trainable_parameters:,} trainable ({share:.0%})",
        "FLOPs": f"{made.flops_per_update:.3g} per step ({ratio:.3f} of full rank's), {made.total_flops:.3g} in all",
        "memory": f"{_size(made.state_bytes)} ({made.state_bytes / made.bytes_at_full_rank:.3f} of full rank's): "
        + ", ".join(parts),
        "peak": f"{_size(made.peak_bytes)} ({made.peak_bytes / made.peak_bytes_at_full_rank:.3f} of full rank's) "
        f"with {_sequences_at_a_time(config)} sequences at a time"
        + (f" in each of {config.world_size} processes" if config.world_size > 1 else "")
        + (", the warm start like full rank" if warm else ""),
    }
    if made.break_even_rank is not None:
        rows["break-even"] = f"rank {made.break_even_rank}: up to this rank, a step takes fewer FLOPs than at full rank"
    found = warning(made, config)
    if found is not None:
        rows["warning"] = found
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def as_dict(made: Plan, config: RunConfig) -> dict[str, object]:
    """Return the plan as a dict for programs."""
    return {**asdict(made), "state_bytes": made.state_bytes, "warning": warning(made, config)}


def _gradient_bytes(config: RunConfig, of: Cost) -> int:
    if config.trainer.update_in_backward:
        return of.largest_gradient_bytes
    return summed_gradient_bytes(of, precision=config.trainer.precision, micro_steps=_micro_steps(config))


def _peak_bytes(config: RunConfig, shape: LlamaShape, of: Cost) -> int:
    settings = config.trainer
    return _mask_bytes(config) + peak_bytes(
        shape,
        of,
        sequences_per_micro_step=_sequences_at_a_time(config),
        sequence_length_tokens=config.data.sequence_length_tokens,
        micro_steps=_micro_steps(config),
        precision=settings.precision,
        merged_weight=config.method.merged_weight_in_use,
        activation_checkpointing=settings.activation_checkpointing,
        update_in_backward=settings.update_in_backward,
        world_size=config.world_size,
    )


def _mask_bytes(config: RunConfig) -> int:
    """Return the bytes of the attention mask of a micro-step. Only attention within documents needs a mask."""
    if config.data.attend_across_documents:
        return 0
    length = config.data.sequence_length_tokens
    return COMPUTE_BYTES[config.trainer.precision] * _sequences_at_a_time(config) * length * length


def _sequences_at_a_time(config: RunConfig) -> int:
    return fitting(config.sequences_per_process, config.trainer.sequences_per_micro_step)


def _micro_steps(config: RunConfig) -> int:
    """Number of micro-steps of one optimizer step in one process."""
    return config.sequences_per_process // _sequences_at_a_time(config)


def _size(count_bytes: int) -> str:
    return f"{count_bytes / 2**20:,.0f} MiB" if count_bytes < 2**30 else f"{count_bytes / 2**30:,.2f} GiB"
