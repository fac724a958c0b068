"""The norm-growth limiter of Fira (arXiv 2410.01623, equation 12), which APOLLO uses too. Needs torch only."""

from typing import Any

import torch
from torch import Tensor

from relora.core.merged import wide_dtype
from relora.optimizers.subspace import SubspaceAdamW

NORM = "update_norm"


class GrowthLimitedAdamW(SubspaceAdamW):
    """An optimizer whose updates of one matrix grow by at most a factor `growth_limit` from step to step.

    Args:
        params: Parameters or groups, as for other torch optimizers.
        growth_limit: The limit gamma. The paper has 1.01. None means no limit.
        settings: The other arguments of `SubspaceAdamW`.
    """

    def __init__(self, params: Any, *, growth_limit: float | None = 1.01, **settings: Any) -> None:
        super().__init__(params, growth_limit=growth_limit, **settings)

    def limit_growth_(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        """Scale `update` S in place: S_t <- S_t gamma / max(|S_t| / (|S_t-1| + eps), gamma).

        The paper does not say what happens at the first step and after a step of norm 0. Here, the first update is
        not limited, and a norm of 0 does not replace the last norm: growth from 0 would never be fast enough again.
        """
        if group["growth_limit"] is None:
            return
        state, dtype = self.state[parameter], wide_dtype(update.dtype)
        norm = torch.linalg.vector_norm(update, dtype=dtype)
        if NORM not in state:
            state[NORM] = torch.zeros_like(norm)
        last = state[NORM]
        growth = (norm / (last + group["eps"])).clamp(min=group["growth_limit"])
        # Without a choice on the host: a GPU would have to wait for it.
        factor = torch.where(last > 0, group["growth_limit"] / growth, torch.ones_like(norm))
        update.mul_(factor)
        state[NORM] = torch.where(norm > 0, norm * factor, last)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Norms keep their dtype, while torch casts them to the dtype of their parameter."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            norm = state_dict["state"].get(number, {}).get(NORM)
            if norm is not None:
                self.state[parameter][NORM] = norm.to(parameter.device, copy=True)


def scaling_factors(direction: Tensor, projected: Tensor, dim: int | None, eps: float) -> Tensor:
    """Return |N| / (|R| + eps): how much Adam scales the norm of a gradient, along `dim` or of the whole matrix.

    Args:
        direction: N, Adam's normalised direction in the subspace.
        projected: R, the projected gradient.
        dim: The dimension of the subspace: 0 gives one factor for each column, 1 for each row. None gives one factor.
        eps: Adam's epsilon.

    Returns:
        The factors, computed in fp32 or wider, in the dtype of `projected`. They multiply an O x I matrix.
    """
    dtype = wide_dtype(projected.dtype)
    whole = torch.linalg.vector_norm(direction, dim=dim, keepdim=True, dtype=dtype)
    factors = whole / (torch.linalg.vector_norm(projected, dim=dim, keepdim=True, dtype=dtype) + eps)
    return factors.to(projected.dtype)
