"""A training in float64 that is written out from the formulas, with AdamW and clipping by hand, for method tests."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from relora.training.trainer import Trainer

Values = dict[str, Tensor]


def in_float64(trainer: Trainer) -> Trainer:
    """Turn a trainer that has not trained yet to float64, as its plain counterpart computes. Norms stay in fp32."""
    trainer.model.double()
    return trainer


def train_plainly(
    trainer: Trainer,
    trained: Values,
    loss_of: Callable[[Values, Tensor, Tensor], Tensor],
    rate_of: Callable[[str], float],
    *,
    restart: Callable[[Values], Values] | None = None,
    restarts: tuple[int, ...] = (),
    from_step: int = 0,
) -> Values:
    """Return the trained values after the trainer's steps: Adam (Kingma and Ba 2015, Algorithm 1), clipped to norm 1.

    Args:
        trainer: Only its batches, its schedule and its number of steps are used.
        trained: The values at `from_step`, in float64.
        loss_of: The mean loss of inputs and targets.
        rate_of: The base learning rate of a tensor.
        restart: What a restart does with the values. All moments are then zero.
        restarts: The steps before which it happens.
        from_step: The first step.
    """
    config = trainer.config
    first = {name: torch.zeros_like(value) for name, value in trained.items()}
    second = {name: torch.zeros_like(value) for name, value in trained.items()}
    age = 0
    for step in range(from_step, config.total_steps):
        if step in restarts:
            assert restart is not None
            trained = restart(trained)
            for moments in (first, second):
                for value in moments.values():
                    value.zero_()
            age = 0
        trained = {name: value.detach().clone().requires_grad_() for name, value in trained.items()}
        inputs, targets, _ = trainer.training.training_batch(step, config.trainer.sequences_per_step, 0)
        loss = loss_of(trained, inputs, targets)
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        age += 1
        for name, gradient in gradients.items():
            clipped = gradient * min(1.0, 1 / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped**2
            direction = (first[name] / (1 - 0.9**age)) / ((second[name] / (1 - 0.999**age)).sqrt() + 1e-8)
            trained[name] = trained[name].detach() - rate_of(name) * trainer.factor(step) * direction
    return trained
