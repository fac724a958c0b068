"""Fira: GaLore, with the rest of the gradient scaled as Adam scales the part in the subspace. Needs torch only.

Chen et al. 2024 (arXiv 2410.01623), Algorithm 1.
"""

from typing import Any

from torch import Tensor

from relora.optimizers.galore import GaLoreAdamW
from relora.optimizers.growth import GrowthLimitedAdamW, scaling_factors


class FiraAdamW(GrowthLimitedAdamW, GaLoreAdamW):
    """Algorithm 1 of the paper with decoupled weight decay.

    P, R = P^T G, N and the moments are those of GaLore. The residual (I - P P^T) G is outside of the subspace. Each of
    its columns is scaled by phi_i = |N_i| / (|R_i| + eps), where N_i and R_i are the columns of N and R (equation 11).
    The growth of its norm is limited (equation 12). W changes by lr * scale * (P N + S), where S is the result. If P
    is r x I, rows take the place of columns.

    The authors' code differs from this algorithm: there, W changes by P N scale + phi (G - P R scale), and N has no
    bias correction in phi and in the limiter.

    `GrowthLimitedAdamW` has the arguments.
    """

    def lift(
        self, parameter: Tensor, gradient_OxI: Tensor, projected: Tensor, direction: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """Return scale * (P N + S)."""
        along = 0 if self.is_left(parameter, group) else 1
        factors = scaling_factors(direction, projected, along, group["eps"])
        update = self.project_back(parameter, projected, group).neg_().add_(gradient_OxI).mul_(factors)
        self.limit_growth_(parameter, update, group)
        return update.add_(self.project_back(parameter, direction, group)).mul_(group["scale"])
