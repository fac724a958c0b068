"""A Llama with layers B silu(A x) in the place of its matrices: CoLA (Liu et al. 2025, arXiv 2502.10940).

relora copies this file into the folder of an exported model. It needs torch and transformers only.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM


class CoLALlamaConfig(LlamaConfig):
    """The config of a Llama, with the rank and the matrices of CoLA."""

    model_type = "cola_llama"

    # Without annotations: they are plain attributes, which config.json replaces, in every version of transformers.
    cola_rank = 1
    cola_target_modules = ()


class CoLALinear(nn.Module):
    """y = B silu(A x) + b, with factor_A (rank x in), factor_B (out x rank), and bias (out) or None."""

    def __init__(self, linear: nn.Linear, rank: int, deviation: float) -> None:
        super().__init__()
        # Entries of B A get the standard deviation of those of a matrix. Loaded weights replace them.
        each = (deviation / rank**0.5) ** 0.5
        self.factor_A = nn.Parameter(each * torch.randn(rank, linear.in_features))
        self.factor_B = nn.Parameter(each * torch.randn(linear.out_features, rank))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output: ... x in -> ... x out."""
        return F.linear(F.silu(F.linear(x, self.factor_A)), self.factor_B, self.bias)


class CoLALlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose matrices in `config.cola_target_modules` (name endings) are CoLA layers of `config.cola_rank`."""

    config_class = CoLALlamaConfig

    def __init__(self, config: CoLALlamaConfig) -> None:
        super().__init__(config)
        for name, module in list(self.named_modules()):
            is_targeted = any(f".{name}".endswith(f".{ending}") for ending in config.cola_target_modules)
            if isinstance(module, nn.Linear) and is_targeted:
                parent, _, attribute = name.rpartition(".")
                layer = CoLALinear(module, config.cola_rank, config.initializer_range)
                setattr(self.get_submodule(parent), attribute, layer)


AUTO_CLASSES = {"AutoConfig": CoLALlamaConfig, "AutoModelForCausalLM": CoLALlamaForCausalLM}
"""The classes of transformers that load a folder with this file, each with the class that it uses."""
