from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from relora.data.sequences import TokenSequences, permuted

exhaustive = settings(max_examples=60)
sizes = st.one_of(
    st.integers(1, 40), st.integers(41, 3000), st.sampled_from([63, 64, 65, 1023, 1024, 1025, 4096, 4097])
)
seeds = st.integers(0, 2**63)


def epoch(size: int, seed: int, number: int) -> NDArray[np.int64]:
    return permuted(np.arange(number * size, (number + 1) * size, dtype=np.int64), size, seed)


def write_tokens(path: Path, count: int, dtype: str = "uint16") -> NDArray[np.unsignedinteger]:
    tokens = np.arange(count, dtype=dtype)
    tokens.tofile(path)
    return tokens


# ----------------------------------------------------------------------------------------------------- the order


@exhaustive
@given(size=sizes, seed=seeds, number=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(size: int, seed: int, number: int) -> None:
    assert np.array_equal(np.sort(epoch(size, seed, number)), np.arange(size))


@exhaustive
@given(size=st.integers(20, 3000), seed=seeds, number=st.integers(0, 10**6))
def test_every_epoch_and_every_seed_has_another_order(size: int, seed: int, number: int) -> None:
    order = epoch(size, seed, number)
    assert not np.array_equal(order, epoch(size, seed, number + 1))
    assert not np.array_equal(order, epoch(size, seed + 1, number))
    assert not np.array_equal(order, np.arange(size))


@exhaustive
@given(size=sizes, seed=seeds, data=st.data())
def test_a_position_leads_to_the_same_item_alone_and_among_others(size: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, 5 * size), min_size=1, max_size=20)), dtype=np.int64)
    together = permuted(positions, size, seed)
    alone = [permuted(positions[i : i + 1], size, seed)[0] for i in range(len(positions))]
    assert together.tolist() == alone
    assert np.array_equal(permuted(positions[::-1], size, seed), together[::-1])


