"""What the optimizers have in common that keep moments in a subspace of the gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from subspaces import gradients_of, trained
from torch import nn

from relora.optimizers.apollo import ApolloAdamW
from relora.optimizers.fira import FiraAdamW
from relora.optimizers.galore import GaLoreAdamW
from relora.optimizers.subspace import SubspaceAdamW

Kind = Callable[..., SubspaceAdamW]
KINDS = {"galore": GaLoreAdamW, "fira": FiraAdamW, "apollo": partial(ApolloAdamW, seed=5)}

pytestmark = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def test_a_square_matrix_projected_from_the_right_is_its_transpose_from_the_left(kind: Kind) -> None:
    # A new basis may have other signs for a matrix than for its transpose, and moments keep the old signs.
    count, interval_steps = (12, 5) if kind is KINDS["apollo"] else (10, 20)
    start, gradients = torch.ones(7, 7).double(), gradients_of((7, 7), count)
    settings = {"rank": 3, "update_interval_steps": interval_steps, "lr": 0.02, "weight_decay": 0.1}
    right = trained(kind, start, gradients, square_side="right", **settings)
    left = trained(kind, start, [each.T for each in gradients], square_side="left", **settings)
    assert torch.allclose(right, left.T, atol=1e-9)


def test_a_group_without_rank_is_torchs_adamw(kind: Kind) -> None:
    ours, theirs = (nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
    one = kind([ours], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, betas=(0.8, 0.95))
    for gradient in gradients_of((5, 3), 5):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_weight_decay_is_decoupled(kind: Kind) -> None:
    start, gradients = torch.ones(6, 10, dtype=torch.float64), gradients_of((6, 10), 1)
    plain = trained(kind, start, gradients, lr=0.1, rank=2)
    decayed = trained(kind, start, gradients, lr=0.1, rank=2, weight_decay=0.5)
    assert torch.allclose(decayed, plain - 0.1 * 0.5 * start)
