"""The registry of optimizers: those of relora, and those of installed packages."""

from relora.common.plugins import Registry
from relora.optimizers.adamw import AdamW
from relora.optimizers.adamw_8bit import AdamW8bit
from relora.optimizers.base import Optimizer
from relora.optimizers.muon import Muon

OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer", Optimizer, {"adamw": AdamW, "muon": Muon, "adamw_8bit": AdamW8bit}
)
