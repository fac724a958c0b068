"""Linear layers made of two factors alone, W = B A, and the restart that refactorises the product. Needs torch only.

- Factors: Kamalakara et al. 2022 (arXiv 2209.13569). They begin as the best rank-r approximation of the weight that
  they replace, which is the spectral initialisation of Khodak et al. 2021 (arXiv 2105.01029, section 3.1).
- Restarts: arXiv 2505.22922. With W = B A = U S V^T, B becomes U S^1/2 and A becomes S^1/2 V^T. The product stays. The
  optimizer's state starts anew for all parameters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora.core.lowrank import plain_linear, replace_module, targeted_linears
from relora.core.merged import row_chunks, wide_dtype

M = TypeVar("M", bound=nn.Module)


class Factors(nn.Module):
    """The base class of layers with two trained factors: factor_A (rank x in), factor_B (out x rank), bias or None."""

    factor_A: nn.Parameter
    factor_B: nn.Parameter
    bias: nn.Parameter  # may be None, which the type of nn.Linear.bias in torch omits too

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.factor_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.factor_B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))
        self.bias = linear.bias

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        (rank, in_features), out_features = self.factor_A.shape, self.factor_B.shape[0]
        return f"in_features={in_features}, out_features={out_features}, rank={rank}"


class FactorisedLinear(Factors):
    """A linear layer y = x A^T B^T + b, without a weight of full rank."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output: ... x in -> ... x out."""
        return F.linear(F.linear(x, self.factor_A), self.factor_B, self.bias)

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return B A (out x in) in the stored dtype. The product is computed in fp32 or wider."""
        a, b = wide(self.factor_A), wide(self.factor_B)
        return (b @ a).to(self.factor_A.dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp32, or in its own dtype if that is wider."""
    return tensor.to(wide_dtype(tensor.dtype))


def best_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out x rank) and A (rank x in), whose product is the best approximation of `weight` of that rank.

    They are balanced: B^T B = A A^T. This is the truncated singular value decomposition (Eckart and Young 1936).
    """
    u, s, vh = torch.linalg.svd(wide(weight), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return balanced factors with the product `b` `a`: U S^1/2 and S^1/2 V^T of its singular value decomposition.

    The decomposition is that of an r x r matrix, after a QR decomposition of each factor. The product is never formed.
    """
    q_b, r_b = torch.linalg.qr(wide(b))
    q_a, r_a = torch.linalg.qr(wide(a).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s.sqrt()
    return q_b @ (u * root), (q_a @ (vh.T * root)).T


@contextmanager
def decomposing(name: str) -> Iterator[None]:
    """Raise ValueError, with the name of the layer, if a decomposition inside the block does not converge."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[reportPrivateImportUsage] -- documented by torch
        raise ValueError(f"the singular value decomposition for {name} failed: are its weights finite?") from error


@torch.no_grad()
def factorise(model: nn.Module, *, rank: int, target_modules: str | Sequence[str]) -> float:
    """Replace the targeted linear layers of `model` by factors of `rank`, in place.

    Returns:
        |B A| / |W|, the share of the Frobenius norm of all replaced weights that the factors keep.

    Raises:
        ValueError: As `relora.core.lowrank.targeted_linears`, or a decomposition fails.
    """
    kept: list[Tensor] = []
    for name, linear in targeted_linears(model, target_modules, rank=rank).items():
        layer = FactorisedLinear(linear, rank)
        with decomposing(name):
            b, a = best_factors(linear.weight, rank)
        layer.factor_B.copy_(b)
        layer.factor_A.copy_(a)
        kept.append(squared_norms(a, linear.weight))
        replace_module(model, name, layer)
    return share_of(kept)


def squared_norms(a: Tensor, weight: Tensor) -> Tensor:
    """Return |B A|^2 and |weight|^2 for the factors of `best_factors(weight)`.

    |B A|^2 is the sum of the squared singular values, and each row of A has the norm S^1/2.
    """
    return torch.stack([a.double().square().sum(1).square().sum(), weight.double().square().sum()])


def share_of(squares: Sequence[Tensor]) -> float:
    """Return the root of the first sum over the second, of tensors with two squared norms. 0 for a second sum of 0."""
    part, whole = torch.stack([each.cpu() for each in squares]).sum(0).tolist()
    return (part / whole) ** 0.5 if whole > 0 else 0.0


def multiply_out(model: M) -> M:
    """Replace all factorised layers by plain linear layers with the weight B A, in place. Return the same model."""
    for name, layer in _layers(model, FactorisedLinear):
        replace_module(model, name, plain_linear(layer.product(), layer.bias))
    return model


L = TypeVar("L", bound=nn.Module)


def _layers(model: nn.Module, kind: type[L]) -> Iterator[tuple[str, L]]:
    return ((name, module) for name, module in list(model.named_modules()) if isinstance(module, kind))


# ------------------------------------------------------------------------------------------------------- restarts


@torch.no_grad()
def refactorise(model: nn.Module) -> float:
    """Balance the factors of every layer, in place. Products stay, except by rounding to the stored dtype.

    A layer whose product is zero keeps its factors.

    Returns:
        The change of all products by rounding, |new - old| / |old|.

    Raises:
        ValueError: A factor is not finite, or a decomposition fails. The layers before it have changed.
    """
    changes: list[Tensor] = []
    for name, layer in _layers(model, Factors):
        old_b, old_a = wide(layer.factor_B).clone(), wide(layer.factor_A).clone()
        if not bool(old_b.isfinite().all() & old_a.isfinite().all()):
            raise ValueError(f"the factors of {name} are not finite")
        if old_b.any() and old_a.any():  # a product of zero has no factors with a gradient: these would stay zero
            with decomposing(name):
                b, a = balanced(old_b, old_a)
            layer.factor_B.copy_(b)
            layer.factor_A.copy_(a)
        changes.append(_change(old_b, old_a, wide(layer.factor_B), wide(layer.factor_A)))
    return share_of(changes)


def _change(old_b: Tensor, old_a: Tensor, new_b: Tensor, new_a: Tensor) -> Tensor:
    """Return |new_b new_a - old_b old_a|^2 and |old_b old_a|^2, and form the products by groups of rows."""
    squares = torch.zeros(2, dtype=torch.float64, device=old_a.device)
    rows_of = torch.empty(len(old_b), old_a.shape[1], device="meta")
    for rows in row_chunks(rows_of):
        old = old_b[rows] @ old_a
        change = new_b[rows] @ new_a - old
        squares += torch.stack([each.norm().double() ** 2 for each in (change, old)])
    return squares


def forget(optimizer: torch.optim.Optimizer) -> int:
    """Drop the state of all parameters, so that every moment and step count starts anew. Return how many had a state.

    An optimizer creates the state again at its next step, as for a parameter that it has never stepped. This works for
    every optimizer of torch, also for one whose state holds codes.
    """
    count = sum(bool(state) for state in optimizer.state.values())
    optimizer.state.clear()
    return count
