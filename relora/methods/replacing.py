"""The base class of methods whose layers take the place of the targeted matrices."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from relora.budget.cost import Cost, LlamaShape, cost, module_matches
from relora.budget.replaced import Replaced
from relora.methods.base import Method, Targeted

if TYPE_CHECKING:
    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class Replacing(Targeted):
    """Trains other layers in the place of the targeted matrices, and all other weights at full rank."""

    def replaced(self, in_features: int, out_features: int) -> Replaced:
        """Return the cost of the layer in the place of a matrix."""
        raise NotImplementedError(f"method={self.name} has no replaced()")

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Return the cost of training a model with these layers."""
        linears = shape.linears().items()
        return cost(
            shape,
            sequence_length_tokens=run.data.sequence_length_tokens,
            precision=run.trainer.precision,
            replaced={
                name: self.replaced(*sizes) for name, sizes in linears if module_matches(name, self.target_modules)
            },
            optimizer=run.optimizer,
        )

    def break_even_rank(self, shape: LlamaShape, run: "RunConfig", *, micro_steps: int) -> int | None:
        """Return the highest rank at which a step takes fewer FLOPs than at full rank, or 0 if there is none.

        This is for layers whose FLOPs do not depend on the micro-steps.
        """

        def flops(own: Cost) -> int:
            return replace(own, optimizer_flops=0).flops_per_update(run.tokens_per_step)

        own = self.cost(shape, run)
        highest = min(min(each.in_features, each.out_features) for each in own.replaced)
        at_full_rank = flops(Method.cost(self, shape, run))
        ranks = range(1, highest + 1)
        return bisect_left(ranks, at_full_rank, key=lambda rank: flops(replace(self, rank=rank).cost(shape, run)))
