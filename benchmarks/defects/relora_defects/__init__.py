"""ReLoRA with the defects of published implementations (docs/defects.md). It exists to measure them.

    pip install -e benchmarks/defects
    python run.py -m sweeps=defects experiments=laptop/small

`method=defective` is ReLoRA, except for the defects that `method.defects` names:

- zero_factors: A is zero as well as B when the model is wrapped. The gradient of each factor has the other as a factor.
  So both gradients are zero, and nothing low-rank is trained until the first restart draws A.
- unscaled_merge: a restart adds B A to W, and not alpha/rank * B A.
- independent_masks: a restart prunes the two moments of Adam with masks that are drawn apart, and keeps Adam's step. A
  first moment that keeps its value and loses its second moment makes an update far above the learning rate.
- dead_scale: a restart sets the trained scale to 0. B is 0 too. So the gradients of A, B and the scale are zero. With
  optimizer_reset.mode=zero they stay zero to the end. Otherwise the moments that survive the reset move them again.
- bf16_merge: W is stored in bf16 from the wrap on. A merge loses the part of the update below W's last bit.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from relora.common.checks import one_of
from relora.common.errors import ConfigError
from relora.methods.base import Restart
from relora.methods.relora import OptimizerReset, ReLoRA

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig

DEFECTS = ("zero_factors", "unscaled_merge", "independent_masks", "dead_scale", "bf16_merge")


@dataclass(kw_only=True, slots=True)
class Defective(ReLoRA):
    """ReLoRA with the named defects of published implementations."""

    short_names: ClassVar[dict[str, str]] = {**ReLoRA.short_names, "method.defects": "defects"}

    defects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        ReLoRA.__post_init__(self)
        for name in self.defects:
            one_of("method.defects", name, DEFECTS)
        self.defects = [name for name in DEFECTS if name in self.defects]

    def check(self, run: "RunConfig") -> None:
        """Refuse a dead scale where no scale is trained, or together with a merge that divides by the scale."""
        ReLoRA.check(self, run)
        if {"dead_scale", "unscaled_merge"} <= set(self.defects):
            raise ConfigError(
                "method.defects has dead_scale and unscaled_merge; they cannot be combined, leave out one"
            )
        if "dead_scale" in self.defects and not self.trainable_scaling:
            raise ConfigError("method.defects=[dead_scale] needs a trained scale: method.trainable_scaling=true")

    def begin(self, model: "nn.Module", run: "RunConfig") -> None:
        """Wrap the model as ReLoRA does. Then spoil the factors and the weights."""
        import torch

        from relora.core.lowrank import low_rank_layers

        ReLoRA.begin(self, model, run)
        with torch.no_grad():
            for _, layer in low_rank_layers(model):
                if "zero_factors" in self.defects:
                    layer.lora_A.zero_()
                if "bf16_merge" in self.defects:
                    layer.weight.copy_(layer.weight.bfloat16())

    def restart(self, model: "nn.Module", optimizer: "torch.optim.Optimizer", run: "RunConfig", number: int) -> Restart:
        """Restart as ReLoRA does, with the defects."""
        import torch

        from relora.core.lowrank import low_rank_layers

        layers = [layer for _, layer in low_rank_layers(model)]
        with torch.no_grad():
            for layer in layers if "unscaled_merge" in self.defects else []:
                layer.lora_B.div_(layer.scaling)  # the merge multiplies by the scale
        before = [layer.weight.clone() for layer in layers] if "bf16_merge" in self.defects else []
        method = self
        if "independent_masks" in self.defects:
            ratio = self.optimizer_reset.pruning_ratio
            masks = OptimizerReset(mode="random", pruning_ratio=ratio, moments="independent", reset_step=False)
            method = replace(self, optimizer_reset=masks)
        done = ReLoRA.restart(method, model, optimizer, run, number)
        with torch.no_grad():
            for layer in layers if "dead_scale" in self.defects else []:
                assert isinstance(layer.scaling, torch.nn.Parameter)
                layer.scaling.zero_()
            if before:
                lost = update = 0.0
                for layer, old in zip(layers, before, strict=True):
                    exact = layer.weight.clone()
                    layer.weight.copy_(exact.bfloat16())
                    lost += (exact - layer.weight).norm().item() ** 2
                    update += (exact - old).norm().item() ** 2
                share = math.sqrt(lost / update) if update else 0.0
                done = Restart(
                    metrics={**done.metrics, "rounding_loss": share},
                    message=f"{done.message}; bf16 lost {share:.1%} of the update",
                )
        return done
