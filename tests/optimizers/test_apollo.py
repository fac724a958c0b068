"""APOLLO and APOLLO-Mini against Algorithm 1 of arXiv 2412.05270."""

import hashlib
import math

import pytest
import torch
from subspaces import continued_to_the_bit, gradients_of, trained
from torch import Tensor, nn

from relora.optimizers.apollo import ApolloAdamW, random_projection

SHAPES = [(6, 10), (10, 6), (7, 7)]
EPSILON = 1e-8
CPU = torch.device("cpu")


def drawn(key: str, rank: int, size: int) -> Tensor:
    """N(0, 1/r), from the key that the optimizer documents."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
    normal = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normal * math.sqrt(1 / rank)


def published(
    weight: Tensor, gradients: list[Tensor], *, rank: int, every: int, alpha: float, lr: float, gamma: float, mini: bool
) -> Tensor:
    """Algorithm 1 and equation 4 written out for m <= n, in float64. A matrix with m > n is its transpose."""
    turned = weight.shape[0] > weight.shape[1]
    if turned:
        weight, gradients = weight.T, [gradient.T for gradient in gradients]
    rows, columns = weight.shape
    weight, m, v = weight.clone(), torch.zeros(rank, columns).double(), torch.zeros(rank, columns).double()
    projection, last = torch.empty(0), math.inf
    for t, gradient in enumerate(gradients):
        if t % every == 0:
            projection = drawn(f"apollo/5/{t // every}/0", rank, rows)
        r = projection @ gradient
        m = 0.9 * m + 0.1 * r
        v = 0.999 * v + 0.001 * r**2
        tilde = (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + EPSILON)
        if mini:
            scaled = gradient * (tilde.norm() / r.norm())
        else:
            s = torch.tensor([(tilde[:, j].norm() / r[:, j].norm()).item() for j in range(columns)]).double()
            scaled = gradient @ torch.diag(s)
        if scaled.norm().item() / last > gamma:
            scaled = scaled / scaled.norm() * gamma * last
        last = scaled.norm().item()
        weight = weight - lr * alpha * scaled
    return weight.T if turned else weight


@pytest.mark.parametrize("limit", [1.01, None])
@pytest.mark.parametrize(("rank", "mini", "alpha"), [(3, False, 1.0), (1, True, math.sqrt(128)), (3, True, 0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_equal_the_published_algorithm(
    shape: tuple[int, int], rank: int, mini: bool, alpha: float, limit: float | None
) -> None:
    start, gradients = torch.ones(shape, dtype=torch.float64), gradients_of(shape, 31, spike=17)
    weight = trained(
        ApolloAdamW,
        start,
        gradients,
        seed=5,
        rank=rank,
        update_interval_steps=7,
        scale=alpha,
        lr=0.02,
        square_side="left",
        is_tensor_wise=mini,
        growth_limit=limit,
    )
    paper = {"rank": rank, "every": 7, "alpha": alpha, "lr": 0.02, "mini": mini}
    assert torch.allclose(weight, published(start, gradients, gamma=limit or math.inf, **paper), rtol=1e-6, atol=1e-6)
    other = published(start, gradients, gamma=math.inf if limit else 1.01, **paper)
    assert not torch.allclose(weight, other, atol=1e-3), "the limiter had something to limit"


def test_a_step_without_a_gradient_changes_nothing_and_stops_nothing() -> None:
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = ApolloAdamW([weight], seed=0, lr=0.1, rank=2)
    first, second = (gradient.float() for gradient in gradients_of((6, 10), 2))
    kept = []
    for gradient in (first, torch.zeros_like(first), second):
        weight.grad = gradient.clone()
        optimizer.step()
        kept.append(weight.detach().clone())
    assert torch.equal(kept[0], kept[1])
    assert not torch.allclose(kept[1], kept[2], atol=1e-2)
    assert kept[2].isfinite().all()


# ------------------------------------------------------------------------------------------------- the projection


def test_a_projection_depends_on_its_key_and_has_variance_one_over_the_rank() -> None:
    one, same, other = (random_projection(key, 50, 400, device=CPU, dtype=torch.float32) for key in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.mean().item() == pytest.approx(0, abs=0.005)
    assert one.var().item() == pytest.approx(1 / 50, rel=0.03)


def test_projections_differ_between_matrices_seeds_and_draws() -> None:
    """With equal gradients, only the projections can make updates differ."""
    start, gradients = torch.ones(6, 10, dtype=torch.float64), gradients_of((6, 10), 1) * 4
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = ApolloAdamW(weights, seed=5, lr=0.1, rank=2)
    for weight in weights:
        weight.grad = gradients[0].clone()
    optimizer.step()
    assert not torch.allclose(weights[0], weights[1])
    settings = {"lr": 0.1, "rank": 2, "growth_limit": None}
    runs = [
        trained(ApolloAdamW, start, gradients, seed=seed, update_interval_steps=every, **settings)
        for seed, every in ((5, 200), (5, 200), (6, 200), (5, 3), (5, 4))
    ]
    equal = [torch.allclose(runs[0], run) for run in runs]
    assert equal == [True, True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_two_moments_and_a_norm_and_continues_to_the_bit(dtype: torch.dtype) -> None:
    whole, _, weight = continued_to_the_bit(ApolloAdamW, dtype, seed=3)
    assert {name: tuple(value.shape) for name, value in whole.state[weight].items()} == {
        "step": (),
        "exp_avg": (2, 10),
        "exp_avg_sq": (2, 10),
        "update_norm": (),
    }


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_a_rank_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rank=4 .*only matrices.*lower the rank"):
        ApolloAdamW([nn.Parameter(torch.zeros(shape))], seed=0, lr=0.1, rank=4)
