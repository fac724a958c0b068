"""CoLA: layers with a low-rank activation, y = B silu(A x). Needs torch only.

Liu et al. 2025 (arXiv 2502.10940), section 3.2: each linear layer W x becomes B f(A x) with f = silu, in every matrix
of attention and MLP. CoLA-M (section 4) keeps only the activations A x for the backward pass, and computes all others
again: here that is trainer.activation_checkpointing (relora.core.keeping).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora.core.factorised import Factors, best_factors, decomposing, share_of, squared_norms
from relora.core.keeping import kept
from relora.core.keyed import keyed_generator
from relora.core.lowrank import replace_module, targeted_linears


class DownProjection(torch.autograd.Function):
    """x (... x in), a (rank x in) -> x a^T (... x rank), which activation checkpointing keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        """Compute the output, or return the kept one."""
        ctx.save_for_backward(x, a)
        return kept(lambda: F.linear(x, a))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x and a."""
        (grad,) = grads
        x, a = ctx.saved_tensors
        grad_x = grad @ a if ctx.needs_input_grad[0] else None
        return grad_x, grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


class CoLALinear(Factors):
    """y = B silu(A x) + b, with factor_A (rank x in) and factor_B (out x rank)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output: ... x in -> ... x out."""
        a, device = self.factor_A, x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, a = x.to(dtype), a.to(dtype)
        down: Tensor = DownProjection.apply(x, a)  # type: ignore[assignment]
        return F.linear(F.silu(down), self.factor_B, self.bias)

    @torch.no_grad()
    def initialise(self, weight: Tensor, *, seed: int, name: str) -> None:
        """Draw both factors from (seed, name), normally distributed with equal variance, on the CPU.

        Entries of B A have the variance of those of `weight`, the random matrix that the layer replaces. The text of
        the paper that we had does not say how the factors begin, so this is our choice.
        """
        rank = self.factor_A.shape[0]
        deviation = (weight.double().std(correction=0).item() / rank**0.5) ** 0.5
        for letter, factor in (("A", self.factor_A), ("B", self.factor_B)):
            generator = keyed_generator(f"factor/{seed}/0/{name}/{letter}")
            factor.copy_(torch.empty(factor.shape, device="cpu").normal_(0, deviation, generator=generator))

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> Tensor:
        """Let the layer equal the best approximation of `weight` x to first order in x: silu(z) = z/2 + O(z^2).

        Returns:
            The squared Frobenius norms of the approximation and of the weight.
        """
        b, a = best_factors(weight, self.factor_A.shape[0])
        self.factor_B.copy_(b * 2**0.5)
        self.factor_A.copy_(a * 2**0.5)
        return squared_norms(a, weight)


def activate(
    model: nn.Module, *, rank: int, target_modules: str | Sequence[str], seed: int, keeps_weights: bool
) -> float | None:
    """Replace the targeted linear layers of `model` by layers B silu(A x), in place.

    Args:
        model: The model to change.
        rank: The size of A x.
        target_modules: As in `relora.core.lowrank.ReLoRAConfig`.
        seed: The seed of the run.
        keeps_weights: Whether the layers begin as an approximation of the weights. Otherwise they are drawn.

    Returns:
        With `keeps_weights`, the share of the Frobenius norm of all replaced weights that the factors keep to first
        order.

    Raises:
        ValueError: As `relora.core.lowrank.targeted_linears`.
    """
    norms: list[Tensor] = []
    for name, linear in targeted_linears(model, target_modules, rank=rank).items():
        layer = CoLALinear(linear, rank)
        if keeps_weights:
            with decomposing(name):
                norms.append(layer.approximate(linear.weight))
        else:
            layer.initialise(linear.weight, seed=seed, name=name)
        replace_module(model, name, layer)
    return share_of(norms) if norms else None
