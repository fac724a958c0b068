"""SLTrain: linear layers of a low-rank product and a sparse matrix with a fixed random support. Needs torch only.

Han et al. 2024 (arXiv 2406.02214), section 3: W = (alpha/r) B A + S. Only B, A and the values of S are trained. The
positions of these values are drawn once, uniformly, and never change.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from relora.budget.replaced import INT32_POSITIONS, support_numel
from relora.core.factorised import FactorisedLinear, best_factors, decomposing, share_of, wide
from relora.core.keyed import keyed_generator
from relora.core.lowrank import replace_module, targeted_linears
from relora.core.merged import wide_dtype


def formed(a: Tensor, b: Tensor, values: Tensor, support: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return scaling * b a + S (out x in) in `dtype`. All sums are computed in `dtype` too."""
    weight = (b.to(dtype) @ a.to(dtype)).mul_(scaling)
    weight.view(-1).index_add_(0, support, values.to(dtype))
    return weight


class SparsePlusLowRank(torch.autograd.Function):
    """x (... x in) -> x W^T + bias (... x out) with W = scaling * B A + S, and the gradients of x, bias, A, B and S.

    W is formed in the forward pass, and again in the backward pass, so that it does not stay in memory (arXiv
    2406.02214, Algorithm 1). The gradient of W as a whole matrix gives that of the values: its entries on the support.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, support: Tensor, scaling: float, bias: Tensor | None
    ) -> Tensor:
        """Compute the output. The class describes the arguments."""
        ctx.save_for_backward(x, a, b, values, support)
        ctx.scaling = scaling
        weight = formed(a, b, values, support, scaling, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a gradient for each argument of `forward`, or None."""
        (grad,) = grads
        x, a, b, values, support = ctx.saved_tensors
        g_NxO, x_NxI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (g_NxO @ formed(a, b, values, support, ctx.scaling, grad.dtype)).view_as(x)
        if ctx.needs_input_grad[6]:
            grad_bias = g_NxO.sum(0)
        whole_OxI = g_NxO.T @ x_NxI
        grad_values = whole_OxI.view(-1).index_select(0, support).to(values.dtype)
        grad_a = (b.to(grad.dtype).T @ whole_OxI).mul_(ctx.scaling).to(a.dtype)
        grad_b = (whole_OxI @ a.to(grad.dtype).T).mul_(ctx.scaling).to(b.dtype)
        return grad_x, grad_a, grad_b, grad_values, None, None, grad_bias


class SparseLowRankLinear(FactorisedLinear):
    """A linear layer y = x (scaling * B A + S)^T + b.

    sparse_values has the entries of S, and support (a buffer) their positions in the flattened out x in matrix, in
    ascending order. Checkpoints keep both.
    """

    support: Tensor

    def __init__(self, linear: nn.Linear, *, rank: int, scaling: float, density: float) -> None:
        super().__init__(linear, rank)
        self.scaling = scaling
        positions = linear.in_features * linear.out_features
        count = support_numel(linear.in_features, linear.out_features, density)
        self.sparse_values = nn.Parameter(linear.weight.new_empty(count))
        kind = torch.int32 if positions <= INT32_POSITIONS else torch.int64
        self.register_buffer("support", torch.zeros(count, dtype=kind, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output: ... x in -> ... x out."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        factors = (self.factor_A, self.factor_B, self.sparse_values)
        return SparsePlusLowRank.apply(x, *factors, self.support, self.scaling, self.bias)  # type: ignore[return-value]

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return scaling * B A + S (out x in) in the stored dtype. The sum is computed in fp32 or wider."""
        kind = wide_dtype(self.factor_A.dtype)
        weight = formed(self.factor_A, self.factor_B, self.sparse_values, self.support, self.scaling, kind)
        return weight.to(self.factor_A.dtype)

    @torch.no_grad()
    def draw(self, *, seed: int, name: str) -> None:
        """Draw the support from (seed, name), uniformly and without repetition. The draw is on the CPU.

        `name` is the module's name in the model.
        """
        positions = self.factor_A.shape[1] * self.factor_B.shape[0]
        drawn = torch.randperm(positions, generator=keyed_generator(f"support/{seed}/{name}"), device="cpu")
        self.support.copy_(drawn[: len(self.support)].sort().values)

    @torch.no_grad()
    def initialise(self, *, seed: int, name: str) -> None:
        """Draw A and the values from (seed, name), and set B to 0: arXiv 2406.02214, section 3.2.

        A is drawn as by LoRA (Kaiming, a = sqrt 5), and the values uniformly from [-1/sqrt(in), 1/sqrt(in)].
        """
        a = torch.empty(self.factor_A.shape, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=keyed_generator(f"factor/{seed}/0/{name}"))
        limit = 1 / math.sqrt(a.shape[1])
        values = torch.empty(self.sparse_values.shape, device="cpu")
        nn.init.uniform_(values, -limit, limit, generator=keyed_generator(f"sparse/{seed}/{name}"))
        self.factor_A.copy_(a)
        self.factor_B.zero_()
        self.sparse_values.copy_(values)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> Tensor:
        """Approximate `weight` (out x in): its best factors, and what they lack on the support.

        Returns:
            |weight|^2 - |weight - approximation|^2 and |weight|^2.
        """
        b, a = best_factors(weight, self.factor_A.shape[0])
        rest = wide(weight) - b @ a
        values = rest.view(-1).index_select(0, self.support)
        self.factor_B.copy_(b / self.scaling**0.5)
        self.factor_A.copy_(a / self.scaling**0.5)
        self.sparse_values.copy_(values)
        whole, lost = (each.double().square().sum() for each in (weight, rest))
        return torch.stack([whole - lost + values.double().square().sum(), whole])


def sparsify(
    model: nn.Module,
    *,
    rank: int,
    scaling: float,
    density: float,
    target_modules: str | Sequence[str],
    seed: int,
    keeps_weights: bool,
) -> float | None:
    """Replace the targeted linear layers of `model` by low-rank plus sparse ones, in place.

    Args:
        model: The model to change.
        rank: Inner dimension of the factors.
        scaling: alpha / rank.
        density: The share of entries that have a sparse value.
        target_modules: As in `relora.core.lowrank.ReLoRAConfig`.
        seed: The seed of the run.
        keeps_weights: Whether the layers begin as an approximation of the weights. Otherwise they are drawn.

    Returns:
        With `keeps_weights`, the share of the Frobenius norm of all replaced weights that is kept: the root of
        1 - |W - approximation|^2 / |W|^2.

    Raises:
        ValueError: As `relora.core.lowrank.targeted_linears`.
    """
    kept: list[Tensor] = []
    for name, linear in targeted_linears(model, target_modules, rank=rank).items():
        layer = SparseLowRankLinear(linear, rank=rank, scaling=scaling, density=density)
        layer.draw(seed=seed, name=name)
        if keeps_weights:
            with decomposing(name):
                kept.append(layer.approximate(linear.weight))
        else:
            layer.initialise(seed=seed, name=name)
        replace_module(model, name, layer)
    return share_of(kept) if kept else None
