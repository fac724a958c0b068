"""Perplexity on held-out text."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from relora.common import perplexity
from relora.common.errors import Stopped
from relora.common.perplexity import Batch
from relora.data.sequences import Sequences
from relora.training.device_memory import fits
from relora.training.distributed import World
from relora.training.model import precision_context, summed_cross_entropy

SINGLE_PROCESS = World()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean cross-entropy per token, in nats, and the number of tokens in the mean. Padding is in neither."""

    loss: float
    tokens: int
    sequences_per_batch: int
    batches: list[Batch]
    """The losses of each batch, in the order of the sequences. The last batch may have fewer sequences."""

    @property
    def perplexity(self) -> float:
        """Return exp(loss), or infinity if that overflows."""
        return perplexity.perplexity(self.loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Sequences,
    *,
    sequences_per_batch: int,
    precision: str,
    device: torch.device,
    world: World = SINGLE_PROCESS,
    stop: Callable[[], str | None] = lambda: None,
) -> Evaluation:
    """Evaluate the model on every sequence of `data` exactly once. The last batch may be smaller.

    The batches are divided among the processes of `world`. The sums of the batches are added in float64 and in the
    order of the batches. So the result is the same to the bit for any world size.

    Args:
        model: A causal model. It is in evaluation mode during the call.
        data: The sequences.
        sequences_per_batch: Batch size of one forward pass.
        precision: As trainer.precision.
        device: The device of the model.
        world: The processes that evaluate together.
        stop: Called before each batch. Returns the reason to stop, or None. A process with a reason skips its remaining
            batches.

    Returns:
        The mean loss over all tokens that are predicted, the same in all processes.

    Raises:
        torch.OutOfMemoryError: In all processes, if a batch did not fit into the memory of one.
        Stopped: In all processes, after the last one is done, if one of them skipped batches.
    """
    starts = range(0, data.count, sequences_per_batch)
    # The last element counts the processes that stopped.
    sums_N = torch.zeros(len(starts) + 1, dtype=torch.float64, device=device)

    def own_batches() -> None:
        for number in range(world.rank, len(starts), world.size):
            if stop() is not None:
                sums_N[-1] = 1
                return
            last = min(starts[number] + sequences_per_batch, data.count)
            indices = np.arange(starts[number], last, dtype=np.int64)
            inputs, targets, positions = data.batch(indices).to(device)
            with precision_context(precision, device):
                sums_N[number] = summed_cross_entropy(model, inputs, targets, positions_BxT=positions).double()

    was_training = model.training
    model.eval()
    try:
        fitted = fits(own_batches)
    finally:
        model.train(was_training)
    *batch_sums, stopped = world.sum(sums_N, fitted=fitted).tolist()
    if stopped:
        raise Stopped(stop() or "another rank was asked to stop")
    batches = [
        Batch(
            loss_sum=batch_sum, tokens=data.targets_of(np.arange(start, min(start + sequences_per_batch, data.count)))
        )
        for start, batch_sum in zip(starts, batch_sums, strict=True)
    ]
    total = 0.0
    for batch in batches:
        total += batch.loss_sum
    tokens = sum(batch.tokens for batch in batches)
    return Evaluation(loss=total / tokens, tokens=tokens, sequences_per_batch=sequences_per_batch, batches=batches)
