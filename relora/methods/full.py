"""Full-rank training: the baseline."""

from dataclasses import dataclass
from typing import ClassVar

from relora.methods.base import Method


@dataclass(kw_only=True, slots=True)
class Full(Method):
    """All weights are trained from first to last."""

    is_full_rank: ClassVar[bool] = True
