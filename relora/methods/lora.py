"""LoRA: one set of low-rank factors for the whole run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relora.budget.cost import MERGED_WEIGHTS, Cost, LlamaShape, break_even_rank, cost
from relora.common.checks import UNHASHED, at_most, one_of, positive
from relora.common.errors import ConfigError, shown
from relora.core.choices import REINITS, SCALING
from relora.methods.base import Targeted, parameter_groups

if TYPE_CHECKING:
    from torch import nn

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class LoRA(Targeted):
    """Trains factors in the targeted matrices, and all other weights at full rank. `alpha=None` means 0.25 * rank.

    `b_rate_ratio` is the learning rate of B divided by that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    `merged_weight` chooses between faster exact ways to compute and ways that need less memory
    (relora.core.exact_ways.refresh).
    """

    alpha: float | None = None
    dropout: float = 0.0
    reinit: str = "kaiming"
    trainable_scaling: bool = False
    b_rate_ratio: float = 1.0
    merged_weight: str = field(default="resident", metadata=UNHASHED)

    def __post_init__(self) -> None:
        Targeted.__post_init__(self)
        positive("method.alpha", self.alpha)
        at_most("method.alpha", self.alpha, 1e6, "alpha / rank scales the update that the factors add to the weights")
        one_of("method.reinit", self.reinit, REINITS)
        positive("method.b_rate_ratio", self.b_rate_ratio)
        at_most("method.b_rate_ratio", self.b_rate_ratio, 1e6, "only B would change")
        one_of("method.merged_weight", self.merged_weight, MERGED_WEIGHTS)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"method.dropout={shown(self.dropout)} must be at least 0 and below 1")

    @property
    def written_out(self) -> dict[str, Any]:
        """The value of alpha that None means, or the alpha that was set."""
        return {"method.alpha": float(self.alpha or SCALING * self.rank)}

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Return the cost of training a model with factors."""
        return cost(
            shape,
            sequence_length_tokens=run.data.sequence_length_tokens,
            precision=run.trainer.precision,
            rank=self.rank,
            target_modules=self.target_modules,
            trainable_scaling=self.trainable_scaling,
            mergeable=self.dropout == 0,
            optimizer=run.optimizer,
        )

    def break_even_rank(self, shape: LlamaShape, run: "RunConfig", *, micro_steps: int) -> int | None:
        """Return the highest rank at which a step takes fewer FLOPs than at full rank."""
        return break_even_rank(
            shape,
            sequence_length_tokens=run.data.sequence_length_tokens,
            target_modules=self.target_modules,
            tokens_per_update=run.tokens_per_step,
            merged_weight=self.merged_weight_in_use,
            micro_steps=micro_steps,
        )

    def update_rank(self, run: "RunConfig") -> int | None:
        """Return the rank times the number of cycles: each one adds sBA (Lialin et al. 2023, section 3, eq. 1)."""
        return self.rank * (run.clock.restarts_before(run.total_steps) + 1)

    @property
    def merged_weight_in_use(self) -> str:
        """`merged_weight`, or "never" with dropout, because dropout applies only to the input of the factors."""
        return "never" if self.dropout > 0 else self.merged_weight

    @property
    def switches(self) -> dict[str, Any]:
        """The choice between the exact ways to compute."""
        return {"method.merged_weight": self.merged_weight_in_use}

    @property
    def memory_options(self) -> Sequence[str]:
        """The override that does not keep merged weights, if they are kept now."""
        return ("method.merged_weight=rebuilt",) if self.merged_weight_in_use == "resident" else ()

    def begin(self, model: "nn.Module", run: "RunConfig") -> None:
        """Freeze the targeted matrices and give them factors."""
        from relora.core.lowrank import ReLoRAConfig, wrap

        factors = ReLoRAConfig(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            reinit=self.reinit,
            trainable_scaling=self.trainable_scaling,
        )
        wrap(model, factors, seed=run.trainer.seed)

    def parameter_groups(self, model: "nn.Module", run: "RunConfig") -> list[dict[str, Any]]:
        """Return the groups. B has a separate learning rate if `b_rate_ratio` is not 1."""
        return parameter_groups(model, run, run.optimizer.learning_rate, b_rate_ratio=self.b_rate_ratio)

    def refresh(self, model: "nn.Module", run: "RunConfig", *, sequences_per_micro_step: int, micro_steps: int) -> None:
        """Choose the cheapest exact way for the number of tokens in a micro-step."""
        import torch

        from relora.core.exact_ways import refresh

        refresh(
            model,
            merged_weight=self.merged_weight_in_use,
            tokens_per_micro_step=sequences_per_micro_step * run.data.sequence_length_tokens,
            micro_steps=micro_steps,
            dtype=torch.float32 if run.trainer.precision == "fp32" else torch.bfloat16,
        )

    def finish(self, model: "nn.Module", run: "RunConfig") -> None:
        """Merge the factors into plain matrices."""
        from relora.core.lowrank import unwrap

        unwrap(model)
