"""APOLLO-Mini (arXiv 2412.05270, section 4.2): APOLLO with one learning rate per matrix, from a subspace of rank 1."""

import math
from dataclasses import dataclass
from typing import ClassVar

from relora.methods.apollo import Apollo


@dataclass(kw_only=True, slots=True)
class ApolloMini(Apollo):
    """As APOLLO, but for the rank, the scale and one learning rate per matrix."""

    is_tensor_wise: ClassVar[bool] = True

    rank: int = 1
    scale: float = math.sqrt(128)
