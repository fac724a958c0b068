"""The figures of a paper for one setting, and how the code of the paper evaluates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from relora.common.checks import at_least, at_most, check_name, one_of
from relora.common.errors import ConfigError, shown
from relora.common.perplexity import Batch, batches_of_a_gpu, joined, loss_over_batches_plus_one

DIVISORS = ("tokens", "batches_plus_one")
MOST = 10**6


@dataclass(kw_only=True, slots=True)
class PublishedConfig:
    """The figures of a paper's table for one setting. An experiment file states them. They do not change the run.

    source: The paper and the table, for the reader.
    divisor: How the code of the paper divides the sum of losses. "tokens": by the number of tokens, which is right.
        "batches_plus_one": as in relora.common.perplexity.loss_over_batches_plus_one.
    micro_batch_sequences, gpus: The batch and the GPUs of the paper's evaluation. Only for "batches_plus_one".
    batches_per_gpu: About how many batches each GPU evaluated in the paper. Only for "batches_plus_one".
    perplexity: The figures of the table by the name of the method. A method of the table that relora does not have may
        be there too.
    """

    source: str
    divisor: str = "tokens"
    micro_batch_sequences: int | None = None
    gpus: int | None = None
    batches_per_gpu: int | None = None
    perplexity: dict[str, float | None] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    """Differences between the run and the setting of the experiment. The launch records them."""

    def __post_init__(self) -> None:
        one_of("published.divisor", self.divisor, DIVISORS)
        for name in ("micro_batch_sequences", "gpus", "batches_per_gpu"):
            self._check_count(f"published.{name}", getattr(self, name))
        for method, value in self.perplexity.items():
            check_name("a method in published.perplexity", method)
            if value is not None and not (value >= 1 and math.isfinite(value)):
                raise ConfigError(
                    f"published.perplexity.{method}={shown(value)} must be a finite number of at least 1; write null "
                    "if the paper has no figure"
                )

    def _check_count(self, key: str, value: int | None) -> None:
        needed = self.divisor == "batches_plus_one"
        if needed and value is None:
            raise ConfigError(
                f"{key}=null, but published.divisor={self.divisor} needs it; give the value of the paper's evaluation"
            )
        if not needed and value is not None:
            raise ConfigError(
                f"{key}={shown(value)} has no meaning with published.divisor={self.divisor}; leave it out, or set "
                "published.divisor=batches_plus_one"
            )
        at_least(key, value, 1)
        at_most(key, value, MOST, "no evaluation has that many")

    def printed_loss(self, loss: float, batches: Sequence[Batch], sequences_per_batch: int) -> float:
        """Return the loss that the code of the paper prints for an evaluation.

        Args:
            loss: The mean loss over all predicted tokens.
            batches: The batches of the evaluation, in order. The last one may have fewer sequences.
            sequences_per_batch: The sequences of each of these batches. It divides `micro_batch_sequences`.
        """
        if self.divisor == "tokens":
            return loss
        assert self.gpus is not None
        return loss_over_batches_plus_one(self._published_batches(batches, sequences_per_batch), self.gpus)

    def count_of_batches(self, batches: Sequence[Batch], sequences_per_batch: int) -> int:
        """Return the batches that the first GPU would evaluate. With "batches_plus_one", it divides by one more.

        The arguments are those of `printed_loss`.
        """
        assert self.gpus is not None
        return batches_of_a_gpu(len(self._published_batches(batches, sequences_per_batch)), self.gpus)

    def _published_batches(self, batches: Sequence[Batch], sequences_per_batch: int) -> list[Batch]:
        assert self.micro_batch_sequences is not None
        assert self.micro_batch_sequences % sequences_per_batch == 0
        return joined(batches, self.micro_batch_sequences // sequences_per_batch)
