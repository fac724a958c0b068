"""The processes that train one run together, started by torchrun or by a launcher that sets the same environment.

The processes are equal to the bit by construction. Each computes the gradient of its share of a batch. One all-reduce
of a flat buffer adds the shares in a fixed order, and after it all processes compute the same. (With DDP's buckets, a
run on four gloo processes did not resume to the bit.) torch is loaded only if there is more than one process.
"""

import hashlib
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from relora.common import signals
from relora.common.checks import check_divides
from relora.common.errors import ConfigError, RunError, Stopped, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import Store, Work  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=15)
"""How long processes wait for each other in a collective. Work of rank 0 alone may take longer: `wait_for_first`."""

WATCHED_SECONDS = TIMEOUT.total_seconds() - 120
"""How long `_watched` waits. It is less than TIMEOUT, at which NCCL ends the process without a message to the user."""

CONNECT_TIMEOUT = timedelta(minutes=30)
"""How long the processes wait until the last one has started."""

POLL_SECONDS, LONG_POLL_SECONDS = 0.02, 0.2
"""Seconds between two looks into the store for a key of another process: at first, and later."""

SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 2e-5, 1e-3
"""Seconds between two checks whether a collective is done: at first, and later."""

LOST_POLL_SECONDS = 1.0
"""Seconds between two checks of a waiting process whether another one has failed."""

LOST_KEY = "lost"
"""The key that a failing process sets in the store."""


class PeerLost(RunError):  # noqa: N818 -- named after the event
    """Another process of the run is gone. This process does not know why."""


