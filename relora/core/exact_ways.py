"""The cheaper exact ways to compute a low-rank layer on its merged weight. `refresh` chooses one of them.

The plain formula of `relora.core.lowrank` does not need this module. A kept merged weight is a cache: a layer uses it
only while the tensors behind it are unchanged.
"""

import weakref
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from relora.budget.cost import MERGED_WEIGHTS, PLAIN, PROJECTED, cheapest_way
from relora.core.merged import MergedLinear, materialise


class ExactWays(nn.Module):
    """The base class of a low-rank layer. It holds the chosen way, and the merged weight if that is kept.

    A subclass has weight (out x in), bias (out, or None), lora_A (rank x in), lora_B (out x rank), scaling and dropout.
    """

    in_features: int
    out_features: int
    rank: int
    weight: Tensor
    bias: nn.Parameter  # may be None, which the type of nn.Linear.bias in torch omits too
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
        """Return the layer's output by the chosen way, or None if only the plain formula is possible."""
        if self._way == PLAIN or (converted := self._convertible(x)) is None:
            return None
        factors = (self.lora_A, self.lora_B, self.scaling)
        return MergedLinear.apply(converted, self._merged, self.weight, self.bias, *factors, self._way == PROJECTED)

    def _convertible(self, x: Tensor) -> Tensor | None:
        """Return x in the compute dtype, or None if only the plain formula is possible."""
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
        """Return each tensor's id and torch's count of its changes in place.

        Fused optimizers do not increase this count, so hooks watch the optimizers too.
        """
        tensors = (self.weight, self.lora_A, self.lora_B, self.scaling)
        return tuple((id(tensor), tensor._version) for tensor in tensors if isinstance(tensor, Tensor))

    @torch.inference_mode(False)  # a tensor created in inference mode can never have a gradient
    @torch.no_grad()
    def refresh(self, way: str, *, resident: bool, dtype: torch.dtype) -> None:
        """Choose how the layer computes its output until the next call.

        Args:
            way: PLAIN, FACTORED or PROJECTED of relora.budget.cost.
            resident: Whether to compute the merged weight now and keep it.
            dtype: The dtype in which the layer computes.
        """
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
        """Mark a kept merged weight as out of date: the layer computes the plain formula until the next refresh."""
        if self._merged is not None:
            self._way = PLAIN

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.outdate()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # The layer is moved or converted. The merged weight is not part of its state, so it is dropped.
        self._way, self._merged = PLAIN, None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without the merged weight: no hook would mark the copy's weight as outdated."""
        return dict(super().__getstate__()) | {"_way": PLAIN, "_merged": None}


# ------------------------------------------------------------------------------------ optimizers that do not count

_resident: "weakref.WeakValueDictionary[int, ExactWays]" = weakref.WeakValueDictionary()
"""Tensor id to layer, for the tensors of each kept merged weight that no optimizer has stepped since its refresh."""

_watches = False


def _watch_optimizers() -> None:
    """Watch the steps of all optimizers from now on. The hooks are installed only when a merged weight is kept."""
    global _watches
    if not _watches:
        # Before a step, because an optimizer's hook may drop gradients. After it, because a closure creates them.
        register_optimizer_step_pre_hook(_outdate_stepped)
        register_optimizer_step_post_hook(_outdate_stepped)
        _watches = True


def _outdate_stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Outdate the layers whose tensors `optimizer` steps: tensors that it holds and that have a gradient."""
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
    """Let every low-rank layer compute by the cheapest exact way. Call this again after the weights have changed.

    A merged weight that is out of date is not used: after an optimizer step, a merge, a load or a change in place, the
    layers compute the plain formula. A change through `.data` is not noticed. A change in place in compiled code is not
    noticed either.

    Args:
        model: A model that `relora.wrap` has given factors.
        merged_weight: "resident" computes W + scaling * B A of each layer now and keeps it in memory. "rebuilt"
            computes it in each forward and backward pass and does not keep it. "never" uses the plain formula.
        tokens_per_micro_step: How many tokens pass through the model in one micro-step. None means many.
        micro_steps: The number of micro-steps until the next refresh. Both numbers enter
            relora.budget.cost.cheapest_way.
        dtype: The dtype in which layers compute, e.g. torch.bfloat16 under autocast. None means that of the weights.

    Raises:
        ValueError: The model has no low-rank layers, or `merged_weight` has another value.
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
