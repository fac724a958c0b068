"""Pruning of the factors' optimizer state at a restart. No other state changes. Needs torch only.

Lialin et al. 2023, section 3: with the old moments, the first updates after a merge fall back into the old subspace.
Most of the state is therefore set to zero. The pruned entries are counted, and their share is returned.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn

from relora.core.choices import PRUNING_RATIO, RESET_MODES, RESET_MOMENTS
from relora.core.keyed import keyed_generator
from relora.core.lowrank import wrapped_layers

COUNTS = {"step": 0, "mu_product": 1}
"""State entries of torch's optimizers that count steps and are not moments: name to start value.

mu_product belongs to NAdam. These entries are scalars, and so is a trained scale. Only the name can distinguish a count
from a moment, not the shape.
"""


def prune_mask_by_magnitude(values: Tensor, ratio: float) -> Tensor:
    """Mark exactly floor(ratio * n) entries with the smallest |value|; of equal entries, the first in memory order.

    The count is exact for any size (torch.quantile is limited to 16M elements). It is also exact for ties: a constant
    tensor loses the given share and not everything.

    Returns:
        A bool tensor of the shape of `values`, True where an entry is to be pruned.
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
    """Mark each entry with probability `ratio`, independently. The draw is on the CPU and depends only on `key`.

    The draw is in fp32: bf16 cannot represent ratios near 1 (its largest value below 1 is 0.996).

    Returns:
        A bool tensor of the shape and device of `values`, True where an entry is to be pruned.
    """
    return (torch.rand(values.shape, generator=keyed_generator(key), device="cpu") < ratio).to(values.device)


def _redrawn(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a merge initialises again, by name: the factors and the trained scales."""
    return {
        f"{layer_name}.{name}": parameter
        for layer_name, layer in wrapped_layers(model).items()
        for name, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B), ("scaling", layer.scaling))
        if isinstance(parameter, nn.Parameter)
    }


def _moments(parameter: nn.Parameter, state: dict[str, object], name: str, *, clears_state: bool) -> dict[str, Tensor]:
    """Return the state tensors that have the parameter's shape and are not counts, exp_avg first.

    Raises TypeError for integer codes, unless the whole state is cleared (`clears_state`).
    """
    moments = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key not in COUNTS
    }
    for key, value in moments.items():
        if not value.is_floating_point() and not clears_state:
            raise TypeError(
                f"the optimizer's {key!r} of {name} holds {value.dtype} codes, which cannot be pruned by value; "
                "use an optimizer with floating-point state, mode='zero' with reset_step=True, or mode='none'"
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
    """Prune the optimizer state of all low-rank factors.

    A moment is any state tensor of the parameter's shape except `COUNTS`, so optimizers other than AdamW work too.
    A parameter that has no state yet is not changed. A trained scale counts as a factor.

    Args:
        optimizer: Its state tensors of the factors are changed in place.
        model: The wrapped model, which says which parameters are factors.
        mode: "none", "zero", "random" or "magnitude". "none" changes nothing. "zero" sets all entries to zero.
            "random" sets each entry to zero with probability `pruning_ratio`, drawn from (seed, restart, parameter
            name). "magnitude" sets the share `pruning_ratio` of each tensor with the smallest |x| to zero.
        pruning_ratio: The share to prune, in [0, 1].
        moments: "joint" prunes both moments at the same entries. "independent" gives each moment its own mask. Some
            first moments then lose their second moment (updates of 6e3 to 7e4 x the learning rate were seen).
        reset_step: Adam's step count starts at 0 again, so that bias correction fits the pruned moments. Without it the
            first update is 3.15 x the learning rate (beta2 = 0.999).
        seed: Needed only by mode="random".
        restart: The number of the restart, so that each restart prunes different entries. Needed only by mode="random".

    Returns:
        The share of the factors' moment entries that this call pruned.

    Raises:
        ValueError: `mode` or `moments` is unknown, `pruning_ratio` is outside [0, 1], mode="random" has no seed or
            restart, the model is not wrapped, or the optimizer holds none of its factors. Nothing has changed then.
        TypeError: The state holds integer codes, which cannot be pruned by value. mode="zero" with reset_step=True
            accepts them. Nothing has changed then.
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
            "seed=... and restart=... (the number of this restart), or all restarts would prune the same entries"
        )
    if mode == "none":
        return 0.0

    redrawn = _redrawn(model)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(redrawn.values()):
        raise ValueError("the optimizer holds none of the model's factors; make it after wrap(model, ...)")
    states = {name: (parameter, optimizer.state.get(parameter) or {}) for name, parameter in redrawn.items()}
    clears_state = mode == "zero" and reset_step
    moments_of = {
        name: _moments(parameter, state, name, clears_state=clears_state) for name, (parameter, state) in states.items()
    }

    total = zeroed = 0
    for name, (_, state) in states.items():
        if any(not moment.is_floating_point() for moment in moments_of[name].values()):
            numel = sum(moment.numel() for moment in moments_of[name].values())
            total, zeroed = total + numel, zeroed + numel
            state.clear()  # the optimizer creates it again, as for a parameter that it has never stepped
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
