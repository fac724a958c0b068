"""Sequences that respect documents, against a reading of the documents one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainers import padded, within_documents, write_documents

from relora.core.loss import IGNORED as IGNORED_BY_LOSS
from relora.data import sequences
from relora.data.sequences import IGNORED, Batch, PaddedSequences, Sequences, TokenSequences, permuted

exhaustive = settings(derandomize=True, deadline=None, max_examples=60)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda drawn: max(drawn) >= 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def all_of(data: Sequences) -> Batch:
    return data.batch(np.arange(data.count, dtype=np.int64))


def test_the_loss_ignores_the_targets_that_sequences_mark() -> None:
    assert IGNORED == IGNORED_BY_LOSS


# ------------------------------------------------------------------------------------------------------- padding


@exhaustive
@given(lengths=lengths, length=st.integers(2, 20), at_a_time=st.integers(1, 9))
def test_a_sequence_is_a_document_that_is_cut_or_padded(
    folder: Path, lengths: list[int], length: int, at_a_time: int
) -> None:
    documents = [each for each in write_documents(folder, "pad", lengths) if len(each) > 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "STARTS_AT_A_TIME", at_a_time)
        data = padded(folder, "pad", length)
    assert data.count == len(documents), "a document of one token has no number"
    inputs_BxT, targets_BxT, positions_BxT = all_of(data)
    assert positions_BxT is None, "padding comes last, so causal attention never sees it"
    for document, inputs, targets in zip(documents, inputs_BxT.tolist(), targets_BxT.tolist(), strict=True):
        read = document[: length + 1]
        missing = length + 1 - len(read)
        assert inputs[: len(read[:length])] == read[:length]
        assert targets == read[1:] + [IGNORED] * missing
        assert min(inputs) >= 0, "padding is a valid token id"
    expected = sum(min(len(document) - 1, length) for document in documents)
    assert data.target_tokens == expected == all_of(data).target_tokens


@exhaustive
@given(lengths=lengths, sequences_per_step=st.integers(1, 12), step=st.integers(0, 40), seed=st.integers(0, 9))
def test_the_tokens_of_a_step_are_those_of_its_batch(
    folder: Path, lengths: list[int], sequences_per_step: int, step: int, seed: int
) -> None:
    write_documents(folder, "step", lengths)
    for data in (padded(folder, "step", 7), TokenSequences(folder / "step.bin", "uint16", 1)):
        batch = data.training_batch(step, sequences_per_step, seed)
        assert data.step_target_tokens(step, sequences_per_step, seed) == batch.target_tokens


def test_documents_have_the_order_of_packed_sequences(folder: Path) -> None:
    documents = write_documents(folder, "order", [5, 1, 8, 3, 12, 1, 6])
    numbered = [document for document in documents if len(document) > 1]
    data = padded(folder, "order", 10)
    read = data.training_batch(3, 4, seed=5)
    numbers = permuted(np.arange(12, 16, dtype=np.int64), 5, 5)
    assert read.inputs_BxT[:, 0].tolist() == [numbered[number][0] for number in numbers]
    ranks = [data.training_batch(3, 4, seed=5, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat([rank.inputs_BxT for rank in ranks]), read.inputs_BxT)
    assert torch.equal(torch.cat([rank.targets_BxT for rank in ranks]), read.targets_BxT)


def test_a_text_without_a_document_of_two_tokens_is_refused(folder: Path) -> None:
    write_documents(folder, "empty", [1, 1, 1])
    with pytest.raises(ValueError, match=r"empty\.bin .* two or more tokens, which data\.packing=pad needs; use more"):
        padded(folder, "empty")


# --------------------------------------------------------------------------------- attention within a document


@exhaustive
@given(lengths=lengths, length=st.integers(2, 20))
def test_positions_begin_at_0_in_each_document_and_each_sequence(folder: Path, lengths: list[int], length: int) -> None:
    documents = write_documents(folder, "packed", [*lengths, length + 1])
    places = [place for document in documents for place in range(len(document))]
    data = within_documents(folder, "packed", length)
    plain = TokenSequences(folder / "packed.bin", "uint16", length)
    inputs_BxT, targets_BxT, positions_BxT = all_of(data)
    assert positions_BxT is not None
    assert torch.equal(inputs_BxT, all_of(plain).inputs_BxT)
    assert torch.equal(targets_BxT, all_of(plain).targets_BxT)
    assert data.target_tokens == data.count * length == all_of(data).target_tokens
    for row, positions in enumerate(positions_BxT.tolist()):
        first = row * length
        cut = places[first]  # the tokens of the first document that are in the sequence before
        expected, is_first = [], True
        for place in places[first : first + length]:
            is_first = is_first and (place != 0 or not expected)
            expected.append(place - cut if is_first else place)
        assert positions == expected


def test_a_batch_is_split_with_its_positions(folder: Path) -> None:
    write_documents(folder, "split", [9] * 20)
    batch = within_documents(folder, "split", 8).training_batch(0, 7, 0)
    parts = batch.split(3)
    assert [len(part.inputs_BxT) for part in parts] == [3, 3, 1]
    assert batch.positions_BxT is not None
    joined = torch.cat([part.positions_BxT for part in parts if part.positions_BxT is not None])
    assert torch.equal(joined, batch.positions_BxT)
    assert all(part.positions_BxT is None for part in padded(folder, "split", 8).training_batch(0, 7, 0).split(3))


@pytest.mark.parametrize("kind", [PaddedSequences, TokenSequences])
def test_the_file_of_starts_stays_on_the_disk(kind: type, folder: Path) -> None:
    """The starts of a large corpus take gigabytes."""
    write_documents(folder, "mapped", [9] * 20)
    data = kind(folder / "mapped.bin", "uint16", 8, starts=folder / "mapped.starts")
    assert isinstance(data.starts, np.memmap)
