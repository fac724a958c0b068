"""Perplexity on held-out text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from relora.common.errors import Stopped
from relora.data.sequences import TokenSequences
from relora.training.device_memory import fits
from relora.training.distributed import World
from relora.training.model import precision_context, summed_cross_entropy

ALONE = World()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy per token, in nats, and the tokens it was taken over."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: TokenSequences,
    *,
    sequences_per_batch: int,
    precision: str,
    device: torch.device,
    world: World = ALONE,
    stop: Callable[[], str | None] = lambda: None,
) -> Evaluation:
    """Every sequence of `data` exactly once, the last batch smaller where it must be.

    The batches are dealt to the ranks of `world`. Their sums are added up in float64 and in the order of the batches,
    so that the result is the same to the bit for any number of ranks. Raises torch.OutOfMemoryError, on all ranks,
    where a batch did not fit into memory. `stop` is asked before each batch: a rank that it gives a reason leaves out
    the rest of its batches, and all ranks raise Stopped when the last one is done.
    """
    starts = range(0, data.count, sequences_per_batch)
    # The last one counts the ranks that stopped.
    sums_N = torch.zeros(len(starts) + 1, dtype=torch.float64, device=device)

    def own_batches() -> None:
        for number in range(world.rank, len(starts), world.size):
            if stop() is not None:
                sums_N[-1] = 1
                return
            last = min(starts[number] + sequences_per_batch, data.count)
            indices = np.arange(starts[number], last, dtype=np.int64)
            inputs_BxT, targets_BxT = (tokens.to(device) for tokens in data.batch(indices))
            with precision_context(precision, device):
                sums_N[number] = summed_cross_entropy(model, inputs_BxT, targets_BxT).double()

    was_training = model.training
    model.eval()
    try:
        fitted = fits(own_batches)
    finally:
        model.train(was_training)
    *batch_sums, stopped = world.sum(sums_N, fitted=fitted).tolist()
    if stopped:
        raise Stopped(stop() or "another rank was asked to stop")
    total = 0.0
    for batch_sum in batch_sums:
        total += batch_sum
    tokens = data.count * data.sequence_length_tokens
    return Evaluation(loss=total / tokens, tokens=tokens)
