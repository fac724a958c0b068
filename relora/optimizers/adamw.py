"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), torch's fused one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.optimizers.base import WithAdam

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True, slots=True)
class AdamW(WithAdam):
    """For all parameters."""

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """See the module."""
        return self.build_adamw(groups)
