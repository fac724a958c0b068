"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in torch's fused implementation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.optimizers.base import WithAdam

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, slots=True)
class AdamW(WithAdam):
    """AdamW for all parameters."""

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Build torch's fused AdamW over `groups`."""
        return self.build_adamw(groups)
