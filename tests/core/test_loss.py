from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relora.core.loss import IGNORED, summed_linear_cross_entropy


def drawn(
    tokens: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + width + vocab_size)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, generator=generator) / width**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (tokens,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 8),
    vocab_size=st.integers(2, 30),
    at_a_time=st.integers(1, 50),
    factor=st.floats(-2.0, 2.0),
)
def test_loss_and_gradients_are_those_of_the_logits(
    tokens: int, width: int, vocab_size: int, at_a_time: int, factor: float
) -> None:
    hidden, weight, targets = drawn(tokens, width, vocab_size)
    expected = torch.autograd.grad(factor * reference(hidden, weight, targets), (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relora.core.loss.LOGITS_NUMEL", at_a_time * vocab_size)
        loss = summed_linear_cross_entropy(hidden, weight, targets)
        assert loss.item() == pytest.approx(reference(hidden, weight, targets).item(), rel=1e-12)
        found = torch.autograd.grad(factor * loss, (hidden, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_the_loss_is_in_fp32_and_a_gradient_has_the_type_of_its_tensor(autocast: bool) -> None:
    stored = torch.float32 if autocast else torch.bfloat16
    hidden, weight, targets = drawn(1024, 64, 500, stored)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = summed_linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    exact = reference(hidden, weight, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-4)
    expected = torch.autograd.grad(exact, (hidden, weight))
    loss.backward()
    for tensor, theirs in zip((hidden, weight), expected, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == stored
        assert ((tensor.grad.double() - theirs).norm() / theirs.norm()).item() < 0.01


class Largest(TorchDispatchMode):
    """It records the number of elements of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_of_all_tokens_are_never_in_memory(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = drawn(64, 4, 100, torch.float32)
    monkeypatch.setattr("relora.core.loss.LOGITS_NUMEL", 800)
    with torch.set_grad_enabled(training), Largest() as largest:
        loss = summed_linear_cross_entropy(hidden, weight, targets)
        if training:
            loss.backward()
    assert loss.requires_grad == training
    assert largest.numel == 800
    assert loss.item() == pytest.approx(reference(hidden, weight, targets).item(), rel=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets = drawn(5, 3, 7)
    summed_linear_cross_entropy(hidden, weight.detach(), targets).backward()
    expected = torch.autograd.grad(reference(hidden, weight, targets), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)


def test_a_graph_serves_one_backward_pass() -> None:
    loss = summed_linear_cross_entropy(*drawn(5, 3, 7))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_returned_as_such(bad: float) -> None:
    hidden, weight, targets = drawn(5, 3, 7)
    with torch.no_grad():
        weight[0, 0] = bad
    assert not summed_linear_cross_entropy(hidden, weight, targets).isfinite()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(kept=st.lists(st.booleans(), min_size=1, max_size=30), at_a_time=st.integers(1, 40))
def test_rows_without_a_target_count_nothing(kept: list[bool], at_a_time: int) -> None:
    """The reference has only the other rows."""
    hidden, weight, targets = drawn(len(kept), 4, 9)
    rows = torch.tensor(kept)
    masked = targets.where(rows, IGNORED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relora.core.loss.LOGITS_NUMEL", at_a_time * 9)
        loss = summed_linear_cross_entropy(hidden, weight, masked)
        found = torch.autograd.grad(loss, (hidden, weight))
    expected = reference(hidden[rows], weight, targets[rows])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    if any(kept):
        for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not found[0][~rows].any()
