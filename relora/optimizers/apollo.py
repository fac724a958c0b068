"""APOLLO: the raw gradient, scaled by norms of Adam's moments in a random subspace. Needs torch only.

Zhu et al. 2025 (arXiv 2412.05270), Algorithm 1. The authors' code has a licence for non-commercial use (CC BY-NC). This
file follows the paper alone.
"""

import math
from typing import Any

import torch
from torch import Tensor

from relora.core.keyed import keyed_generator
from relora.core.merged import wide_dtype
from relora.optimizers.growth import GrowthLimitedAdamW, scaling_factors
from relora.optimizers.subspace import is_from_left


def random_projection(key: str, rank: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw a projection of `size` dimensions to `rank`: r x size, normally distributed with variance 1/r.

    It depends only on the key and the kind of device: it is not stored, but drawn again in every step.
    """
    generator = keyed_generator(key, device)
    drawn = torch.randn(rank, size, generator=generator, device=device, dtype=wide_dtype(dtype))
    return drawn.div_(math.sqrt(rank)).to(dtype)


class ApolloAdamW(GrowthLimitedAdamW):
    """Algorithm 1 of the paper with decoupled weight decay: APOLLO, or APOLLO-Mini with `is_tensor_wise`.

    Let G be m x n with m <= n (else its transpose). Adam's moments get R = P G, where P is a random r x m matrix. A new
    P is drawn every `update_interval_steps` steps, and the moments are kept. W changes by lr * scale * G S. S scales
    each column j by |N_j| / (|R_j| + eps), where N is Adam's normalised direction. With `is_tensor_wise`, S is the one
    number |N| / (|R| + eps). The growth of the norm of G S is limited (equation 4).

    The paper leaves some details open. Here, N has Adam's bias correction. The limit applies before `scale`, which is
    the same as after it. P depends on the seed, the number of the parameter and the number of the draw.

    Args:
        params: Parameters or groups, as for other torch optimizers.
        seed: The seed of all projections.
        is_tensor_wise: Whether a matrix has one scaling factor, and not one for each channel.
        settings: The other arguments of `GrowthLimitedAdamW`.
    """

    def __init__(self, params: Any, *, seed: int, is_tensor_wise: bool = False, **settings: Any) -> None:
        super().__init__(params, is_tensor_wise=is_tensor_wise, **settings)
        self._seed = seed
        # Numbers and not groups: an update in backward steps each parameter in a group of its own.
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self._number_of = {parameter: number for number, parameter in enumerate(parameters)}

    def project(self, parameter: Tensor, gradient_OxI: Tensor, group: dict[str, Any]) -> Tensor:
        """Return R = P G, r x I, or G P^T, O x r."""
        draw = int(self.state[parameter]["step"].item()) // group["update_interval_steps"]
        projection = random_projection(
            f"apollo/{self._seed}/{draw}/{self._number_of[parameter]}",
            group["rank"],
            min(gradient_OxI.shape),
            device=gradient_OxI.device,
            dtype=gradient_OxI.dtype,
        )
        left = is_from_left(gradient_OxI.shape, group["square_side"])
        return projection @ gradient_OxI if left else gradient_OxI @ projection.T

    def lift(
        self, parameter: Tensor, gradient_OxI: Tensor, projected: Tensor, direction: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """Return scale * G S."""
        along = 0 if is_from_left(parameter.shape, group["square_side"]) else 1
        dim = None if group["is_tensor_wise"] else along
        update = gradient_OxI * scaling_factors(direction, projected, dim, group["eps"])
        self.limit_growth_(parameter, update, group)
        return update.mul_(group["scale"])