@dataclass
class _Joined:
    """State of a process while it is connected to the others."""

    store: "Store | None" = None
    broadcasts: int = 0
    """Number of broadcasts so far. Each broadcast has its own key in the store."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The place of this process among the processes that train the run.

    By default there is one process. Then the methods that communicate do nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The number of this process on its machine."""
    local_size: int = 1
    """The number of these processes on this machine."""
    _joined: "_Joined" = field(default_factory=lambda: _Joined(), compare=False, repr=False)

    @classmethod
    def here(cls) -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them. Without them, there is one."""
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            return cls()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only process that writes files and logs."""
        return self.rank == 0

    def share(self, sequences_per_step: int) -> int:
        """Return the sequences per step of this process. Raise RunError if the world size does not divide the batch."""
        try:
            check_divides("WORLD_SIZE", self.size, "trainer.sequences_per_step", sequences_per_step)
        except ConfigError as error:
            raise RunError(str(error)) from error
        return sequences_per_step // self.size

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Connect the processes inside the block. Tensors on the CPU use gloo, tensors on GPUs use NCCL.

        All processes leave the block together. If one leaves it by an error, the others raise PeerLost.

        Raises:
            RunError: The processes do not find each other at MASTER_ADDR:MASTER_PORT.
        """
        if self.size == 1:
            yield
            return
        import torch
        from torch import distributed

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store = self._met()
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise RunError(
                f"rank {self.rank} of {self.size} could not connect to the other ranks: {first_line(error)}"
            ) from error
        self._joined.store = store
        try:
            yield
            self.wait_for_first()
        except BaseException:
            # With NCCL, the others notice only this key. `abort` ends NCCL's own wait. gloo notices closed connections.
            with suppress(RuntimeError):
                store.set(LOST_KEY, str(self.rank))
            with suppress(RuntimeError):
                distributed.group.WORLD.abort()  # pyright: ignore[reportOptionalMemberAccess]
            raise
        finally:
            self._joined.store = None
            distributed.destroy_process_group()

    def _met(self) -> "Store":
        """Wait until all processes have started, and return the store through which they communicate.

        The wait is in Python, so that a signal ends it. No signal handler runs during torch's own wait.
        """
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun serves its own store, and keeps it when it restarts the processes.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_server = self.is_first and not served
        limit = time.monotonic() + CONNECT_TIMEOUT.total_seconds()

        def wait_until(question: Callable[[], bool], whom: str) -> None:
            while not question():
                if time.monotonic() > limit:
                    raise RuntimeError(f"no {whom} at {address}:{port} within {CONNECT_TIMEOUT}")
                time.sleep(POLL_SECONDS)

        with signals.raising():
            if not is_server:
                wait_until(lambda: _answers(address, port), "rank 0")
            store: Store = TCPStore(address, port, is_master=is_server, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
            if served:
                store = PrefixStore(f"relora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            store.set(f"rank-{self.rank}", "here")
            try:
                wait_until(lambda: self._all_connected(store), f"{self.size} ranks")
            except KeyboardInterrupt:
                store.set("stop", "")
                raise
        return store

    def _all_connected(self, store: "Store") -> bool:
        if store.check(["stop"]):
            raise Stopped("another rank was asked to stop")
        return store.check([f"rank-{rank}" for rank in range(self.size)])

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            import torch

            self._all_reduce(torch.zeros(1))

    def wait_for_first(self) -> None:
        """Wait until all processes have called this. Wait for rank 0 without a limit: it writes and exports files."""
        self.broadcast(None)
        self.barrier()

    def broadcast(self, value: T) -> T:
        """Return the `value` of rank 0 in every process.

        The other processes wait for it without a limit. They wait in Python, so that a signal ends the wait.

        Raises:
            PeerLost: Another process failed during the wait.
        """
        if self.size == 1:
            return value
        store = self._joined.store
        assert store is not None, "the ranks are connected"
        key = f"told-{self._joined.broadcasts}"
        self._joined.broadcasts += 1
        with _collective():
            if self.is_first:
                store.set(key, pickle.dumps(value).hex())
                return value
            seconds = POLL_SECONDS
            while not store.check([key]):
                self._check_others()
                time.sleep(seconds)
                seconds = min(1.5 * seconds, LONG_POLL_SECONDS)
            return pickle.loads(bytes.fromhex(store.get(key).decode()))

    def _check_others(self) -> None:
        """Raise PeerLost if a process has set LOST_KEY in the store."""
        store = self._joined.store
        if store is not None and store.check([LOST_KEY]):
            raise PeerLost(f"rank {store.get(LOST_KEY).decode()} failed")

    def gathered(self, values: list[int]) -> list[list[int]]:
        """Return the integers of every process, in the order of ranks. All processes pass the same number of values."""
        if self.size == 1:
            return [values]
        import torch

        all_RxN = torch.zeros(self.size, len(values), dtype=torch.int64)
        all_RxN[self.rank] = torch.tensor(values)
        self._all_reduce(all_RxN)
        return all_RxN.tolist()

    def sum(self, values_N: "Tensor", *, fitted: bool) -> "Tensor":
        """Return the sum over the processes. Every process gets the same bits.

        Args:
            values_N: The values of this process. The sum of an element is exact if only one process has it non-zero.
            fitted: Whether the work of this process fitted into its memory.

        Raises:
            torch.OutOfMemoryError: In every process if `fitted` is False in one, so that all try again together.
        """
        if self.size > 1:
            import torch

            summed = torch.cat([values_N, values_N.new_tensor([not fitted])])
            self._all_reduce(summed)
            values_N, fitted = summed[:-1], not self._item(summed[-1])
        raise_unless(fitted)
        return values_N

    def sum_gradients(
        self,
        parameters: "Sequence[nn.Parameter]",
        numbers_K: "Tensor",
        buffer: "Tensor",
        *,
        fitted: bool,
        wide: "Mapping[nn.Parameter, Tensor]",
    ) -> "Tensor":
        """Sum the gradients of `parameters` over the processes, in place, with one all-reduce in fp32.

        Args:
            parameters: In an order that is the same in all processes.
            numbers_K: K more numbers to sum in the same all-reduce.
            buffer: The `gradient_buffer` of these parameters and K numbers. Nothing of its size is allocated here.
            fitted: Whether the backward pass of this process fitted into its memory.
            wide: Gradients in fp32 of the parameters that have their gradient here and not in `.grad`.

        Returns:
            The sums of `numbers_K`.

        Raises:
            torch.OutOfMemoryError: In every process if `fitted` is False in one.
        """
        held = [wide.get(parameter, parameter.grad) for parameter in parameters]
        *slices, rest = buffer.split([*(parameter.numel() for parameter in parameters), len(numbers_K) + 1])
        for gradient, values in zip(held, slices, strict=True):
            if gradient is None:  # not computed, e.g. because memory ran out; it keeps its place in the buffer
                values.zero_()
            else:
                values.view_as(gradient).copy_(gradient)
        rest[:-1] = numbers_K
        rest[-1] = float(not fitted)
        self._all_reduce(buffer)
        raise_unless(not self._item(rest[-1]))
        for gradient, values in zip(held, slices, strict=True):
            if gradient is not None:
                gradient.copy_(values.view_as(gradient))
        return rest[:-1].clone()

    def _all_reduce(self, tensor: "Tensor") -> None:
        from torch import distributed

        with _collective():
            work = distributed.all_reduce(tensor, async_op=True)
            assert work is not None
            self._watched(work)

    def _watched(self, work: "Work") -> None:
        """Wait until a collective is done. Raise PeerLost if another process fails or does not take part in time.

        The wait is in Python. A wait inside CUDA runs no signal handler, and does not notice that a process is gone.
        """
        began = asked = time.monotonic()
        seconds = SHORTEST_POLL_SECONDS
        while not work.is_completed():
            now = time.monotonic()
            if now - asked > LOST_POLL_SECONDS:
                asked = now
                self._check_others()
            if now - began > WATCHED_SECONDS:
                raise PeerLost(
                    f"another rank did not respond for {WATCHED_SECONDS:.0f} s (its process or its machine hangs)"
                )
            time.sleep(seconds)
            seconds = min(1.2 * seconds, LONGEST_POLL_SECONDS)
        work.wait()

    def _item(self, value: "Tensor") -> float:
        """Return the number in `value`. An error of a collective on a GPU is raised when its result is first read."""
        with _collective():
            return value.item()


def gradient_buffer(parameters: "Iterable[nn.Parameter]", numbers: int, device: "torch.device") -> "Tensor":
    """Allocate a flat fp32 tensor for `World.sum_gradients`.

    It has room for the gradients of `parameters`, for `numbers` more numbers, and for the out-of-memory flag.
    """
    import torch

    numel = sum(parameter.numel() for parameter in parameters)
    return torch.empty(numel + numbers + 1, dtype=torch.float32, device=device)


def digest(tensors: "Iterable[Tensor]") -> int:
    """Return a digest of the tensors' bits as an integer of 63 bits.

    The tensors are summed on their device. Only one integer per tensor is copied to the host.
    """
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    hashed = hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(hashed) >> 1


def raise_unless(fitted: bool) -> None:
    """Raise torch.OutOfMemoryError if `fitted` is False."""
    if not fitted:
        import torch

        raise torch.OutOfMemoryError("out of memory, here or on another rank")


@contextmanager
def _collective() -> Iterator[None]:
    """Raise PeerLost for a RuntimeError of torch inside the block."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, PeerLost):
        raise
    except RuntimeError as error:
        raise PeerLost(
            f"another rank ended without an error message (killed, or its machine is gone): {first_line(error)}"
        ) from error


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True
