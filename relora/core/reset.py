"""Pruning of the optimizer's state at a restart: of the factors' state, and of nothing else. Needs torch only.

Lialin et al. 2023, section 3: with the old moments the first updates after a merge fall back into the old subspace, so
most of the state is set to zero. What "reset" zeroes is counted and returned, never assumed.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn

from relora.core.choices import PRUNING_RATIO, RESET_MODES, RESET_MOMENTS
from relora.core.lowrank import keyed_generator, wrapped_layers

COUNTS = {"step": 0, "mu_product": 1}
"""State of torch's optimizers that counts updates and is no moment, by name, with the value that it begins with.

mu_product is NAdam's. A scale that is trained has no dimension, as these have: the shape cannot tell them apart.
"""


def prune_mask_by_magnitude(values: Tensor, ratio: float) -> Tensor:
    """True for exactly floor(ratio * n) entries of smallest |value|; among equal ones the first in memory order.

    Exact for any size (torch.quantile stops at 16M elements) and for ties: a constant tensor loses the asked share
    and not everything.
    """
    magnitude = values.detach().abs().flatten()
    pruned_count = int(Fraction(str(ratio)) * magnitude.numel())
    if pruned_count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = magnitude.kthvalue(pruned_count).values
    below, ties = magnitude < threshold, magnitude == threshold
    missing = pruned_count - below.sum()
    return (below | (ties & (ties.cumsum(0) <= missing))).view_as(values)


def prune_mask_at_random(values: Tensor, ratio: float, key: str) -> Tensor:
    """True with probability `ratio`, independently, drawn on the CPU from `key` alone.

    Drawn in fp32: a bf16 uniform cannot resolve ratios near 1 (its largest value below 1 is 0.996).
    """
    return (torch.rand(values.shape, generator=keyed_generator(key), device="cpu") < ratio).to(values.device)


def _redrawn(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a merge sets anew, by name: the factors, and the scale where it is trained."""
    return {
        f"{layer_name}.{name}": parameter
        for layer_name, layer in wrapped_layers(model).items()
        for name, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B), ("scaling", layer.scaling))
        if isinstance(parameter, nn.Parameter)
    }


def _moments(parameter: nn.Parameter, state: dict[str, object], name: str, *, all_anew: bool) -> dict[str, Tensor]:
    """The state's tensors of the parameter's shape that are no counts, exp_avg first.

    Raises TypeError for codes, unless the whole state begins anew.
    """
    moments = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key not in COUNTS
    }
    for key, value in moments.items():
        if not value.is_floating_point() and not all_anew:
            raise TypeError(
                f"the optimizer's {key!r} of {name} holds {value.dtype} codes, which cannot be pruned as if they were "
                "values; use an optimizer with floating-point state, mode='zero' with reset_step=True, or mode='none'"
            )
    return dict(sorted(moments.items(), key=lambda item: item[0] != "exp_avg"))


@torch.no_grad()
def reset_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    mode: str = "magnitude",
    pruning_ratio: float = PRUNING_RATIO,
    *,
    moments: str = "joint",
    reset_step: bool = True,
    seed: int | None = None,
    restart: int | None = None,
) -> float:
    """Prune the state of all factors of `model` in `optimizer`, in place; return the fraction of it that was zeroed.

    mode: "none" touches nothing; "zero" zeroes all; "random" zeroes each entry with probability `pruning_ratio`, drawn
        from (seed, restart, parameter name); "magnitude" zeroes the `pruning_ratio` smallest |x| of each tensor.
    moments: "joint" prunes the second moment where the first is pruned; "independent" gives each its own mask, which
        leaves first moments without their second (updates of 6e3 to 7e4 x the learning rate were seen).
    reset_step: Adam's step count starts at 0 again, so that bias correction fits the emptied moments; without it the
        first update is 3.15 x the learning rate (beta2 = 0.999).
    seed, restart: needed by mode="random" alone; the restart's number, so that each restart prunes other entries.

    A moment is any state tensor of the parameter's shape but for `COUNTS`, so this works beyond AdamW. Parameters
    without state yet are left alone, and a trained scale counts as a factor. Raises, before anything is touched,
    ValueError for an unknown mode, a ratio outside [0, 1], mode="random" without seed or restart, an unwrapped model
    or an optimizer of other parameters; TypeError for quantised state, unless mode is "zero" and reset_step is true.
    """
    if mode not in RESET_MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(RESET_MODES)}")
    if moments not in RESET_MOMENTS:
        raise ValueError(f"moments={moments!r} is not one of {', '.join(RESET_MOMENTS)}")
    if not 0.0 <= pruning_ratio <= 1.0:
        raise ValueError(f"pruning_ratio={pruning_ratio} must be between 0 and 1")
    missing = [name for name, value in (("seed", seed), ("restart", restart)) if value is None]
    if mode == "random" and missing:
        raise ValueError(
            f"mode='random' draws its masks from seed and restart, and {' and '.join(missing)} is not given; pass "
            "seed=... and the number of this restart, restart=..., or all restarts would prune the same entries"
        )
    if mode == "none":
        return 0.0

    redrawn = _redrawn(model)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(redrawn.values()):
        raise ValueError("the optimizer holds none of the model's factors; make it after wrap(model, ...)")
    states = {name: (parameter, optimizer.state.get(parameter) or {}) for name, parameter in redrawn.items()}
    all_anew = mode == "zero" and reset_step
    moments_of = {
        name: _moments(parameter, state, name, all_anew=all_anew) for name, (parameter, state) in states.items()
    }

    total = zeroed = 0
    for name, (_, state) in states.items():
        if any(not moment.is_floating_point() for moment in moments_of[name].values()):
            numel = sum(moment.numel() for moment in moments_of[name].values())
            total, zeroed = total + numel, zeroed + numel
            state.clear()  # the optimizer begins it anew, as for a parameter that it has never stepped
            continue
        mask: Tensor | None = None
        for key, moment in moments_of[name].items():
            if mask is None or moments == "independent":
                if mode == "zero":
                    mask = torch.ones_like(moment, dtype=torch.bool)
                elif mode == "random":
                    suffix = f"/{key}" if moments == "independent" else ""
                    mask = prune_mask_at_random(moment, pruning_ratio, f"reset/{seed}/{restart}/{name}{suffix}")
                else:
                    mask = prune_mask_by_magnitude(moment, pruning_ratio)
            moment.masked_fill_(mask, 0)
            zeroed += int(mask.sum())
            total += moment.numel()
        for key, begin in COUNTS.items() if reset_step else ():
            count = state.get(key)
            if isinstance(count, Tensor):
                count.fill_(begin)
            elif count is not None:
                state[key] = begin
    return zeroed / total if total else 0.0
