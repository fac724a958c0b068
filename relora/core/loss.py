"""Cross-entropy of a linear head that never holds the logits of all tokens in memory. Needs torch only.

torch.nn.functional.linear_cross_entropy (in torch 2.13, not in 2.8) does the same, but rounds the loss to the dtype of
its input. In bf16, a mean of 10.843 over 1,024 tokens became 10.625, which is too coarse to show progress of a run. On
the CPU it also took 1.8 to 5.5 times as long in bf16.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relora.budget.memory import LOGITS_NUMEL

IGNORED = -100
"""The target of a row that predicts nothing. It is also the default of torch.nn.functional.cross_entropy."""

PART_NUMEL = 2**22
"""How many elements of the head's gradient are added at a time when its dtype differs from that of the products."""


def _loss_and_errors(logits_NxV: Tensor, targets_Nx1: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss and its gradient with respect to the logits: softmax minus the one-hot target.

    A row whose target is IGNORED adds nothing to the loss, and its gradient is 0. The gradient overwrites the logits.
    If `training` is false, the second tensor is not the gradient and has no use.
    """
    # All operations for ignored rows are on N elements. They need no number from the device, and change no other row.
    ignored_Nx1 = targets_Nx1 == IGNORED
    targets_Nx1 = targets_Nx1.masked_fill(ignored_Nx1, 0)
    of_targets, highest = logits_NxV.gather(1, targets_Nx1), logits_NxV.amax(-1, keepdim=True)
    exponentials = logits_NxV.sub_(highest).exp_()
    sums = exponentials.sum(-1, keepdim=True)
    if training:
        exponentials.div_(sums.masked_fill(ignored_Nx1, math.inf))
        exponentials.scatter_add_(1, targets_Nx1, ignored_Nx1.to(sums.dtype) - 1)
    return (sums.log() + highest - of_targets).masked_fill(ignored_Nx1, 0).sum(), exponentials


class _SummedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy whose gradients are computed together with the loss, chunk by chunk, and only once.

    The backward pass scales the gradients in place, so that a second matrix of the head's size is never needed. A
    second backward pass through a retained graph is therefore an error, which torch raises.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor, training: bool) -> Tensor:
        vocab_size = weight_VxD.shape[0]
        total = torch.zeros((), dtype=torch.promote_types(torch.float32, hidden_NxD.dtype), device=hidden_NxD.device)
        grad_hidden = torch.empty_like(hidden_NxD) if training else None
        grad_weight = torch.empty_like(weight_VxD, dtype=total.dtype) if training else None
        size, words = max(1, LOGITS_NUMEL // vocab_size), max(1, PART_NUMEL // weight_VxD.shape[1])
        for start in range(0, len(targets_N), size):
            rows = slice(start, start + size)
            hidden = hidden_NxD[rows]
            logits = (hidden @ weight_VxD.T).to(total.dtype)
            loss, errors = _loss_and_errors(logits, targets_N[rows, None], training=training)
            del logits
            total += loss
            if grad_hidden is not None and grad_weight is not None:
                errors = errors.to(hidden.dtype)
                torch.mm(errors, weight_VxD, out=grad_hidden[rows])
                if grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(errors.T, hidden, beta=0 if start == 0 else 1)
                else:
                    # One part at a time: the CPU copies a tensor of another dtype before it adds it.
                    for first in range(0, vocab_size, words):
                        part = errors[:, first : first + words].T @ hidden
                        of_words = grad_weight[first : first + words]
                        of_words.copy_(part) if start == 0 else of_words.add_(part)
            errors = None  # free them before the next chunk's errors are created
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VxD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad.to(grad_hidden.dtype)), grad_weight.mul_(grad.to(grad_weight.dtype)), None, None


def dtype_of_products(factor: Tensor) -> torch.dtype:
    """Return the type in which a matrix product with `factor` is computed. Autocast may choose another type."""
    device = factor.device.type
    if torch.is_autocast_enabled(device) and factor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return factor.dtype


def summed_linear_cross_entropy(hidden_NxD: Tensor, weight_VxD: Tensor, targets_N: Tensor) -> Tensor:
    """Return the sum over N of -log softmax(hidden weight^T)[target], in fp32 or wider.

    Rows whose target is IGNORED count nothing. Autocast decides the dtype of the matrix products. At most
    `LOGITS_NUMEL` logits are in memory at a time.
    """
    dtype = dtype_of_products(hidden_NxD)
    training = torch.is_grad_enabled() and (hidden_NxD.requires_grad or weight_VxD.requires_grad)
    return _SummedCrossEntropy.apply(hidden_NxD.to(dtype), weight_VxD.to(dtype), targets_N, training)
