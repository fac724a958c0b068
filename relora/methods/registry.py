"""Which methods there are: relora's own, and those of installed packages (docs/your-own-method.md)."""

from relora.common.plugins import Registry
from relora.methods.base import Method
from relora.methods.control import Control
from relora.methods.full import Full
from relora.methods.galore import GaLore
from relora.methods.lora import LoRA
from relora.methods.relora import ReLoRA

BASELINE = "full"
"""The method that others are measured against."""

METHODS: Registry[Method] = Registry(
    "method", Method, {BASELINE: Full, "lora": LoRA, "relora": ReLoRA, "control": Control, "galore": GaLore}
)
