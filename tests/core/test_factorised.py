"""Factors alone, W = B A, and their refactorisation, against float64 formulas of arXiv 2505.22922."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from relora.core.factorised import (
    FactorisedLinear,
    balanced,
    best_factors,
    factorise,
    forget,
    multiply_out,
    refactorise,
)

LAWS = settings(derandomize=True, deadline=None, max_examples=40)
TARGETS = ["first", "last"]


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 9)
        self.other = nn.Linear(9, 9, bias=False)
        self.last = nn.Linear(9, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.other(torch.tanh(self.first(x)))))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layers(model: nn.Module) -> list[FactorisedLinear]:
    return [module for module in model.modules() if isinstance(module, FactorisedLinear)]


def test_output_and_gradients_are_those_of_the_formula() -> None:
    linear = nn.Linear(7, 5).double()
    model = nn.Sequential(linear)
    factorise(model, rank=3, target_modules=["0"])
    (layer,) = layers(model)
    with torch.no_grad():
        layer.factor_A.copy_(normal(3, 7, seed=1))
        layer.factor_B.copy_(normal(5, 3, seed=2))
    x, g = normal(2, 4, 7, seed=3).requires_grad_(), normal(2, 4, 5, seed=4)
    y = layer(x)
    y.backward(g)
    a, b, bias = (each.detach() for each in (layer.factor_A, layer.factor_B, layer.bias))
    x_NxI, g_NxO = x.detach().reshape(8, 7), g.reshape(8, 5)
    assert torch.allclose(y.detach().reshape(8, 5), x_NxI @ (b @ a).T + bias, rtol=1e-12)
    for found, expected in (
        (layer.factor_A.grad, b.T @ g_NxO.T @ x_NxI),
        (layer.factor_B.grad, g_NxO.T @ x_NxI @ a.T),
        (layer.bias.grad, g_NxO.sum(0)),
        (x.grad, (g_NxO @ b @ a).reshape(2, 4, 7)),
    ):
        assert found is not None
        assert torch.allclose(found, expected, rtol=1e-12)


@LAWS
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_factors_begin_as_the_best_approximation(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    weight = normal(rows, columns, seed=seed)
    b, a = best_factors(weight, rank)
    values = torch.linalg.svdvals(weight)
    # Eckart and Young: no matrix of this rank is nearer, and the distance is that of the values left out.
    assert (weight - b @ a).norm() == pytest.approx(values[rank:].norm().item(), abs=1e-10)
    assert torch.allclose(b.T @ b, a @ a.T, atol=1e-10)


def test_the_kept_share_is_that_of_the_whole_model() -> None:
    model = net()
    squares = [(torch.linalg.svdvals(each.weight) ** 2).tolist() for each in (model.first, model.last)]
    expected = (sum(sum(each[:2]) for each in squares) / sum(sum(each) for each in squares)) ** 0.5
    assert factorise(model, rank=2, target_modules=TARGETS) == pytest.approx(expected)
    assert len(layers(model)) == 2
    assert type(model.other) is nn.Linear


def test_a_matrix_of_low_rank_is_kept_whole_and_the_output_does_not_change() -> None:
    model, x = net(), normal(4, 6)
    with torch.no_grad():
        model.first.weight.copy_(normal(9, 2, seed=1) @ normal(2, 6, seed=2))
        model.last.weight.copy_(normal(5, 2, seed=3) @ normal(2, 9, seed=4))
    before = model(x)
    assert factorise(model, rank=2, target_modules=TARGETS) == pytest.approx(1)
    assert torch.allclose(model(x), before, rtol=1e-9)


@LAWS
@given(sizes=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_refactorisation_keeps_the_product_and_balances(sizes: tuple[int, ...], seed: int, scale: float) -> None:
    rows, columns, rank = sizes[0], sizes[1], min(sizes)
    old_b, old_a = normal(rows, rank, seed=seed), scale * normal(rank, columns, seed=seed + 1)
    b, a = balanced(old_b, old_a)
    product = old_b @ old_a
    assert torch.allclose(b @ a, product, atol=1e-12 * product.norm().item())
    assert torch.allclose(b.T @ b, a @ a.T, atol=1e-12 * product.norm().item())
    # The formula: U S^1/2 and S^1/2 V^T of the product, up to the signs of the singular vectors.
    u, s, vh = torch.linalg.svd(product)
    signs = torch.sign((u[:, :rank] * b).sum(0))
    assert torch.allclose(b * signs, u[:, :rank] * s[:rank].sqrt(), atol=1e-6 * product.norm().item() ** 0.5)
    assert torch.allclose(
        signs[:, None] * a, s[:rank].sqrt()[:, None] * vh[:rank], atol=1e-6 * product.norm().item() ** 0.5
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_a_restart_changes_no_output_and_reports_the_rounding(dtype: torch.dtype, tolerance: float) -> None:
    model = net().to(dtype)
    factorise(model, rank=4, target_modules=TARGETS)
    with torch.no_grad():
        for layer in layers(model):
            layer.factor_A.mul_(3)
    before = copy.deepcopy(model)
    change = refactorise(model)
    squares = torch.zeros(2, dtype=torch.float64)
    for old, new in zip(layers(before), layers(model), strict=True):
        products = [each.factor_B.double() @ each.factor_A.double() for each in (old, new)]
        squares += torch.stack([(products[1] - products[0]).norm() ** 2, products[0].norm() ** 2])
        b, a = new.factor_B.double(), new.factor_A.double()
        assert torch.allclose(b.T @ b, a @ a.T, atol=2 * tolerance * b.norm().item() ** 2)
    measured = (squares[0] / squares[1]).sqrt().item()
    assert measured < tolerance
    assert change == pytest.approx(measured, rel=0.1, abs=1e-7)


def test_a_product_of_zero_keeps_its_factors() -> None:
    """Otherwise both factors would be zero, and so would both gradients."""
    model = net()
    factorise(model, rank=2, target_modules=TARGETS)
    first, last = layers(model)
    with torch.no_grad():
        first.factor_B.zero_()
    kept = first.factor_A.detach().clone()
    refactorise(model)
    assert torch.equal(first.factor_A, kept)
    assert torch.allclose(last.factor_B.T @ last.factor_B, last.factor_A @ last.factor_A.T)


def test_factors_that_are_not_finite_are_named() -> None:
    model = net()
    factorise(model, rank=2, target_modules=TARGETS)
    with torch.no_grad():
        layers(model)[1].factor_B[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the factors of last are not finite"):
        refactorise(model)


def test_weights_that_are_not_finite_are_named() -> None:
    model = net()
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the singular value decomposition for \w+ failed: are its weights finite"):
        factorise(model, rank=2, target_modules=TARGETS)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_after_forget_an_optimizer_steps_as_a_new_one(kind: type[torch.optim.Optimizer]) -> None:
    model = net()
    factorise(model, rank=2, target_modules=TARGETS)
    optimizer = kind(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
    for number in range(3):
        model(normal(4, 6, seed=number)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert forget(optimizer) == len(list(model.parameters()))
    assert not optimizer.state
    other = copy.deepcopy(model)
    fresh = kind(other.parameters(), lr=1e-2)  # type: ignore[call-arg]
    for one, its in ((model, optimizer), (other, fresh)):
        one(normal(4, 6, seed=9)).square().sum().backward()
        its.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_multiplied_out_it_is_a_plain_trainable_model() -> None:
    model, x = net(), normal(4, 6)
    factorise(model, rank=3, target_modules=TARGETS)
    before = model(x)
    multiply_out(model)
    assert type(model.first) is type(model.last) is nn.Linear
    assert torch.allclose(model(x), before, rtol=1e-12)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == net().state_dict().keys()
