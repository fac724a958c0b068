"""ReLoRA: pre-training language models from scratch through a sequence of low-rank updates (arXiv 2307.05695).

The names below are the algorithm as a library. Each is loaded at first use: `import relora` loads nothing heavy, and
using the names imports torch and no other heavy library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relora.core.exact_ways import refresh
    from relora.core.lowrank import LowRankLinear, ReLoRAConfig, merge_and_reinit, unwrap, wrap
    from relora.core.reset import reset_optimizer
    from relora.core.schedule import JaggedCosine, RestartClock

__version__ = "0.1.0"

__all__ = [
    "JaggedCosine",
    "LowRankLinear",
    "ReLoRAConfig",
    "RestartClock",
    "merge_and_reinit",
    "refresh",
    "reset_optimizer",
    "unwrap",
    "wrap",
]

_HOME = {
    "JaggedCosine": "relora.core.schedule",
    "LowRankLinear": "relora.core.lowrank",
    "ReLoRAConfig": "relora.core.lowrank",
    "RestartClock": "relora.core.schedule",
    "merge_and_reinit": "relora.core.lowrank",
    "refresh": "relora.core.exact_ways",
    "reset_optimizer": "relora.core.reset",
    "unwrap": "relora.core.lowrank",
    "wrap": "relora.core.lowrank",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'relora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
