"""What an optimizer is: its settings, what its state takes, and how it is built from groups of parameters.

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

    `embedding_learning_rate` is for what no method wraps: embeddings, head, norms (None: `learning_rate`).
    """

    keeps_codes: ClassVar[bool] = False
    """Whether its state holds codes, which a restart cannot prune as values."""

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
                "be at most 1: an update would take more from the weights than they are"
            )

    def check_here(self) -> None:
        """Raise ConfigError where this machine lacks what the optimizer needs. Asked by a launch, not of old runs."""

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """The torch optimizer over `groups`.

        Each group has `params`, `role` (relora.budget.cost), `base_learning_rate` and `weight_decay`. Before every
        update the trainer sets each group's `lr`.
        """
        raise NotImplementedError(f"optimizer={self.name} has no build()")

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """What the state of `trained` takes, where a stored element takes `element_bytes`."""
        raise NotImplementedError(f"optimizer={self.name} has no state_bytes()")

    def step_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """The most that a step holds for itself at a time."""
        return 0

    def step_flops(self, trained: Sequence[Trained]) -> int:
        """FLOPs of the matrix products in a step."""
        return 0


@dataclass(kw_only=True, slots=True)
class WithAdam(Optimizer):
    """An optimizer that uses Adam's rule for all parameters, or for some."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        Optimizer.__post_init__(self)
        positive("optimizer.epsilon", self.epsilon)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name}={shown(getattr(self, name))} must be at least 0 and below 1")
        at_most("optimizer.epsilon", self.epsilon, 1, "a larger one outweighs every gradient, and nothing is learned")

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Two moments and a step count."""
        return AdamWCost().state_bytes(trained, element_bytes)

    def build_adamw(self, groups: list[dict[str, Any]]) -> "torch.optim.AdamW":
        """Torch's fused AdamW."""
        import torch

        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, eps=self.epsilon, fused=True)
