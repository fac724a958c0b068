"""A low-rank layer on its merged weight: the cheaper exact ways, chosen by `refresh`, and when they are out of date.

The plain formula of `relora.core.lowrank` needs nothing of this. A merged weight that is kept is a cache: it is used
only while the tensors that it was made of are unchanged.
"""

import weakref
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from relora.budget.cost import MERGED_WEIGHTS, PLAIN, PROJECTED, cheapest_way
from relora.core.merged import MergedLinear, materialise


class ExactWays(nn.Module):
    """The base of a low-rank layer: keeps which way is chosen, and its merged weight where that is kept.

    The layer has weight (out x in), bias (out, or None), lora_A (rank x in), lora_B (out x rank), scaling and dropout.
    """

    in_features: int
    out_features: int
    rank: int
    weight: Tensor
    bias: nn.Parameter  # or None, which torch leaves out of the type of nn.Linear too
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: nn.Parameter | float
    dropout: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self._way = PLAIN
        self._merged: Tensor | None = None
        self._compute_dtype: torch.dtype | None = None
        self._versions: tuple[tuple[int, int], ...] = ()

    def _faster(self, x: Tensor) -> Tensor | None:
        """The layer's output by the way that was chosen; None where only the plain formula will do."""
        if self._way == PLAIN or (converted := self._convertible(x)) is None:
            return None
        factors = (self.lora_A, self.lora_B, self.scaling)
        return MergedLinear.apply(converted, self._merged, self.weight, self.bias, *factors, self._way == PROJECTED)

    def _convertible(self, x: Tensor) -> Tensor | None:
        """x in the dtype that is computed in, or None where only the plain formula will do."""
        if (self.training and isinstance(self.dropout, nn.Dropout)) or self.weight.requires_grad:
            return None
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        if dtype != self._compute_dtype:
            return None
        if self._merged is not None and not torch.compiler.is_compiling() and self._versions != self._versions_now():
            return None
        return x.to(dtype)

    def _versions_now(self) -> tuple[tuple[int, int], ...]:
        """Each tensor's id and torch's count of its changes in place. Fused optimizers do not count: hence the hook."""
        tensors = (self.weight, self.lora_A, self.lora_B, self.scaling)
        return tuple((id(tensor), tensor._version) for tensor in tensors if isinstance(tensor, Tensor))

    @torch.inference_mode(False)  # what is made in it has no gradient ever after
    @torch.no_grad()
    def refresh(self, way: str, *, resident: bool, dtype: torch.dtype) -> None:
        """Compute by `way` from here on, in `dtype`; where `resident`, on a merged weight that is made now and kept."""
        self._way, self._compute_dtype = way, dtype
        if way == PLAIN or not resident:
            self._merged = None
            return
        factors = (self.lora_A, self.lora_B, self.scaling)
        self._merged = materialise(self.weight, *factors, out=self._merged, dtype=dtype)
        self._versions = self._versions_now()
        _watch_optimizers()
        for tensor in (self.weight, *factors):
            if isinstance(tensor, Tensor):
                _resident[id(tensor)] = self

    def outdate(self) -> None:
        """Compute the plain formula until the next refresh, where a merged weight is kept: it is out of date."""
        if self._merged is not None:
            self._way = PLAIN

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.outdate()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # Moved or converted: the merged weight is no part of the state and stays behind.
        self._way, self._merged = PLAIN, None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no merged weight: no hook would tell it that its own is out of date."""
        return dict(super().__getstate__()) | {"_way": PLAIN, "_merged": None}


# ------------------------------------------------------------------------------------ optimizers that do not count

_resident: "weakref.WeakValueDictionary[int, ExactWays]" = weakref.WeakValueDictionary()
"""The layer of each tensor, by its id, that a merged weight was made of and that no optimizer has stepped since."""

_watches = False


def _watch_optimizers() -> None:
    """Hear of every optimizer's step from now on. Whoever keeps no merged weight installs no hook."""
    global _watches
    if not _watches:
        # Before a step, as a hook of the optimizer's own may drop the gradients; after it, as a closure makes them.
        register_optimizer_step_pre_hook(_outdate_stepped)
        register_optimizer_step_post_hook(_outdate_stepped)
        _watches = True


def _outdate_stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Outdate the layers with a tensor that `optimizer` steps: one that it holds and that has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and (layer := _resident.pop(id(parameter), None)) is not None:
                layer.outdate()


# -------------------------------------------------------------------------------------------------- whole models


def refresh(
    model: nn.Module,
    *,
    merged_weight: str = "resident",
    tokens_per_micro_step: int | None = None,
    micro_steps: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Let every low-rank layer compute by the cheapest exact way until its weights change: call it again then.

    Args:
        model: a model that `relora.wrap` has given factors.
        merged_weight: "resident" keeps W + scaling * B A of each layer in memory, made here. "rebuilt" makes it in each
            forward and backward pass and keeps none. "never" takes the plain formula.
        tokens_per_micro_step: how many tokens pass the model at a time; None stands for many.
        micro_steps: how often that is until the next refresh. relora.budget.cost.cheapest_way weighs both.
        dtype: what layers compute in, e.g. torch.bfloat16 under autocast; None means that of the weights.

    A merged weight that is out of date is not used: after an optimizer's step, a merge, a load or a change in place,
    layers compute the plain formula. A change through `.data` is not noticed, nor one in place in compiled code.

    Raises:
        ValueError: the model has no low-rank layers, or `merged_weight` is another word.
    """
    if merged_weight not in MERGED_WEIGHTS:
        raise ValueError(f"merged_weight={merged_weight!r} is not one of {', '.join(MERGED_WEIGHTS)}")
    layers = [module for module in model.modules() if isinstance(module, ExactWays)]
    if not layers:
        raise ValueError("the model has no low-rank layers; call wrap(model, ReLoRAConfig(...)) first")
    for layer in layers:
        way = cheapest_way(
            layer.in_features,
            layer.out_features,
            layer.rank,
            merged_weight=merged_weight,
            tokens_per_micro_step=tokens_per_micro_step,
            micro_steps=micro_steps,
        )
        layer.refresh(way, resident=merged_weight == "resident", dtype=dtype or layer.weight.dtype)
