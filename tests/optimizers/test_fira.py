"""Fira against Algorithm 1 of arXiv 2410.01623, and the limiter that APOLLO shares with it."""

import io
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from relora.optimizers.fira import FiraAdamW

SHAPES = [(6, 10), (10, 6), (7, 7)]
EPSILON = 1e-8


def gradients_of(shape: tuple[int, int], steps: int, *, spike: int | None = None) -> list[Tensor]:
    """Random gradients. That of the step `spike` is a hundred times as large."""
    generator = torch.Generator().manual_seed(shape[0])
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [100 * gradient if step == spike else gradient for step, gradient in enumerate(drawn)]


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


def trained(start: Tensor, gradients: list[Tensor], **settings) -> Tensor:
    weight = nn.Parameter(start.clone())
    optimizer = FiraAdamW([weight], **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_equal_the_published_algorithm(shape: tuple[int, int]) -> None:
    start, gradients = torch.ones(shape, dtype=torch.float64), gradients_of(shape, 31, spike=17)
    settings = {"rank": 3, "update_interval_steps": 7, "scale": 0.25, "lr": 0.02, "square_side": "left"}
    weight = trained(start, gradients, growth_limit=1.01, **settings)
    paper = {"rank": 3, "every": 7, "scale": 0.25, "lr": 0.02}
    assert torch.allclose(weight, published(start, gradients, gamma=1.01, **paper), atol=1e-6, rtol=0)
    free = published(start, gradients, gamma=1e9, **paper)
    assert not torch.allclose(weight, free, atol=1e-3), "the limiter had something to limit"
    assert torch.allclose(trained(start, gradients, growth_limit=None, **settings), free, atol=1e-6, rtol=0)


def test_a_square_matrix_projected_from_the_right_is_its_transpose_from_the_left() -> None:
    gradients = gradients_of((7, 7), 10)
    settings = {"rank": 3, "update_interval_steps": 20, "lr": 0.02, "weight_decay": 0.1}
    right = trained(torch.ones(7, 7).double(), gradients, square_side="right", **settings)
    left = trained(torch.ones(7, 7).double(), [each.T for each in gradients], square_side="left", **settings)
    assert torch.allclose(right, left.T, atol=1e-9)


def test_the_update_has_full_rank_and_that_of_a_projected_adam_has_not() -> None:
    (gradient,) = gradients_of((8, 12), 1)
    change = trained(torch.zeros(8, 12).double(), [gradient], lr=1.0, rank=2)
    assert torch.linalg.matrix_rank(change) == 8


def test_a_group_without_rank_is_torchs_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
    one = FiraAdamW([ours], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    for gradient in gradients_of((5, 3), 5):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_weight_decay_is_decoupled() -> None:
    start, gradients = torch.ones(6, 10, dtype=torch.float64), gradients_of((6, 10), 1)
    plain = trained(start, gradients, lr=0.1, rank=2)
    decayed = trained(start, gradients, lr=0.1, rank=2, weight_decay=0.5)
    assert torch.allclose(decayed, plain - 0.1 * 0.5 * start)


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
    weights = [nn.Parameter(torch.ones(6, 10, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    gradients = gradients_of((6, 10), 8)

    def made() -> FiraAdamW:
        return FiraAdamW(
            [{"params": weights[:1], "rank": 2, "update_interval_steps": 5}, {"params": weights[1:]}], lr=0.1
        )

    def steps(optimizer: FiraAdamW, numbers: range) -> None:
        for number in numbers:
            weights[0].grad, weights[1].grad = gradients[number].to(dtype), gradients[number][0, :3].to(dtype)
            optimizer.step()

    whole = made()
    steps(whole, range(4))
    assert all(isinstance(value, Tensor) for state in whole.state.values() for value in state.values())
    assert whole.state[weights[0]]["update_norm"].dtype == torch.float32
    file = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "weights": [weight.detach() for weight in weights]}, file)
    steps(whole, range(4, 8))
    expected = [weight.detach().clone() for weight in weights]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for weight, value in zip(weights, saved["weights"], strict=True):
        weight.data.copy_(value)
    resumed = made()
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, range(4, 8))
    assert all(torch.equal(weight, value) for weight, value in zip(weights, expected, strict=True))
    assert torch.equal(resumed.state[weights[0]]["update_norm"], whole.state[weights[0]]["update_norm"])
