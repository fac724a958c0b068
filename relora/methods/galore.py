"""GaLore (arXiv 2403.03507): full-rank weights, with Adam in a low-rank subspace of the gradient of each matrix."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.methods.subspace import Subspace

if TYPE_CHECKING:
    import torch

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class GaLore(Subspace):
    """The subspace is the leading singular subspace of the gradient."""

    scale: float = 0.25

    def projector_numel(self, short: int, long: int) -> int:
        """Return the elements of the stored basis, r x short."""
        return self.rank * short

    def matrix_flops(self, short: int, long: int) -> float:
        """Return the FLOPs of projecting the gradient and the result, and a share of the decompositions.

        A singular value decomposition of m x n, m >= n, takes 6mn^2 + 20n^3 FLOPs (Golub and Van Loan, Matrix
        Computations, R-SVD).
        """
        decomposition = 6 * long * short**2 + 20 * short**3
        return 4 * self.rank * short * long + decomposition / self.update_interval_steps

    def update_rank(self, run: "RunConfig") -> int | None:
        """Return the rank times the number of subspaces: all updates of an interval are in one of them."""
        return self.rank * -(-run.clock.low_rank_steps // self.update_interval_steps)

    def optimizer_over(self, groups: list[dict[str, Any]], run: "RunConfig", **adam: Any) -> "torch.optim.Optimizer":
        """Build GaLore's optimizer."""
        from relora.optimizers.galore import GaLoreAdamW

        return GaLoreAdamW(groups, **adam)
