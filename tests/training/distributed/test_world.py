from types import SimpleNamespace

import pytest
import torch

from relora.common.errors import RunError
from relora.data.sequences import TokenSequences
from relora.training.distributed import World, digest, gradient_buffer, raise_unless
from relora.training.processes import choose_device, identity

pytestmark = pytest.mark.slow


def test_a_process_without_torchruns_variables_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.here() == World(rank=0, size=1, local_rank=0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert World.here() == World()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert World.here() == World(rank=3, size=4, local_rank=1)
    assert not World.here().is_first


def test_a_single_process_sends_nothing_and_changes_nothing() -> None:
    world = World()
    with world.joined():
        world.barrier()
        world.wait_for_first()
        assert world.broadcast("value") == "value"
        assert world.gathered([5, 6]) == [[5, 6]]
        values = torch.tensor([0.1], dtype=torch.float64)
        assert world.sum(values, fitted=True) is values
    assert not torch.distributed.is_initialized()


def test_a_failed_allocation_is_an_error_in_a_single_process_too() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        World().sum(torch.zeros(1), fitted=False)
    with pytest.raises(torch.OutOfMemoryError):
        raise_unless(False)


def test_ranks_that_cannot_share_a_batch_are_refused_with_a_remedy() -> None:
    assert World(rank=1, size=4).share(12) == 3
    with pytest.raises(RunError, match=r"WORLD_SIZE=5 does not divide .*_per_step=12; use one of \[1, 2, 3, 4, 6"):
        World(rank=1, size=5).share(12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_slices_of_all_ranks_together_are_the_batch(tmp_path, ranks: int) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(torch.arange(200, dtype=torch.int16).numpy().tobytes())
    data = TokenSequences(path, "uint16", 4)
    whole = data.training_batch(3, 6, 0)
    slices = [data.training_batch(3, 6, 0, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([share.inputs_BxT for share in slices]), whole.inputs_BxT)
    assert torch.equal(torch.cat([share.targets_BxT for share in slices]), whole.targets_BxT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_sees_the_last_bit_of_any_tensor(dtype: torch.dtype) -> None:
    tensors = [torch.ones(4, 3, dtype=dtype), torch.ones((), dtype=dtype), torch.zeros(2, dtype=dtype)]
    before = digest(tensors)
    assert before == digest([tensor.clone() for tensor in tensors])
    for number, tensor in enumerate(tensors):
        changed = [other.clone() for other in tensors]
        changed[number].view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(2.0, dtype=dtype))
        assert digest(changed) != before


def test_each_of_several_ranks_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    for name in ("auto", "cuda"):
        assert choose_device(name, World(rank=3, size=4, local_rank=1)) == torch.device("cuda:1")
    assert taken == [1, 1]
    assert choose_device("cpu", World(rank=3, size=4, local_rank=1)) == torch.device("cpu")
    with pytest.raises(RunError, match=r"trainer\.device=cuda:0 .*4 ranks; use trainer\.device=cuda$"):
        choose_device("cuda:0", World(rank=3, size=4, local_rank=1))
    with pytest.raises(RunError, match=r"rank 2 is number 2 .*2 CUDA devices; .*use trainer\.device=cpu"):
        choose_device("auto", World(rank=2, size=4, local_rank=2))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_device("auto", World(rank=3, size=4, local_rank=1)) == torch.device("cuda:0")


def test_a_gpu_has_one_identity_and_the_cpu_none(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = ["GPU-1", "GPU-2"]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index]))
    one, other = (identity(torch.device("cuda", index)) for index in (0, 1))
    assert identity(torch.device("cpu")) == 0
    assert one == identity(torch.device("cuda", 0))
    assert 0 < one < 2**63 > other > 0
    assert one != other
    monkeypatch.setattr("platform.node", lambda: "another-host")
    assert identity(torch.device("cuda", 0)) != one


class Mirrored(World):
    """One of two ranks. The other rank has the same gradients."""

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.mul_(2)


def test_gradients_and_numbers_are_summed_in_one_buffer_that_is_used_again() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    unused = torch.nn.Parameter(torch.ones(5))
    buffer = gradient_buffer([*parameters, unused], 2, torch.device("cpu"))
    wide = {parameters[1]: torch.full((4,), 0.1)}
    sums = []
    for number in (1.0, 2.0):
        parameters[0].grad = torch.full((2, 3), number)
        numbers = torch.tensor([number, 7.0], dtype=torch.float64)
        world = Mirrored(rank=0, size=2)
        sums.append(world.sum_gradients([*parameters, unused], numbers, buffer, fitted=True, wide=wide))
        assert torch.equal(parameters[0].grad, torch.full((2, 3), 2 * number))
    assert torch.equal(wide[parameters[1]], torch.full((4,), 0.4)), "summed twice, in fp32"
    assert unused.grad is None
    assert [each.tolist() for each in sums] == [[2.0, 14.0], [4.0, 14.0]], "the second sum does not change the first"
    with pytest.raises(torch.OutOfMemoryError):
        world.sum_gradients(parameters, numbers, buffer[: 6 + 4 + 3], fitted=False, wide={})
