"""SLTrain's layer against float64 formulas of arXiv 2406.02214."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from relora.core.factorised import multiply_out, refactorise
from relora.core.sparse import SparseLowRankLinear, sparsify

LAWS = settings(derandomize=True, deadline=None, max_examples=40)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(rows: int, columns: int, rank: int, density: float = 0.3, *, bias: bool = True) -> SparseLowRankLinear:
    """A layer with all values random, so that no gradient is zero."""
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias).double())
    settings = {"rank": rank, "scaling": 0.25, "density": density, "target_modules": ["0"], "seed": 3}
    sparsify(model, **settings, keeps_weights=False)  # type: ignore[arg-type]
    layer = only(model)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    return layer


def only(model: nn.Sequential) -> SparseLowRankLinear:
    layer = model[0]
    assert isinstance(layer, SparseLowRankLinear)
    return layer


def dense(layer: SparseLowRankLinear) -> Tensor:
    """0.25 B A + S, entry by entry."""
    weight = 0.25 * layer.factor_B.detach() @ layer.factor_A.detach()
    for position, value in zip(layer.support.tolist(), layer.sparse_values.tolist(), strict=True):
        weight[divmod(position, weight.shape[1])] += value
    return weight


@LAWS
@given(sizes=st.tuples(*[st.integers(1, 8)] * 3), density=st.sampled_from([0.01, 0.3, 1.0]), bias=st.booleans())
def test_output_and_gradients_are_those_of_the_formula(sizes: tuple[int, ...], density: float, bias: bool) -> None:
    rows, columns, rank = sizes[0], sizes[1], min(sizes)
    layer = layer_of(rows, columns, rank, density, bias=bias)
    x, g = normal(2, 3, columns, seed=8).requires_grad_(), normal(2, 3, rows, seed=9)
    y = layer(x)
    y.backward(g)
    weight, x_NxI, g_NxO = dense(layer), x.detach().reshape(6, columns), g.reshape(6, rows)
    assert torch.allclose(y.detach(), F.linear(x.detach(), weight, layer.bias), rtol=1e-10)
    whole = g_NxO.T @ x_NxI
    a, b = layer.factor_A, layer.factor_B
    assert torch.allclose(a.grad, 0.25 * b.detach().T @ whole, rtol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(b.grad, 0.25 * whole @ a.detach().T, rtol=1e-10)  # type: ignore[arg-type]
    expected = torch.stack([whole[divmod(position, columns)] for position in layer.support.tolist()])
    assert torch.allclose(layer.sparse_values.grad, expected, rtol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(x.grad, (g_NxO @ weight).reshape(2, 3, columns), rtol=1e-10)  # type: ignore[arg-type]
    assert layer.bias is None or torch.allclose(layer.bias.grad, g_NxO.sum(0), rtol=1e-10)  # type: ignore[arg-type]


def test_the_gradient_is_that_of_finite_differences() -> None:
    layer = layer_of(4, 5, 2)
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def output(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (normal(3, 5, seed=1).requires_grad_(), *values))


@LAWS
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), density=st.floats(0.001, 1), seed=st.integers(0, 50))
def test_the_support_has_the_density_without_repetition(rows: int, columns: int, density: float, seed: int) -> None:
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    sparsify(model, rank=1, scaling=1.0, density=density, target_modules=["0"], seed=seed, keeps_weights=False)
    support = only(model).support
    assert len(support) == len(set(support.tolist())) == max(1, round(density * rows * columns))
    assert support.dtype == torch.int32
    assert support.tolist() == sorted(support.tolist())
    assert 0 <= int(support.min()) <= int(support.max()) < rows * columns


def test_the_support_depends_on_seed_and_name_and_is_uniform() -> None:
    def supports(seed: int) -> list[list[int]]:
        model = nn.Sequential(*(nn.Linear(40, 30, bias=False) for _ in range(2)))
        sparsify(model, rank=1, scaling=1.0, density=0.1, target_modules=["0", "1"], seed=seed, keeps_weights=False)
        return [layer.support.tolist() for layer in model if isinstance(layer, SparseLowRankLinear)]

    assert supports(0) == supports(0)
    assert supports(0)[0] != supports(0)[1] != supports(1)[1]
    counts = torch.zeros(1200)
    for seed in range(200):
        counts[supports(seed)[0]] += 1
    # Each entry is drawn with probability 0.1: 20 of 200 times, with a standard deviation of 4.2.
    assert counts.mean() == 20
    assert counts.std() == pytest.approx(math.sqrt(200 * 0.1 * 0.9), rel=0.1)
    assert counts.max() < 20 + 5 * 4.3


def test_it_begins_as_in_the_paper() -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    share = sparsify(model, rank=16, scaling=0.25, density=0.5, target_modules=["0"], seed=0, keeps_weights=False)
    layer = only(model)
    assert share is None
    assert not layer.factor_B.any()
    # Kaiming with a = sqrt 5 is uniform with the limit 1/sqrt(in), and so are the values.
    for drawn in (layer.factor_A, layer.sparse_values):
        assert 0.12 < drawn.abs().max() <= 1 / 8
        assert drawn.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
        assert abs(drawn.mean().item()) < 0.01


def test_after_a_warm_start_it_begins_as_an_approximation_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(9, 7, bias=False).double())
    weight = next(model.parameters()).detach().clone()
    share = sparsify(model, rank=3, scaling=0.25, density=0.4, target_modules=["0"], seed=0, keeps_weights=True)
    layer = only(model)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    assert torch.allclose(0.25 * layer.factor_B @ layer.factor_A, best)
    assert torch.allclose(layer.factor_B.T @ layer.factor_B, layer.factor_A @ layer.factor_A.T)
    found, rest = dense(layer), (weight - best).flatten()
    support = layer.support.long()
    assert torch.allclose(found.flatten()[support], weight.flatten()[support]), "exact on the support"
    rest[support] = 0
    assert torch.allclose((weight - found).flatten(), rest, atol=1e-12)
    assert share == pytest.approx(math.sqrt(1 - (rest.norm() / weight.norm()).item() ** 2))


def test_a_restart_leaves_the_values_and_the_output() -> None:
    layer, x = layer_of(8, 7, 3), normal(4, 7, seed=5)
    model = nn.Sequential(layer)
    before, values = model(x), layer.sparse_values.detach().clone()
    assert refactorise(model) < 1e-14
    assert torch.allclose(model(x), before, rtol=1e-10)
    assert torch.equal(layer.sparse_values, values)
    assert torch.allclose(layer.factor_B.T @ layer.factor_B, layer.factor_A @ layer.factor_A.T)


def test_multiplied_out_it_is_a_plain_layer() -> None:
    layer, x = layer_of(8, 7, 3), normal(4, 7, seed=5)
    model, weight = nn.Sequential(layer), dense(layer)
    before = model(x)
    multiply_out(model)
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model.get_parameter("0.weight"), weight)
    assert torch.allclose(model(x), before, rtol=1e-10)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_the_support_is_part_of_the_state_and_has_no_gradient() -> None:
    layer = layer_of(8, 7, 3)
    assert "support" in layer.state_dict()
    assert "support" not in dict(layer.named_parameters())
    other = layer_of(8, 7, 3)
    other.support.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.support, layer.support)


def test_under_autocast_products_are_in_bf16_and_gradients_in_fp32() -> None:
    layer = layer_of(8, 7, 3).float()
    x = normal(4, 7, seed=5).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), F.linear(x.double(), dense(layer).double(), layer.bias.double()), atol=0.1)
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters() if parameter.grad is not None} == {torch.float32}
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
