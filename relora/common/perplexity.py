"""Figures that follow from the losses of an evaluation: perplexity, bits, and what published code prints.

All losses are in nats: -ln p of a token. docs/protocol.md has an example with numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_LOSS = 700.0
"""The exponential of a larger loss does not fit into a float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The loss of some sequences of an evaluation.

    loss_sum: The sum of -ln p over the predicted tokens, in nats.
    tokens: The number of predicted tokens.
    """

    loss_sum: float
    tokens: int

    @property
    def mean_loss(self) -> float:
        """The mean loss of a token in this batch."""
        return self.loss_sum / self.tokens


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


def bits_per_token(loss: float) -> float:
    """Return a loss per token in bits instead of nats."""
    return loss / math.log(2)


def bits_per_byte(loss: float, *, tokens: int, text_bytes: int) -> float:
    """Return the bits that the model needs for a byte of the text. Models with different tokenizers can be compared.

    Args:
        loss: The mean loss of the predicted tokens. It stands for all tokens of the text.
        tokens: All tokens of the text, with the end-of-text token of each document.
        text_bytes: The bytes of the text in UTF-8, without the end-of-text tokens.
    """
    return bits_per_token(loss) * tokens / text_bytes


def joined(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Join each `count` neighbouring batches into one batch. The last batch may have fewer."""
    parts = [batches[first : first + count] for first in range(0, len(batches), count)]
    return [
        Batch(loss_sum=math.fsum(batch.loss_sum for batch in part), tokens=sum(batch.tokens for batch in part))
        for part in parts
    ]


def batches_of_a_gpu(batches: int, gpus: int) -> int:
    """Return how many batches the first GPU gets if `batches` batches are dealt out to `gpus` GPUs in turn."""
    return -(-batches // gpus)


def loss_over_batches_plus_one(batches: Sequence[Batch], gpus: int) -> float:
    """Return the loss that the evaluation of the GaLore family prints.

    Each GPU adds up the mean losses of its n batches. It counts its batches from 1, so it divides the sum by n + 1. The
    result is the mean over the GPUs. It is too low by about loss / (n + 1). (evaluate_model in torchrun_main.py of
    jiaweizzhao/GaLore; arXiv 2403.03507.)

    Args:
        batches: The batches of all GPUs. They are dealt out to the GPUs in turn.
        gpus: The number of GPUs.
    """
    of_gpus = [batches[gpu::gpus] for gpu in range(gpus)]
    return math.fsum(math.fsum(batch.mean_loss for batch in own) / (len(own) + 1) for own in of_gpus) / gpus
