"""Gradients for the optimizers that project them, and trainings with these gradients."""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from relora.optimizers.subspace import SubspaceAdamW


def gradients_of(shape: tuple[int, int], steps: int, *, spike: int | None = None) -> list[Tensor]:
    """Random gradients. That of the step `spike` is a hundred times as large."""
    generator = torch.Generator().manual_seed(shape[0])
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [100 * gradient if step == spike else gradient for step, gradient in enumerate(drawn)]


def trained(kind: Callable[..., SubspaceAdamW], start: Tensor, gradients: list[Tensor], **settings) -> Tensor:
    """The weight after a step with each gradient."""
    weight = nn.Parameter(start.clone())
    optimizer = kind([weight], **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def continued_to_the_bit(
    kind: Callable[..., SubspaceAdamW], dtype: torch.dtype, **settings
) -> tuple[SubspaceAdamW, SubspaceAdamW, nn.Parameter]:
    """Stop after 4 of 8 steps, and go on from a file with tensors alone. All weights are those without a stop.

    Returns:
        The optimizer without a stop, the one that went on, and the projected matrix.
    """
    weights = [nn.Parameter(torch.ones(6, 10, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    gradients = gradients_of((6, 10), 8)

    def made() -> SubspaceAdamW:
        projected = {"params": weights[:1], "rank": 2, "update_interval_steps": 5}
        return kind([projected, {"params": weights[1:]}], lr=0.1, **settings)

    def steps(optimizer: SubspaceAdamW, numbers: range) -> None:
        for number in numbers:
            weights[0].grad, weights[1].grad = gradients[number].to(dtype), gradients[number][0, :3].to(dtype)
            optimizer.step()

    whole = made()
    steps(whole, range(4))
    assert all(isinstance(value, Tensor) for state in whole.state.values() for value in state.values())
    file = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "weights": [weight.detach() for weight in weights]}, file)
    steps(whole, range(4, 8))
    expected = [weight.detach().clone() for weight in weights]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for weight, value in zip(weights, saved["weights"], strict=True):
        weight.data.copy_(value)
    torch.manual_seed(12345)
    resumed = made()
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, range(4, 8))
    assert all(torch.equal(weight, value) for weight, value in zip(weights, expected, strict=True))
    return whole, resumed, weights[0]
