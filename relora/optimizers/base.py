"""The base classes of optimizers: settings, size of the state, and build from groups of parameters.

An optimizer is one subclass of `Optimizer` in one file. Its dataclass fields are the keys under `optimizer:`. The file
imports torch inside `build`, so that a config is composed and checked without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from relora.budget.cost import AdamWCost, Trained
from relora.common.checks import at_least, at_most, positive
from relora.common.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, slots=True)
class Optimizer:
    """The settings that every optimizer has.

    `embedding_learning_rate` applies to parameters that no method wraps: embeddings, head, norms (None:
    `learning_rate`).
    """

    keeps_codes: ClassVar[bool] = False
    """Whether the state holds integer codes, which a restart cannot prune by value."""

    name: str = "adamw"
    learning_rate: float
    embedding_learning_rate: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "embedding_learning_rate", "max_grad_norm"):
            positive(f"optimizer.{name}", getattr(self, name))
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        if not self.weight_decay * self.learning_rate <= 1:
            raise ConfigError(
                f"optimizer.weight_decay={self.weight_decay} times optimizer.learning_rate={self.learning_rate} must "
                "be at most 1, or a step subtracts more than the whole weight; lower one of them"
            )

    def check_here(self) -> None:
        """Raise ConfigError if this machine lacks software that the optimizer needs. Only a launch calls this."""

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Build the torch optimizer over `groups`.

        Each group has `params`, `role` (relora.budget.cost), `base_learning_rate` and `weight_decay`. The trainer sets
        `lr` of each group before every step.
        """
        raise NotImplementedError(f"optimizer={self.name} has no build()")

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the bytes of the state of all tensors in `trained`. One stored element has `element_bytes`."""
        raise NotImplementedError(f"optimizer={self.name} has no state_bytes()")

    def step_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the peak bytes of temporary memory in an optimizer step."""
        return 0

    def step_flops(self, trained: Sequence[Trained]) -> int:
        """Return the FLOPs of the matrix products in an optimizer step."""
        return 0


@dataclass(kw_only=True, slots=True)
class WithAdam(Optimizer):
    """The base class of optimizers that use Adam's rule for all parameters or for some of them."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        positive("optimizer.epsilon", self.epsilon)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name}={shown(getattr(self, name))} must be at least 0 and below 1")
        at_most("optimizer.epsilon", self.epsilon, 1, "a larger value outweighs every gradient, so nothing is learned")

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the bytes of two moments and a step count for each tensor."""
        return AdamWCost().state_bytes(trained, element_bytes)

    def build_adamw(self, groups: list[dict[str, Any]]) -> "torch.optim.AdamW":
        """Build torch's fused AdamW over `groups`."""
        import torch

        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, eps=self.epsilon, fused=True)
