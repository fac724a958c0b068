"""The arithmetic of perplexities, against a simulation of the published evaluation and against plain formulas."""

import doctest
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import REPOSITORY

from relora.common.perplexity import (
    Batch,
    batches_of_a_gpu,
    bits_per_byte,
    bits_per_token,
    joined,
    loss_over_batches_plus_one,
    perplexity,
)
from relora.config.published import PublishedConfig

PROTOCOL = REPOSITORY / "docs" / "protocol.md"


def published(micro_batch_sequences: int, gpus: int) -> PublishedConfig:
    return PublishedConfig(
        source="a paper",
        divisor="batches_plus_one",
        micro_batch_sequences=micro_batch_sequences,
        gpus=gpus,
        batches_per_gpu=100,
    )


class Gpu:
    """A GPU of the published evaluation, as docs/protocol.md describes it: its counter of batches begins at 1."""

    def __init__(self) -> None:
        self.counter = 1
        self.total = 0.0

    def evaluate(self, sequences: list[list[float]]) -> None:
        """Add the mean loss of the tokens of one batch. A sequence is the list of the losses of its tokens."""
        tokens = [loss for sequence in sequences for loss in sequence]
        self.total += sum(tokens) / len(tokens)
        self.counter += 1

    @property
    def loss(self) -> float:
        return self.total / self.counter


def simulated(sequences: list[list[float]], micro_batch_sequences: int, gpus: int) -> float:
    """The loss that the published evaluation prints for these losses of tokens."""
    machine = [Gpu() for _ in range(gpus)]
    turn = 0
    while sequences:
        batch, sequences = sequences[:micro_batch_sequences], sequences[micro_batch_sequences:]
        machine[turn].evaluate(batch)
        turn = (turn + 1) % gpus
    return sum(gpu.loss for gpu in machine) / gpus


sequences_of_losses = st.lists(
    st.lists(st.floats(min_value=0.0, max_value=20.0), min_size=1, max_size=5), min_size=1, max_size=40
)


def batches_of(sequences: list[list[float]], sequences_per_batch: int) -> list[Batch]:
    parts = [sequences[n : n + sequences_per_batch] for n in range(0, len(sequences), sequences_per_batch)]
    return [Batch(loss_sum=sum(map(sum, part)), tokens=sum(map(len, part))) for part in parts]


@given(
    sequences=sequences_of_losses,
    sequences_per_batch=st.integers(1, 4),
    batches_per_micro_batch=st.integers(1, 4),
    gpus=st.integers(1, 5),
)
def test_the_printed_loss_equals_a_simulation_of_the_published_loop(
    sequences: list[list[float]], sequences_per_batch: int, batches_per_micro_batch: int, gpus: int
) -> None:
    micro_batch = sequences_per_batch * batches_per_micro_batch
    config, ours = published(micro_batch, gpus), batches_of(sequences, sequences_per_batch)
    expected = simulated(sequences, micro_batch, gpus)
    assert config.printed_loss(-1.0, ours, sequences_per_batch) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    whole = -(-len(sequences) // micro_batch)
    assert config.count_of_batches(ours, sequences_per_batch) == len(range(0, whole, gpus))


def test_a_last_partial_batch_counts_as_much_as_a_whole_batch() -> None:
    batches = [Batch(loss_sum=40.0, tokens=10), Batch(loss_sum=40.0, tokens=10), Batch(loss_sum=1.0, tokens=1)]
    assert loss_over_batches_plus_one(batches, 1) == pytest.approx((4 + 4 + 1) / 4)
    assert loss_over_batches_plus_one(joined(batches, 2), 1) == pytest.approx((4 + 1) / 3)


def test_a_gpu_without_batches_prints_zero_as_the_published_code_does() -> None:
    assert loss_over_batches_plus_one([Batch(loss_sum=8.0, tokens=2)], 2) == pytest.approx((4 / 2 + 0) / 2)


def test_code_that_divides_by_tokens_prints_the_true_loss() -> None:
    config = PublishedConfig(source="a paper")
    assert config.printed_loss(3.25, [Batch(loss_sum=1.0, tokens=1)], 1) == 3.25


@pytest.mark.parametrize(
    ("micro_batch", "gpus", "printed", "true"),
    [(256, 1, 34.06, 34.73), (256, 1, 25.08, 25.53), (128, 4, 18.80, 19.42), (16, 8, 15.56, 15.68)],
)
def test_the_estimates_of_galores_full_rank_row_are_reproduced(
    micro_batch: int, gpus: int, printed: float, true: float
) -> None:
    """10M tokens in sequences of 215 tokens. The estimates come from a note on the field, and not from this code."""
    sequences = round(10_000_000 / 215)
    one = Batch(loss_sum=215 * math.log(true), tokens=215)
    config = published(micro_batch, gpus)
    assert math.exp(config.printed_loss(0.0, [one] * sequences, 1)) == pytest.approx(printed, abs=0.006)


def test_the_page_on_the_protocol_has_the_numbers_of_this_code() -> None:
    found = doctest.testfile(str(PROTOCOL), module_relative=False)
    assert found.attempted >= 6
    assert found.failed == 0
    rows = re.findall(r"^\| paper/\S+ \| (.*) \|$", PROTOCOL.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        micro_batch, gpus, batches, printed, true = map(float, row.split(" | "))
        assert batches == pytest.approx(10e6 / (micro_batch * 215 * gpus), abs=0.7)
        assert math.log(true) == pytest.approx(math.log(printed) * (batches + 1) / batches, abs=0.005 / true)


def test_bits_per_byte_of_a_uniform_guess_is_known() -> None:
    # Each byte is a token, and no document has an end-of-text token.
    assert bits_per_byte(math.log(256), tokens=1000, text_bytes=1000) == pytest.approx(8)
    # With one end-of-text token for each 10 bytes, 11 tokens are needed for 10 bytes.
    assert bits_per_byte(math.log(257), tokens=1100, text_bytes=1000) == pytest.approx(1.1 * math.log2(257))


@given(losses=st.lists(st.floats(min_value=0.0, max_value=20.0), min_size=2, max_size=30), data=st.data())
def test_bits_per_byte_does_not_depend_on_how_the_text_is_cut_into_tokens(losses: list[float], data) -> None:
    """A tokenizer with longer tokens has the sum of the losses of their parts."""
    text_bytes = 3 * len(losses)
    cuts = data.draw(st.lists(st.integers(1, len(losses) - 1), unique=True).map(sorted))
    merged = [sum(losses[a:b]) for a, b in zip([0, *cuts], [*cuts, len(losses)], strict=True)]
    fine, coarse = (
        bits_per_byte(sum(each) / len(each), tokens=len(each), text_bytes=text_bytes) for each in (losses, merged)
    )
    assert coarse == pytest.approx(fine, abs=1e-9)
    assert fine == pytest.approx(-math.log2(math.exp(-sum(losses) / text_bytes)), abs=1e-9)


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e4) == math.inf
    assert bits_per_token(math.log(8)) == pytest.approx(3)
    assert [batches_of_a_gpu(n, 3) for n in (1, 3, 4, 6)] == [1, 1, 2, 2]