@pytest.mark.parametrize("size", [100, 400, 1000, 1024, 5000])
def test_the_order_looks_random(size: int) -> None:
    orders = [epoch(size, seed, number) for seed in range(10) for number in range(10)]
    in_deviations = np.array([np.corrcoef(np.arange(size), order)[0, 1] for order in orders]) * np.sqrt(size - 1)
    assert 0.8 < in_deviations.std() < 1.25
    assert abs(in_deviations.mean()) < 0.4
    between_epochs = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairwise(orders)]) * np.sqrt(size - 1)
    assert 0.8 < between_epochs.std() < 1.25
    neighbours_kept = np.mean([np.sum(np.diff(order) == 1) for order in orders])
    assert 0.5 < neighbours_kept < 1.6, "a random order keeps one pair of neighbours on average"


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_no_item_stays_at_one_place(size: int) -> None:
    epochs = 200 * size
    orders = permuted(np.arange(epochs * size, dtype=np.int64), size, 7).reshape(epochs, size)
    times_item_at_place = np.array([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    assert times_item_at_place.min() > 100
    assert times_item_at_place.max() < 400


def test_the_order_is_the_same_as_in_earlier_versions() -> None:
    first_two_epochs = [1, 6, 3, 4, 2, 5, 0, 7, 8, 9, 0, 5, 2, 7, 8, 9, 3, 6, 1, 4]
    assert permuted(np.arange(20, dtype=np.int64), 10, 0).tolist() == first_two_epochs


# -------------------------------------------------------------------------------------------------- the sequences


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize(("count", "length"), [(33, 8), (40, 8), (41, 8), (9, 8), (1000, 7), (3, 2)])
def test_every_token_except_the_first_is_predicted_exactly_once(
    tmp_path: Path, count: int, length: int, dtype: str
) -> None:
    tokens = write_tokens(tmp_path / "t.bin", count, dtype)
    data = TokenSequences(tmp_path / "t.bin", dtype, length)
    inputs_BxT, targets_BxT, _ = data.batch(np.arange(data.count, dtype=np.int64))
    whole = data.count * length
    assert targets_BxT.flatten().tolist() == tokens[1 : whole + 1].tolist()
    assert inputs_BxT.flatten().tolist() == tokens[:whole].tolist()
    assert count - 1 - whole < length, "the unused tail is shorter than a sequence"
    assert inputs_BxT.dtype == targets_BxT.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_largest_token_id_survives(tmp_path: Path, dtype: str) -> None:
    largest = int(np.iinfo(dtype).max)
    np.array([largest, 0, largest], dtype=dtype).tofile(tmp_path / "t.bin")
    inputs_BxT, targets_BxT, _ = TokenSequences(tmp_path / "t.bin", dtype, 2).batch(np.array([0], dtype=np.int64))
    assert inputs_BxT.tolist() == [[largest, 0]]
    assert targets_BxT.tolist() == [[0, largest]]


def test_targets_are_the_inputs_shifted_by_one_token(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t.bin", 200)
    data = TokenSequences(tmp_path / "t.bin", "uint16", 9)
    inputs_BxT, targets_BxT, _ = data.batch(np.array([4, 0, 17], dtype=np.int64))
    assert torch.equal(inputs_BxT[:, 1:], targets_BxT[:, :-1])
    assert inputs_BxT[:, 0].tolist() == [36, 0, 153]


@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_file_shorter_than_one_sequence_is_refused(tmp_path: Path, count: int) -> None:
    write_tokens(tmp_path / "t.bin", count)
    with pytest.raises(ValueError, match=rf"holds {count} tokens, .*data\.sequence_length_tokens=8; use more text"):
        TokenSequences(tmp_path / "t.bin", "uint16", 8)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t.bin", 0)
    with pytest.raises(ValueError, match=r"empty|holds 0 tokens"):
        TokenSequences(tmp_path / "t.bin", "uint16", 8)


# ----------------------------------------------------------------------------------------------------- the batches


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "t.bin"
    write_tokens(path, 23 * 4 + 1)
    return path


@pytest.fixture(scope="module")
def data(token_file: Path) -> TokenSequences:
    return TokenSequences(token_file, "uint16", 4)


def first_tokens(data: TokenSequences, step: int, sequences_per_step: int, seed: int) -> list[int]:
    return (data.training_batch(step, sequences_per_step, seed)[0][:, 0] // 4).tolist()


@exhaustive
@given(seed=seeds, steps=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_a_batch_depends_only_on_step_and_seed(
    data: TokenSequences, token_file: Path, seed: int, steps: list[int]
) -> None:
    for step in steps:
        fresh = TokenSequences(token_file, "uint16", 4)
        read, again = data.training_batch(step, 5, seed), fresh.training_batch(step, 5, seed)
        assert torch.equal(read.inputs_BxT, again.inputs_BxT)
        assert torch.equal(read.targets_BxT, again.targets_BxT)


@exhaustive
@given(seed=seeds, sequences_per_step=st.integers(1, 60))
def test_consecutive_batches_read_every_sequence_once_an_epoch(
    data: TokenSequences, seed: int, sequences_per_step: int
) -> None:
    epochs = 3
    steps = -(-epochs * data.count // sequences_per_step)
    read = [sequence for step in range(steps) for sequence in first_tokens(data, step, sequences_per_step, seed)]
    for number in range(epochs):
        assert sorted(read[number * data.count : (number + 1) * data.count]) == list(range(data.count))


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 6, 12])
def test_micro_batches_are_the_batch_in_its_order(data: TokenSequences, micro: int) -> None:
    whole = data.training_batch(3, 12, seed=5)
    small = [data.training_batch(step, micro, seed=5) for step in range(36 // micro, 48 // micro)]
    for parts in (small, whole.split(micro)):
        assert torch.equal(torch.cat([part.inputs_BxT for part in parts]), whole.inputs_BxT)
        assert torch.equal(torch.cat([part.targets_BxT for part in parts]), whole.targets_BxT)


def test_seeds_give_other_batches(data: TokenSequences) -> None:
    assert first_tokens(data, 0, 20, seed=0) != first_tokens(data, 0, 20, seed=1)


def test_reading_changes_nothing_on_the_disk_or_in_memory(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t.bin", 41)
    before = (tmp_path / "t.bin").read_bytes()
    data = TokenSequences(tmp_path / "t.bin", "uint16", 8)
    inputs_BxT, _, _ = data.training_batch(0, 4, seed=0)
    inputs_BxT.zero_()
    assert data.training_batch(0, 4, seed=0)[0].any()
    assert (tmp_path / "t.bin").read_bytes() == before
