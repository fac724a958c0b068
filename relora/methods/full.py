"""Full-rank training: the baseline."""

from dataclasses import dataclass
from typing import ClassVar

from relora.methods.base import Method


@dataclass(kw_only=True, slots=True)
class Full(Method):
    """Trains all weights in all steps."""

    is_full_rank: ClassVar[bool] = True
