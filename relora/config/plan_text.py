"""A plan as text for users and as values for programs, with warnings about settings that do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from relora.budget.cost import module_matches
from relora.common.tables import in_units
from relora.config.peak import memory_options
from relora.config.plan import KEPT_CHECKPOINTS, Device, Plan
from relora.config.run import RunConfig
from relora.config.sketch import schedule_sketch
from relora.methods.base import all_targets


def warnings(made: Plan, config: RunConfig) -> list[str]:
    """Return warnings about a rank above the break-even rank, and about a device that is too small."""
    found: list[str] = []
    if made.break_even_rank is not None and config.rank is not None and config.rank > made.break_even_rank:
        ratio = made.flops_per_update / made.flops_per_update_at_full_rank
        found.append(
            f"method.rank={config.rank} is above the break-even of {made.break_even_rank}: a step takes {ratio:.2f} "
            "times the FLOPs of a full-rank step; lower method.rank, or expect to save memory but no time"
        )
    if not made.fits:
        found.append(_too_large(made, config))
    return found


def _too_large(made: Plan, config: RunConfig) -> str:
    """Return the warning about a device that is too small for the run."""
    warm = config.method.warm_start_steps
    peak_bytes = max(made.peak_bytes, made.peak_bytes_at_full_rank if warm else 0)
    phase = " in its warm start" if peak_bytes > made.peak_bytes else ""
    options = memory_options(config)
    fewer = config.trainer.sequences_per_micro_step is not None and made.sequences_at_a_time > 1
    options = ["trainer.sequences_per_micro_step=null", *options] if fewer else options
    assert made.device_bytes is not None
    return (
        f"the run needs {in_units(peak_bytes)}{phase} with {_sequences(made.sequences_at_a_time)} at a time, and a "
        f"tenth of the {in_units(made.device_bytes)} should stay free; use {', '.join([*options, 'a smaller model'])} "
        "or a larger device"
    )


def text(
    made: Plan,
    config: RunConfig,
    *,
    device: Device | None = None,
    more: Mapping[str, str] | None = None,
    doubts: Sequence[str] = (),
) -> str:
    """Return the plan as text for users, one line per item.

    Args:
        made: The plan.
        config: The run.
        device: The device that the plan was made for, if it was made for one.
        more: More items, by their names.
        doubts: More warnings.
    """
    parts = [f"weights {in_units(made.weight_bytes)}", f"gradients {in_units(made.gradient_bytes)}"]
    parts += [f"optimizer {in_units(made.optimizer_bytes)}"]
    if made.merged_weight_bytes:
        parts += [f"merged weights {in_units(made.merged_weight_bytes)} (method.merged_weight=rebuilt: none)"]
    ratio = made.flops_per_update / made.flops_per_update_at_full_rank
    share, warm = made.trainable_parameters / made.parameters, config.method.warm_start_steps
    rows = {
        "run": made.name,
        "steps": f"{made.total_steps:,} of {config.tokens_per_step:,} tokens, {made.tokens:,} in all"
        + (", with padding" if config.data.packing == "pad" else ""),
        "restarts": _restarts(made, config),
        "schedule": "\n".join(schedule_sketch(config)),
        "parameters": f"{made.parameters:,}, {made.trainable_parameters:,} trainable ({share:.0%})",
        "FLOPs": f"{made.flops_per_update:.3g} per step ({ratio:.3f} of full rank's), {made.total_flops:.3g} in all",
        "memory": f"{in_units(made.state_bytes)} ({made.state_bytes / made.bytes_at_full_rank:.3f} of full rank's): "
        + ", ".join(parts),
        "peak": f"{in_units(made.peak_bytes)} ({made.peak_bytes / made.peak_bytes_at_full_rank:.3f} of full rank's) "
        f"with {_sequences(made.sequences_at_a_time)} at a time"
        + (f" in each of {config.world_size} processes" if config.world_size > 1 else "")
        + (f", the warm start {in_units(made.peak_bytes_at_full_rank)} like full rank" if warm else ""),
        **({} if device is None else {"device": _device(made, config, device)}),
        "disk": f"{in_units(made.disk_bytes)}: {KEPT_CHECKPOINTS} checkpoints of {in_units(made.checkpoint_bytes)}, "
        f"the model {in_units(made.model_bytes)}",
    }
    if made.break_even_rank is not None:
        rows["break-even"] = f"rank {made.break_even_rank}: up to this rank, a step takes fewer FLOPs than at full rank"
    if made.update_rank is not None:
        rows["update rank"] = _update_rank(made, config)
    rows |= more or {}
    indent = "\n" + " " * 13
    lines = [f"{name:<12} {value}".replace("\n", indent) for name, value in rows.items()]
    return "\n".join([*lines, *(f"{'warning':<12} {warning}" for warning in [*warnings(made, config), *doubts])])


def _sequences(count: int) -> str:
    return f"{count:,} sequence{'s' if count > 1 else ''}"


def _restarts(made: Plan, config: RunConfig) -> str:
    """Return the number of restarts, their interval, and the length of a last cycle that is cut."""
    interval = config.reset_interval_steps
    if not made.restarts or interval is None:
        return "none"
    found = f"{made.restarts}, every {interval:,} steps" + (
        " after the warm start" if config.clock.warm_start_steps else ""
    )
    last = config.clock.low_rank_steps % interval
    return found + (f"; the last cycle has only {last:,} steps" if last else "")


def _device(made: Plan, config: RunConfig, device: Device) -> str:
    """Return the memory of the device, and how the number of sequences at a time was chosen for it."""
    if made.device_bytes is None:
        return f"the memory of {device.name} is not known here; plan.device_memory=80GiB plans for 80 GiB"
    sequences, of = config.sequences_per_process, f"{in_units(made.device_bytes)} ({device.name})"
    if not made.fits or config.trainer.sequences_per_micro_step is not None or made.sequences_at_a_time == sequences:
        return of
    return f"{of}: at most {made.sequences_at_a_time:,} of the {sequences:,} sequences fit at a time"


def _update_rank(made: Plan, config: RunConfig) -> str:
    """Return the greatest rank of all updates together, beside the rank that the largest matrices could have."""
    assert made.update_rank is not None
    targets = getattr(config.method, "target_modules", all_targets())
    linears = config.model.shape(vocab_size=1).linears()
    sides = [min(sizes) for name, sizes in linears.items() if module_matches(name, targets)]
    least, most = min(sides), max(sides)
    reached = f"at most {made.update_rank:,} by the low-rank updates of a matrix together"
    if made.update_rank >= most:
        return f"{reached}: every matrix can change in all its directions ({most:,})"
    return f"{reached}; full rank is {least:,}" + (f" to {most:,}" if most > least else "")


def as_dict(made: Plan, config: RunConfig) -> dict[str, object]:
    """Return the plan as a dict for programs."""
    found = warnings(made, config)
    return {
        **asdict(made),
        "state_bytes": made.state_bytes,
        "disk_bytes": made.disk_bytes,
        "warning": found[0] if found else None,
        "warnings": found,
    }
