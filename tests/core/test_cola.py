"""CoLA's layer against float64 formulas of arXiv 2502.10940, and what activation checkpointing keeps of it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from relora.core.cola import CoLALinear, activate
from relora.core.keeping import contexts

LAWS = settings(derandomize=True, deadline=None, max_examples=40)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def only(model: nn.Sequential) -> CoLALinear:
    layer = model[0]
    assert isinstance(layer, CoLALinear)
    return layer


def layer_of(rows: int, columns: int, rank: int, *, bias: bool = True) -> CoLALinear:
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias).double())
    activate(model, rank=rank, target_modules=["0"], seed=3, keeps_weights=False)
    layer = only(model)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    return layer


@LAWS
@given(sizes=st.tuples(*[st.integers(1, 8)] * 3), bias=st.booleans())
def test_output_and_gradients_are_those_of_the_formula(sizes: tuple[int, ...], bias: bool) -> None:
    rows, columns, rank = sizes[0], sizes[1], min(sizes)
    layer = layer_of(rows, columns, rank, bias=bias)
    x, g = normal(2, 3, columns, seed=8).requires_grad_(), normal(2, 3, rows, seed=9)
    y = layer(x)
    y.backward(g)
    a, b = layer.factor_A.detach(), layer.factor_B.detach()
    x_NxI, g_NxO = x.detach().reshape(6, columns), g.reshape(6, rows)
    z = x_NxI @ a.T
    sigmoid = 1 / (1 + torch.exp(-z))
    expected = (z * sigmoid) @ b.T + (layer.bias.detach() if bias else 0)
    assert torch.allclose(y.detach().reshape(6, rows), expected, rtol=1e-10)
    # d silu / dz = sigmoid(z) (1 + z (1 - sigmoid(z)))
    grad_z = (g_NxO @ b) * sigmoid * (1 + z * (1 - sigmoid))
    assert torch.allclose(layer.factor_B.grad, g_NxO.T @ (z * sigmoid), rtol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(layer.factor_A.grad, grad_z.T @ x_NxI, rtol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(x.grad.reshape(6, columns), grad_z @ a, rtol=1e-10)  # type: ignore[union-attr]
    assert layer.bias is None or torch.allclose(layer.bias.grad, g_NxO.sum(0), rtol=1e-10)  # type: ignore[arg-type]


def test_the_product_of_the_drawn_factors_has_the_variance_of_the_matrix() -> None:
    models = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(200, 300, bias=False))
        nn.init.normal_(model.get_parameter("0.weight"), 0, 0.02)
        assert activate(model, rank=50, target_modules=["0"], seed=seed, keeps_weights=False) is None
        models.append(only(model))
    first, again, other = models
    product = first.factor_B @ first.factor_A
    assert product.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.factor_A.std().item() == pytest.approx(first.factor_B.std().item(), rel=0.05)
    assert (first.factor_A / first.factor_A.std()).allclose(again.factor_A / again.factor_A.std(), atol=1e-4)
    assert not first.factor_A.allclose(other.factor_A, atol=1e-2)


def test_after_a_warm_start_it_is_the_best_approximation_to_first_order() -> None:
    model = nn.Sequential(nn.Linear(9, 7, bias=False).double())
    weight = model.get_parameter("0.weight").detach().clone()
    share = activate(model, rank=3, target_modules=["0"], seed=0, keeps_weights=True)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    layer = only(model)
    # The derivative at 0, by central differences of an odd part.
    step = 1e-6 * torch.eye(9, dtype=torch.float64)
    assert torch.allclose((layer(step) - layer(-step)).T / 2e-6, best, atol=1e-9)
    assert torch.allclose(layer.factor_B.T @ layer.factor_B, layer.factor_A @ layer.factor_A.T)
    assert share == pytest.approx((s[:3].norm() / s.norm()).item())


# ------------------------------------------------------------------------------------------ activation checkpointing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def run(model: nn.Module, *, recompute: bool) -> tuple[list[Tensor], int]:
    """The gradients, and the FLOPs of forward and backward pass."""
    x = normal(5, 6, seed=7).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts) if recompute else model(x)
        y.square().sum().backward()
    return [each.grad for each in (x, *model.parameters()) if each.grad is not None], counter.get_total_flops()


def test_checkpointing_changes_no_bit_and_does_not_compute_the_kept_products_again() -> None:
    model = Net().double()
    activate(model, rank=3, target_modules=["first", "second"], seed=0, keeps_weights=True)
    plain, flops = run(copy.deepcopy(model), recompute=False)
    again, flops_again = run(copy.deepcopy(model), recompute=True)
    assert len(plain) == 7
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    # Only B silu(A x) of the first layer is computed again: torch stops when it has every activation that it needs.
    assert flops_again - flops == 2 * 5 * 3 * 8


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    model = Net().double()
    activate(model, rank=3, target_modules=["first", "second"], seed=0, keeps_weights=True)
    x = normal(5, 6, seed=7)
    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum()
    y.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    y.backward()
    for one, parameter in zip(once, model.parameters(), strict=True):
        assert torch.equal(2 * one, parameter.grad)  # type: ignore[arg-type]


def test_a_backward_pass_in_another_thread_gives_the_same_gradients() -> None:
    """On a GPU, torch computes backward passes, and what they compute again, in a thread of its own."""
    model = Net().double()
    activate(model, rank=3, target_modules=["first", "second"], seed=0, keeps_weights=True)
    here, _ = run(copy.deepcopy(model), recompute=True)
    with ThreadPoolExecutor(1) as pool:
        x = normal(5, 6, seed=7).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum()
        pool.submit(y.backward).result()
    for one, other in zip(here, (x, *model.parameters()), strict=True):
        # The other thread may have another number of threads for its matrix products.
        assert torch.allclose(one, other.grad, rtol=1e-12)  # type: ignore[arg-type]


def test_under_autocast_products_are_in_bf16_and_gradients_in_fp32() -> None:
    layer, x = layer_of(8, 7, 3).float(), normal(4, 7, seed=5).float().requires_grad_()
    exact = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), exact, atol=0.1, rtol=0.05)
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters() if parameter.grad is not None} == {torch.float32}
