"""Torch's Muon (Jordan et al. 2024) for matrices and factors, and AdamW for all other parameters.

Muon changes a matrix along the orthogonalised momentum of its gradient. Its learning rate is scaled by
0.2 sqrt(max(rows, columns)). Its updates are then as large as AdamW's, and AdamW's learning rates can be used (Liu et
al. 2025, arXiv 2502.16982, section 2.2).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from relora.budget.cost import FACTORS, MATRICES, AdamWCost, Trained
from relora.common.checks import at_least, at_most
from relora.common.errors import ConfigError, shown
from relora.optimizers.base import WithAdam

if TYPE_CHECKING:
    import torch

ORTHOGONALISED = (FACTORS, MATRICES)


@dataclass(kw_only=True, slots=True)
class Muon(WithAdam):
    """Muon uses `momentum` and `newton_schulz_steps`. AdamW uses `beta1`, `beta2` and `epsilon`."""

    momentum: float = 0.95
    newton_schulz_steps: int = 5

    def __post_init__(self) -> None:
        WithAdam.__post_init__(self)
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"optimizer.momentum={shown(self.momentum)} must be at least 0 and below 1")
        at_least("optimizer.newton_schulz_steps", self.newton_schulz_steps, 1)
        at_most("optimizer.newton_schulz_steps", self.newton_schulz_steps, 99, "torch allows fewer than 100")

    def check_here(self) -> None:
        """Raise ConfigError if torch is too old to have Muon."""
        numbers = [int(part) for part in re.findall(r"\d+", version("torch"))[:2]]
        if numbers < [2, 9]:
            raise ConfigError(f"optimizer=muon needs torch 2.9 or newer, and this is {version('torch')}; upgrade torch")

    def build(self, groups: list[dict[str, Any]]) -> "torch.optim.Optimizer":
        """Build Muon and AdamW, joined into one optimizer."""
        from relora.optimizers.joined import muon_and_adamw

        return muon_and_adamw(
            [group for group in groups if group["role"] in ORTHOGONALISED],
            self.build_adamw([group for group in groups if group["role"] not in ORTHOGONALISED]),
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            newton_schulz_steps=self.newton_schulz_steps,
        )

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the bytes of one momentum for matrices and factors, and of AdamW's state for the rest."""
        momenta = element_bytes * sum(each.numel for each in trained if each.role in ORTHOGONALISED)
        return momenta + AdamWCost().state_bytes(
            [each for each in trained if each.role not in ORTHOGONALISED], element_bytes
        )

    def step_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the peak bytes of temporary memory in an optimizer step.

        It holds the update, two copies of it in bf16, and three bf16 squares of its shorter side (torch 2.13). The
        third square is the scratch memory of a matrix product. Some CPUs take less.
        """
        sizes = [sorted((each.rows, each.columns)) for each in trained if each.role in ORTHOGONALISED]
        return max((short * long * (element_bytes + 4) + 6 * short * short for short, long in sizes), default=0)

    def step_flops(self, trained: Sequence[Trained]) -> int:
        """Return the FLOPs of the matrix products in an optimizer step.

        One iteration on m x n, m <= n, multiplies m x n by n x m, m x m by m x m and m x m by m x n.
        """
        flops = 0
        for each in trained:
            if each.role in ORTHOGONALISED:
                short, long = sorted((each.rows, each.columns))
                flops += self.newton_schulz_steps * (4 * short * short * long + 2 * short**3)
        return flops
