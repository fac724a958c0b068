"""The exact ways to compute a low-rank linear, y = x (W + scaling * B A)^T + b, on its merged weight. Needs torch only.

The plain way never forms W + scaling * B A; these do, and have the same gradients. Per token and layer of in = i,
out = o and rank = r, in multiply-adds: the plain way takes 2io + 3r(i+o), the merged weight 2io + 2r(i+o) with the
factors' gradients through x A^T and g B, or 3io through the gradient of the whole matrix, which is projected on A and
B (2rio a backward). relora.budget.cost.cheapest_way says which.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS_NUMEL = 2**24
"""Elements of a weight that are handled at a time where a wider copy is needed: 64 MiB of fp32."""


def row_chunks(weight: Tensor) -> list[slice]:
    """The rows of a matrix, so many at a time that a chunk has about `ROWS_NUMEL` elements."""
    rows = max(1, ROWS_NUMEL // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


@torch.no_grad()
def materialise(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, *, out: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """weight + scaling * lora_B lora_A (out x in) in `dtype`, summed at least in the wider type and rounded once.

    Into `out`, if that is a tensor of the right dtype, shape and device; into a new tensor otherwise.
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
    with torch.autocast(weight.device.type, enabled=False):  # it would round every part first
        for rows in row_chunks(weight):
            out[rows] = torch.addmm(weight[rows].to(wide), lora_B[rows], lora_A, alpha=scaling)
    return out


class MergedLinear(torch.autograd.Function):
    """x (... x in) -> x merged^T + bias (... x out), with gradients for x, bias, lora_A, lora_B and a trained scaling.

    `merged` is the weight as `materialise` left it; None means to build it here, and again in the backward pass, so
    that it never stays in memory. All matrix products are in the dtype of x. `projected` chooses how the gradients of
    the factors are formed.
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
        """See the class."""
        scale_tensor = scaling if isinstance(scaling, Tensor) else None
        ctx.save_for_backward(x, merged, weight if merged is None else None, lora_A, lora_B, scale_tensor)
        ctx.scaling, ctx.projected = scaling, projected
        if merged is None:
            merged = materialise(weight, lora_A, lora_B, scaling, out=None, dtype=x.dtype)
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A gradient for each argument of `forward`."""
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
