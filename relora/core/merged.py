"""The exact ways to compute a low-rank linear layer, y = x (W + scaling * B A)^T + b, on its merged weight.

The plain way never forms W + scaling * B A. The ways in this module form it, and their gradients are the same. The cost
per token of one layer, in multiply-adds, with in = i, out = o and rank = r:

- plain: 2io + 3r(i+o).
- merged weight, with the factors' gradients through x A^T and g B: 2io + 2r(i+o).
- merged weight, with the gradient of the whole matrix: 3io. It is then projected on A and B (2rio a backward pass).

relora.budget.cost.cheapest_way chooses one of them. Needs torch only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS_NUMEL = 2**24
"""How many elements of a weight are processed at a time where a wider copy is needed: 64 MiB of fp32."""


def row_chunks(weight: Tensor) -> list[slice]:
    """Split the rows of a matrix into chunks of about `ROWS_NUMEL` elements."""
    rows = max(1, ROWS_NUMEL // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or `dtype` if that is wider: the precision of sums, norms and decompositions."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def materialise(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, *, out: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute weight + scaling * lora_B lora_A (out x in).

    The sum is computed at least in the wider dtype of `weight` and `lora_A`, and rounded once.

    Args:
        weight: out x in.
        lora_A: rank x in.
        lora_B: out x rank.
        scaling: A number, or a trained scale.
        out: Receives the result if it has the right dtype, shape and device. Otherwise a new tensor is created.
        dtype: The dtype of the result.
    """
    if out is None or out.dtype != dtype or out.shape != weight.shape or out.device != weight.device:
        out = torch.empty_like(weight, dtype=dtype)
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling, 1.0
    if weight.dtype == lora_A.dtype == dtype:
        # A matrix product of bf16 operands accumulates in fp32.
        return torch.addmm(weight, lora_B, lora_A, alpha=scaling, out=out)
    wide = torch.promote_types(weight.dtype, lora_A.dtype)
    lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    with torch.autocast(weight.device.type, enabled=False):  # autocast would round every operand first
        for rows in row_chunks(weight):
            out[rows] = torch.addmm(weight[rows].to(wide), lora_B[rows], lora_A, alpha=scaling)
    return out


class MergedLinear(torch.autograd.Function):
    """x (... x in) -> x merged^T + bias (... x out), with gradients for x, bias, lora_A, lora_B and a trained scaling.

    `merged` is the result of `materialise`. If it is None, the forward pass and the backward pass each build the merged
    weight, so that it does not stay in memory. All matrix products are in the dtype of x. If `projected` is true, the
    gradients of the factors are projected from the gradient of the whole matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        merged: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor | float,
        projected: bool,
    ) -> Tensor:
        """Compute the output. The class describes the arguments."""
        scale_tensor = scaling if isinstance(scaling, Tensor) else None
        ctx.save_for_backward(x, merged, weight if merged is None else None, lora_A, lora_B, scale_tensor)
        ctx.scaling, ctx.projected = scaling, projected
        if merged is None:
            merged = materialise(weight, lora_A, lora_B, scaling, out=None, dtype=x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a gradient for each argument of `forward`, or None."""
        (grad,) = grads
        x, merged, weight, lora_A, lora_B, scale_tensor = ctx.saved_tensors
        scaling = ctx.scaling if scale_tensor is None else scale_tensor
        wants_x, _, _, wants_bias, _, _, wants_scaling, _ = ctx.needs_input_grad
        g_NxO, x_NxI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_bias = grad_A = grad_B = grad_scaling = None
        if wants_x:
            if merged is None:
                merged = materialise(weight, lora_A, lora_B, scaling, out=None, dtype=grad.dtype)
            grad_x = (g_NxO @ merged).view_as(x)
        if wants_bias:
            grad_bias = g_NxO.sum(0)
        a_RxI, b_OxR = lora_A.to(grad.dtype), lora_B.to(grad.dtype)
        if ctx.projected:
            whole_OxI = g_NxO.T @ x_NxI
            grad_A = b_OxR.T @ whole_OxI
            grad_B = whole_OxI @ a_RxI.T
        else:
            grad_A = (g_NxO @ b_OxR).T @ x_NxI
            grad_B = g_NxO.T @ (x_NxI @ a_RxI.T)
        grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        if wants_scaling:
            grad_scaling = (grad_B * lora_B).sum()
        grad_A, grad_B = grad_A.mul_(scaling), grad_B.mul_(scaling)
        return grad_x, None, None, grad_bias, grad_A, grad_B, grad_scaling, None
