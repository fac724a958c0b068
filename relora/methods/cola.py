"""CoLA (Liu et al. 2025, arXiv 2502.10940): B silu(A x) in the place of W x, a model with low-rank activations."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from relora.budget.cost import Cost, LlamaShape
from relora.budget.replaced import Replaced, factorised
from relora.methods.replacing import Replacing

if TYPE_CHECKING:
    from torch import nn

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class CoLA(Replacing):
    """Trains B silu(A x) in the place of the targeted matrices, and all other weights at full rank.

    The paper's rank is a quarter of model.hidden_size, and all matrices of attention and MLP are targeted. The MLP of
    Llama keeps its own silu. CoLA-M is trainer.activation_checkpointing=true: a decoder layer then keeps its input and
    the activations A x, and computes all others again.

    The model is no plain Llama, so it is exported with a modelling file (relora.training.modeling_cola).

    After a warm start, each layer begins as the best approximation of its matrix to first order in x. The paper has no
    warm start.
    """

    model_type: ClassVar[str | None] = "cola_llama"
    modelling_module: ClassVar[str | None] = "relora.training.modeling_cola"

    def replaced(self, in_features: int, out_features: int) -> Replaced:
        """Return the cost of the layer in the place of a matrix."""
        return factorised(in_features, out_features, self.rank, is_activated=True)

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Return the cost of training a model with these layers. The exported model has them too."""
        made = Replacing.cost(self, shape, run)
        return replace(made, parameters=made.trainable_parameters)

    def begin(self, model: "nn.Module", run: "RunConfig") -> str | None:
        """Replace the targeted matrices."""
        from relora.core.cola import activate

        share = activate(
            model,
            rank=self.rank,
            target_modules=self.target_modules,
            seed=run.trainer.seed,
            keeps_weights=self.warm_start_steps > 0,
        )
        if share is None:
            return None
        return f"the factors keep {share:.1%} of |W| (Frobenius norm) of the matrices that they replace, to first order"

    def exported_config(self, run: "RunConfig") -> dict[str, Any]:
        """Return the entries of config.json that the modelling file needs."""
        return {"cola_rank": self.rank, "cola_target_modules": list(self.target_modules)}
