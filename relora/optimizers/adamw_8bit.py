"""AdamW with moments stored as 8-bit codes (Dettmers et al. 2022, arXiv 2110.02861), from bitsandbytes."""

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
"""Tensors with fewer elements keep fp32 moments."""
BLOCK_NUMEL = 256
"""Number of elements that share one scale."""
SCALE_BYTES, CODES = 4, 256


@dataclass(kw_only=True, slots=True)
class AdamW8bit(WithAdam):
    """8-bit AdamW for all parameters. Needs bitsandbytes: pip install 'relora[8bit]'."""

    keeps_codes: ClassVar[bool] = True

    def check_here(self) -> None:
        """Raise ConfigError if bitsandbytes is not installed."""
        if find_spec("bitsandbytes") is None:
            raise ConfigError("optimizer=adamw_8bit needs bitsandbytes; pip install 'relora[8bit]'")

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Build AdamW8bit of bitsandbytes over `groups`."""
        from bitsandbytes.optim.adamw import AdamW8bit as Adam

        return Adam(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon)

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the bytes of the state.

        Each moment has one byte per element and one scale per block. Two tables of code values are shared by all
        tensors. Small tensors keep fp32 moments.
        """
        found, tables = 0, 0
        for each in trained:
            if each.numel < LEAST_NUMEL:
                found += ADAM_MOMENTS * SCALE_BYTES * each.numel
            else:
                found += ADAM_MOMENTS * (each.numel + SCALE_BYTES * -(-each.numel // BLOCK_NUMEL))
                tables = ADAM_MOMENTS * CODES * SCALE_BYTES
        return found + tables
