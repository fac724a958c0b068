"""SLTrain (Han et al. 2024, arXiv 2406.02214): W = (alpha/r) B A + S, with a sparse S on a fixed random support."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.budget.cost import LlamaShape
from relora.budget.replaced import Replaced, sparse_plus_low_rank
from relora.common.checks import at_most, positive
from relora.core.choices import SCALING
from relora.methods.lowrank import LowRank, kept

if TYPE_CHECKING:
    from torch import nn

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class SLTrain(LowRank):
    """Trains factors and sparse values in the place of the targeted matrices, and all other weights at full rank.

    `density` is the share of the entries of a matrix that have a sparse value (delta in the paper). `alpha=None` means
    0.25 * rank. Restarts are those of LowRank: they refactorise B A, sparse values stay, and all optimizer state starts
    anew.

    A layer forms W in each forward pass and again in each backward pass. So a step takes more FLOPs than at full rank,
    and a micro-step should have many tokens.

    After a warm start, the factors begin as the best approximation of each matrix, and the sparse values as what it
    lacks on the support. The paper has no warm start. Without one, all are drawn as in the paper.
    """

    alpha: float | None = None
    density: float = 0.03

    def __post_init__(self) -> None:
        LowRank.__post_init__(self)
        positive("method.alpha", self.alpha)
        at_most("method.alpha", self.alpha, 1e6, "alpha / rank scales the product of the factors")
        positive("method.density", self.density)
        at_most("method.density", self.density, 1, "it is the share of a matrix that has a sparse value")

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return (self.alpha or SCALING * self.rank) / self.rank

    @property
    def written_out(self) -> dict[str, Any]:
        """The value of alpha that None means, or the alpha that was set."""
        return {"method.alpha": float(self.alpha or SCALING * self.rank)}

    def replaced(self, in_features: int, out_features: int) -> Replaced:
        """Return the cost of the layer in the place of a matrix."""
        return sparse_plus_low_rank(in_features, out_features, self.rank, density=self.density)

    def break_even_rank(self, shape: LlamaShape, run: "RunConfig", *, micro_steps: int) -> int | None:
        """Return None: no rank takes fewer FLOPs than full rank, because W is formed."""
        return None

    def begin(self, model: "nn.Module", run: "RunConfig") -> str | None:
        """Replace the targeted matrices by factors and sparse values."""
        from relora.core.sparse import sparsify

        share = sparsify(
            model,
            rank=self.rank,
            scaling=self.scaling,
            density=self.density,
            target_modules=self.target_modules,
            seed=run.trainer.seed,
            keeps_weights=self.warm_start_steps > 0,
        )
        return None if share is None else kept(share, of="factors and sparse values")
