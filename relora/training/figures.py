"""The figures of the test split at the end of a run, besides the loss and the perplexity."""

from collections.abc import Mapping

from relora.common.perplexity import bits_per_byte, perplexity
from relora.config.published import PublishedConfig
from relora.config.run import fitting
from relora.training.evaluate import Evaluation


def sequences_per_batch(published: PublishedConfig | None, most: int) -> int:
    """Return the batch size of the evaluation on the test split.

    Whole batches make up the micro-batch of the paper's evaluation, so that its losses can be computed from ours.

    Args:
        published: The figures of the paper for this run, if there are any.
        most: The most sequences that fit into memory.
    """
    micro_batch = None if published is None else published.micro_batch_sequences
    return most if micro_batch is None else fitting(micro_batch, most)


def split_bits_per_byte(evaluation: Evaluation, split: Mapping[str, int]) -> float | None:
    """Return the bits per byte of a split's text, or None for a corpus whose bytes were not counted.

    Args:
        evaluation: The evaluation of the split.
        split: The counts of the split in the corpus: "tokens", and "bytes" if they are known.
    """
    text_bytes = split.get("bytes")
    if not text_bytes:
        return None
    return bits_per_byte(evaluation.loss, tokens=split["tokens"], text_bytes=text_bytes)


def summary_figures(test: Evaluation, split: Mapping[str, int], published: PublishedConfig | None) -> dict[str, float]:
    """Return the figures of the test split for the summary of a run. Figures that are not known are left out.

    Args:
        test: The evaluation of the test split.
        split: The counts of the test split, as in `split_bits_per_byte`.
        published: The figures of the paper for this run, if there are any.

    Returns:
        test_tokens: The predicted tokens.
        test_bits_per_byte: As `split_bits_per_byte`.
        test_perplexity_as_published: What the code of the paper would print for the same losses.
        test_batches_as_published: The batches of a GPU in that code. It divides by one more.
    """
    figures: dict[str, float] = {"test_tokens": test.tokens}
    bits = split_bits_per_byte(test, split)
    if bits is not None:
        figures["test_bits_per_byte"] = bits
    if published is not None:
        printed = published.printed_loss(test.loss, test.batches, test.sequences_per_batch)
        figures["test_perplexity_as_published"] = perplexity(printed)
        if published.divisor == "batches_plus_one":
            figures["test_batches_as_published"] = published.count_of_batches(test.batches, test.sequences_per_batch)
    return figures
