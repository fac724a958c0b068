"""AdamW whose moments are codes of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), bitsandbytes' own."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from relora.budget.cost import ADAM_MOMENTS, Trained
from relora.common.errors import ConfigError
from relora.optimizers.base import WithAdam

if TYPE_CHECKING:
    import torch

LEAST_NUMEL = 4096
"""Smaller tensors keep fp32 moments."""
BLOCK_NUMEL = 256
"""Elements that share a scale."""
SCALE_BYTES, CODES = 4, 256


@dataclass(kw_only=True, slots=True)
class AdamW8bit(WithAdam):
    """For all parameters. Needs bitsandbytes: pip install 'relora[8bit]'."""

    keeps_codes: ClassVar[bool] = True

    def check_here(self) -> None:
        """Raise ConfigError where bitsandbytes is not installed."""
        if find_spec("bitsandbytes") is None:
            raise ConfigError("optimizer=adamw_8bit needs bitsandbytes; pip install 'relora[8bit]'")

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """See the module."""
        from bitsandbytes.optim.adamw import AdamW8bit as Adam

        return Adam(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon)

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """A byte an element and a scale a block of each moment; two tables of code values, shared by all tensors."""
        found, tables = 0, 0
        for each in trained:
            if each.numel < LEAST_NUMEL:
                found += ADAM_MOMENTS * SCALE_BYTES * each.numel
            else:
                found += ADAM_MOMENTS * (each.numel + SCALE_BYTES * -(-each.numel // BLOCK_NUMEL))
                tables = ADAM_MOMENTS * CODES * SCALE_BYTES
        return found + tables
