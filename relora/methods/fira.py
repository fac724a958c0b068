"""Fira (arXiv 2410.01623): GaLore, with full-rank updates from the part of the gradient outside of the subspace."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.methods.galore import GaLore
from relora.methods.growth import NORM_BYTES, check_growth_limit

if TYPE_CHECKING:
    import torch

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class Fira(GaLore):
    """`growth_limit` is the largest ratio of an update's norm to the last one. None means no limit."""

    growth_limit: float | None = 1.01

    def __post_init__(self) -> None:
        GaLore.__post_init__(self)
        check_growth_limit(self.growth_limit)

    def matrix_state_bytes(self) -> int:
        """Return the bytes of the norm of the last update."""
        return 0 if self.growth_limit is None else NORM_BYTES

    def matrix_flops(self, short: int, long: int) -> float:
        """Return the FLOPs of GaLore and of the projection that separates the residual."""
        return GaLore.matrix_flops(self, short, long) + 2 * self.rank * short * long

    def optimizer_over(self, groups: list[dict[str, Any]], run: "RunConfig", **adam: Any) -> "torch.optim.Optimizer":
        """Build Fira's optimizer."""
        from relora.optimizers.fira import FiraAdamW

        return FiraAdamW(groups, growth_limit=self.growth_limit, **adam)
