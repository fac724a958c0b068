"""Fira against Algorithm 1 of arXiv 2410.01623, and the limiter that APOLLO shares with it."""

import itertools
import math

import pytest
import torch
from subspaces import continued_to_the_bit, gradients_of, trained
from torch import Tensor, nn

from relora.optimizers.fira import FiraAdamW

SHAPES = [(6, 10), (10, 6), (7, 7)]
EPSILON = 1e-8


def published(
    weight: Tensor, gradients: list[Tensor], *, rank: int, every: int, scale: float, lr: float, gamma: float
) -> Tensor:
    """Algorithm 1 written out for m <= n, in float64. A matrix with m > n is its transpose."""
    turned = weight.shape[0] > weight.shape[1]
    if turned:
        weight, gradients = weight.T, [gradient.T for gradient in gradients]
    rows, columns = weight.shape
    weight, m, v = weight.clone(), torch.zeros(rank, columns).double(), torch.zeros(rank, columns).double()
    basis, last = torch.empty(0), math.inf
    for t, gradient in enumerate(gradients, start=1):
        if (t - 1) % every == 0:
            # The signs of singular vectors are arbitrary, and the moments keep the old ones.
            basis = (torch.linalg.svd(gradient.T)[2].T if turned else torch.linalg.svd(gradient)[0])[:, :rank]
        r = basis.T @ gradient
        s = (torch.eye(rows).double() - basis @ basis.T) @ gradient
        m = 0.9 * m + 0.1 * r
        v = 0.999 * v + 0.001 * r**2
        n = math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + EPSILON)
        for i in range(columns):
            s[:, i] *= n[:, i].norm() / (r[:, i].norm() + EPSILON)
        s = s * gamma / max((s.norm() / (last + EPSILON)).item(), gamma)
        last = s.norm().item()
        weight = weight - lr * scale * (basis @ n + s)
    return weight.T if turned else weight


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_equal_the_published_algorithm(shape: tuple[int, int]) -> None:
    start, gradients = torch.ones(shape, dtype=torch.float64), gradients_of(shape, 31, spike=17)
    settings = {"rank": 3, "update_interval_steps": 7, "scale": 0.25, "lr": 0.02, "square_side": "left"}
    weight = trained(FiraAdamW, start, gradients, growth_limit=1.01, **settings)
    paper = {"rank": 3, "every": 7, "scale": 0.25, "lr": 0.02}
    assert torch.allclose(weight, published(start, gradients, gamma=1.01, **paper), atol=1e-6, rtol=0)
    free = published(start, gradients, gamma=1e9, **paper)
    assert not torch.allclose(weight, free, atol=1e-3), "the limiter had something to limit"
    assert torch.allclose(trained(FiraAdamW, start, gradients, growth_limit=None, **settings), free, atol=1e-6, rtol=0)


def test_the_update_has_full_rank_and_that_of_a_projected_adam_has_not() -> None:
    (gradient,) = gradients_of((8, 12), 1)
    change = trained(FiraAdamW, torch.zeros(8, 12).double(), [gradient], lr=1.0, rank=2)
    assert torch.linalg.matrix_rank(change) == 8


# ----------------------------------------------------------------------------------------------------- the limiter


def test_norms_grow_by_at_most_the_limit_and_shrink_freely() -> None:
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = FiraAdamW([weight], lr=0.1, rank=2, growth_limit=1.01)
    norms = []
    for gradient in gradients_of((6, 10), 30):
        weight.grad = gradient.float()
        optimizer.step()
        norms.append(optimizer.state[weight]["update_norm"].item())
    growth = [new / old for old, new in itertools.pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, rel=1e-5)
    assert min(growth) < 0.99


def test_a_step_without_a_gradient_does_not_stop_all_later_updates() -> None:
    weight = nn.Parameter(torch.zeros(6, 10, dtype=torch.float64))
    optimizer = FiraAdamW([weight], lr=0.1, rank=2)
    first, second = gradients_of((6, 10), 2)
    norms = []
    for gradient in (first, torch.zeros_like(first), second):
        weight.grad = gradient.clone()
        optimizer.step()
        norms.append(optimizer.state[weight]["update_norm"].item())
    assert norms[0] == norms[1] > 0
    assert norms[2] > 0.5 * norms[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_tensors_and_continues_to_the_bit(dtype: torch.dtype) -> None:
    """In bf16 too, where torch would cast the norm to bf16."""
    whole, resumed, weight = continued_to_the_bit(FiraAdamW, dtype)
    assert whole.state[weight]["update_norm"].dtype == torch.float32
    assert torch.equal(resumed.state[weight]["update_norm"], whole.state[weight]["update_norm"])
