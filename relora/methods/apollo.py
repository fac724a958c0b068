"""APOLLO (arXiv 2412.05270): the raw gradient, with one learning rate per channel from Adam in a random subspace."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from relora.methods.growth import NORM_BYTES, check_growth_limit
from relora.methods.subspace import Subspace

if TYPE_CHECKING:
    import torch

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class Apollo(Subspace):
    """`growth_limit` is the largest ratio of an update's norm to the last one. None means no limit."""

    is_tensor_wise: ClassVar[bool] = False
    """Whether a matrix has one learning rate, and not one for each channel."""

    scale: float = 1.0
    growth_limit: float | None = 1.01

    def __post_init__(self) -> None:
        Subspace.__post_init__(self)
        check_growth_limit(self.growth_limit)

    def matrix_state_bytes(self) -> int:
        """Return the bytes of the norm of the last update. The projection is drawn again and not stored."""
        return 0 if self.growth_limit is None else NORM_BYTES

    def matrix_flops(self, short: int, long: int) -> float:
        """Return the FLOPs of projecting the gradient."""
        return 2 * self.rank * short * long

    def optimizer_over(self, groups: list[dict[str, Any]], run: "RunConfig", **adam: Any) -> "torch.optim.Optimizer":
        """Build APOLLO's optimizer. Its projections depend on the seed of the run."""
        from relora.optimizers.apollo import ApolloAdamW

        return ApolloAdamW(
            groups,
            seed=run.trainer.seed,
            is_tensor_wise=self.is_tensor_wise,
            growth_limit=self.growth_limit,
            **adam,
        )
