"""Perplexity on held-out text."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from relora.data import TokenSequences
from relora.model import precision_context, summed_cross_entropy


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
    model: nn.Module, data: TokenSequences, *, sequences_per_batch: int, precision: str, device: torch.device
) -> Evaluation:
    """Every sequence of `data` exactly once, the last batch smaller where it must be; the sum is kept in float64."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for start in range(0, data.count, sequences_per_batch):
            indices = np.arange(start, min(start + sequences_per_batch, data.count), dtype=np.int64)
            inputs_BxT, targets_BxT = (tokens.to(device) for tokens in data.batch(indices))
            with precision_context(precision, device):
                total += summed_cross_entropy(model, inputs_BxT, targets_BxT).double()
    finally:
        model.train(was_training)
    tokens = data.count * data.sequence_length_tokens
    return Evaluation(loss=total.item() / tokens, tokens=tokens)
