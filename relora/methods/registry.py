"""The registry of methods: those of relora, and those of installed packages (docs/your-own-method.md)."""

from relora.common.plugins import Registry
from relora.methods.apollo import Apollo
from relora.methods.apollo_mini import ApolloMini
from relora.methods.base import Method
from relora.methods.cola import CoLA
from relora.methods.control import Control
from relora.methods.fira import Fira
from relora.methods.full import Full
from relora.methods.galore import GaLore
from relora.methods.lora import LoRA
from relora.methods.lowrank import LowRank
from relora.methods.relora import ReLoRA
from relora.methods.sltrain import SLTrain

BASELINE = "full"
"""The method with which all other methods are compared."""

METHODS: Registry[Method] = Registry(
    "method",
    Method,
    {
        BASELINE: Full,
        "lora": LoRA,
        "relora": ReLoRA,
        "control": Control,
        "galore": GaLore,
        "fira": Fira,
        "apollo": Apollo,
        "apollo_mini": ApolloMini,
        "lowrank": LowRank,
        "sltrain": SLTrain,
        "cola": CoLA,
    },
)
