"""The processes that train one run together, under torchrun or whatever sets the environment as torchrun does.

They are equal to the bit by construction: each computes the gradient of its share of a batch, one all-reduce of a flat
buffer in a fixed order adds the shares up, and from there on all do the same. (With DDP's buckets, four ranks of gloo
did not resume to the bit.) Loads torch only where there is more than one process.
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
"""How long the ranks wait for each other in an update. What rank 0 does alone may take longer: see `wait_for_first`."""

WATCHED_SECONDS = TIMEOUT.total_seconds() - 120
"""How long `_watched` waits: less than TIMEOUT, at which NCCL ends the process without a word to the user."""

MEETING = timedelta(minutes=30)
"""How long the ranks wait for the last one to start."""

POLL_SECONDS, LONG_POLL_SECONDS = 0.02, 0.2
"""How often the store is asked for what another rank puts there: at first, and later."""

SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 2e-5, 1e-3
"""How often a collective is asked whether it is done: the first times, and later."""

LOST_POLL_SECONDS = 1.0
"""How often a rank that waits asks whether another one has failed."""

LOST = "lost"
"""The key that a failing rank sets in the store."""


class PeerLost(RunError):  # noqa: N818 -- what happened, seen from here
    """Another rank is gone; what became of it is not known here."""


@dataclass
class _Joined:
    """What a rank holds while the ranks are connected."""

    store: "Store | None" = None
    broadcasts: int = 0
    """How often rank 0 has told the others something; each time has a key of its own."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train the run; by default it is alone, and then nothing here does anything."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes on this machine."""
    _joined: "_Joined" = field(default_factory=lambda: _Joined(), compare=False, repr=False)

    @classmethod
    def here(cls) -> "World":
        """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; a process without them is alone."""
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            return cls()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return cls(rank=rank, size=size, local_rank=int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def share(self, sequences_per_step: int) -> int:
        """Sequences of each update that are this rank's. Raises RunError where the ranks cannot share them evenly."""
        try:
            check_divides("WORLD_SIZE", self.size, "trainer.sequences_per_step", sequences_per_step)
        except ConfigError as error:
            raise RunError(str(error)) from error
        return sequences_per_step // self.size

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Inside, the ranks are connected: tensors on the CPU go through gloo, those on GPUs through NCCL.

        All leave together; one that leaves by an error lets the others know, who raise PeerLost. Raises RunError where
        the ranks do not find each other at MASTER_ADDR:MASTER_PORT.
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
            raise RunError(f"rank {self.rank} of {self.size} could not join the others: {first_line(error)}") from error
        self._joined.store = store
        try:
            yield
            self.wait_for_first()
        except BaseException:
            # NCCL's ranks notice nothing else; its own wait for them is ended. Closed connections wake those of gloo.
            with suppress(RuntimeError):
                store.set(LOST, str(self.rank))
            with suppress(RuntimeError):
                distributed.group.WORLD.abort()  # pyright: ignore[reportOptionalMemberAccess]
            raise
        finally:
            self._joined.store = None
            distributed.destroy_process_group()

    def _met(self) -> "Store":
        """The store through which the ranks find each other, when all of them are there.

        torch waits for them where no handler of Python's runs; this waits in Python, and a signal ends it.
        """
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun serves a store of its own, for this start of the ranks and those before it.
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_server = self.is_first and not served
        limit = time.monotonic() + MEETING.total_seconds()

        def wait_until(question: Callable[[], bool], whom: str) -> None:
            while not question():
                if time.monotonic() > limit:
                    raise RuntimeError(f"no {whom} at {address}:{port} within {MEETING}")
                time.sleep(POLL_SECONDS)

        with signals.raising():
            if not is_server:
                wait_until(lambda: _answers(address, port), "rank 0")
            store: Store = TCPStore(address, port, is_master=is_server, timeout=MEETING, wait_for_workers=False)
            if served:
                store = PrefixStore(f"relora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            store.set(f"rank-{self.rank}", "here")
            try:
                wait_until(lambda: self._all_are_here(store), f"{self.size} ranks")
            except KeyboardInterrupt:
                store.set("stop", "")
                raise
        return store

    def _all_are_here(self, store: "Store") -> bool:
        if store.check(["stop"]):
            raise Stopped("another rank was asked to stop")
        return store.check([f"rank-{rank}" for rank in range(self.size)])

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            import torch

            self._all_reduce(torch.zeros(1))

    def wait_for_first(self) -> None:
        """Wait until all ranks are here, for rank 0 however long: it writes checkpoints and exports the model."""
        self.broadcast(None)
        self.barrier()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank; the others wait for it, for however long.

        They wait in Python, so that a signal ends it. Raises PeerLost where another rank fails meanwhile.
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
        """Raise PeerLost where a rank has said that it fails."""
        store = self._joined.store
        if store is not None and store.check([LOST]):
            raise PeerLost(f"rank {store.get(LOST).decode()} failed")

    def gathered(self, values: list[int]) -> list[list[int]]:
        """The integers of every rank, by rank; all give as many."""
        if self.size == 1:
            return [values]
        import torch

        all_RxN = torch.zeros(self.size, len(values), dtype=torch.int64)
        all_RxN[self.rank] = torch.tensor(values)
        self._all_reduce(all_RxN)
        return all_RxN.tolist()

    def sum(self, values_N: "Tensor", *, fitted: bool) -> "Tensor":
        """The sum over the ranks, the same bits on each; exact where all but one rank hold zeros.

        Raises torch.OutOfMemoryError on every rank where one had not `fitted` into its memory: all try again alike.
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
        """Add up the gradients of `parameters` over the ranks, in place, and `numbers_K`, returned, in one all-reduce.

        In fp32, in the order given, which must be the same on all ranks. `buffer` is the `gradient_buffer` of them and
        of K numbers; nothing of its size is allocated here. `wide` holds the gradients, in fp32, of the parameters that
        have theirs there and not in `.grad`. Raises as `sum` does.
        """
        held = [wide.get(parameter, parameter.grad) for parameter in parameters]
        *slices, rest = buffer.split([*(parameter.numel() for parameter in parameters), len(numbers_K) + 1])
        for gradient, values in zip(held, slices, strict=True):
            if gradient is None:  # memory ran out before it came; it has its place all the same
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
        """Wait until a collective is done. Raises PeerLost where another rank fails meanwhile, or does not come.

        The wait is in Python: a wait inside CUDA runs no signal handler, and does not see that a rank is gone.
        """
        began = asked = time.monotonic()
        seconds = SHORTEST_POLL_SECONDS
        while not work.is_completed():
            now = time.monotonic()
            if now - asked > LOST_POLL_SECONDS:
                asked = now
                self._check_others()
            if now - began > WATCHED_SECONDS:
                raise PeerLost(f"another rank has not come for {WATCHED_SECONDS:.0f} s (it hangs, or its machine does)")
            time.sleep(seconds)
            seconds = min(1.2 * seconds, LONGEST_POLL_SECONDS)
        work.wait()

    def _item(self, value: "Tensor") -> float:
        """The number in `value`. What a collective on a GPU did wrong is raised at the first look at a result."""
        with _collective():
            return value.item()


def gradient_buffer(parameters: "Iterable[nn.Parameter]", numbers: int, device: "torch.device") -> "Tensor":
    """A flat fp32 tensor for the gradients of `parameters`, for `numbers` numbers, and for whether memory held out."""
    import torch

    numel = sum(parameter.numel() for parameter in parameters)
    return torch.empty(numel + numbers + 1, dtype=torch.float32, device=device)


def digest(tensors: "Iterable[Tensor]") -> int:
    """A digest of the tensors' bits, of 63 bits; all but a few bytes of the work are done on their device."""
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    hashed = hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(hashed) >> 1


def raise_unless(fitted: bool) -> None:
    """Raise torch.OutOfMemoryError where something did not fit, here or on another rank."""
    if not fitted:
        import torch

        raise torch.OutOfMemoryError("memory ran out, here or on another rank")


@contextmanager
def _collective() -> Iterator[None]:
    """Inside, what torch raises is that another rank is gone."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, PeerLost):
        raise
    except RuntimeError as error:
        raise PeerLost(
            f"another rank ended without a word (killed, or its machine is gone): {first_line(error)}"
        ) from error


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True
