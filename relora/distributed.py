"""The processes that train one run together, under torchrun or whatever sets the environment as torchrun does.

They are equal to the bit by construction: each computes the gradient of its share of a batch, one all-reduce of a flat
buffer in a fixed order adds the shares up, and from there on all do the same. (With DDP's buckets, four ranks of gloo
did not resume to the bit.) Loads torch only where there is more than one process.
"""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from relora import signals
from relora.errors import RunError, Stopped, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

TIMEOUT = timedelta(hours=24)
"""The others wait so long for a rank 0 that prepares a corpus; a rank that dies is noticed at once, not by this."""


MEETING = timedelta(minutes=30)
"""How long the ranks wait for the last one to start."""

POLL_SECONDS = 0.02


class PeerLost(RunError):  # noqa: N818 -- what happened, seen from here
    """Another rank is gone; what became of it is not known here."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train the run; by default it is alone, and then nothing here does anything."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes on this machine."""

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
        if sequences_per_step % self.size:
            divisors = [n for n in range(1, sequences_per_step + 1) if sequences_per_step % n == 0]
            raise RunError(
                f"trainer.sequences_per_step={sequences_per_step} is no multiple of the {self.size} ranks that were "
                f"started; start one of {divisors} or change trainer.sequences_per_step"
            )
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
        try:
            yield
            self.barrier()
        except BaseException:
            # Closed connections wake the others. NCCL would wait for them here: the end of the process closes it.
            if backend == "gloo":
                distributed.destroy_process_group()
            raise
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

    def told_by_first(self, value: T) -> T:
        """Rank 0's `value`, on every rank; the others wait for it."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        told = [value]
        with _collective():
            distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

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

            told = torch.cat([values_N, values_N.new_tensor([not fitted])])
            self._all_reduce(told)
            values_N, fitted = told[:-1], not told[-1].item()
        _raise_unless(fitted)
        return values_N

    def sum_gradients(
        self,
        parameters: "Sequence[nn.Parameter]",
        numbers_K: "Tensor",
        *,
        fitted: bool,
        wide: "Mapping[nn.Parameter, Tensor] | None" = None,
    ) -> "Tensor":
        """Add up the gradients of `parameters` over the ranks, in place, and `numbers_K`, returned, in one all-reduce.

        In fp32, in the order given, which must be the same on all ranks. `wide` holds the gradients, in fp32, of the
        parameters that have theirs there and not in `.grad`. Raises as `sum` does. A process that is alone does not
        wait for its device here.
        """
        if self.size > 1:
            import torch

            # A gradient that is missing (memory ran out before it came) has its place all the same.
            held = [(wide or {}).get(parameter, parameter.grad) for parameter in parameters]
            gradients = [
                torch.zeros_like(p) if found is None else found for p, found in zip(parameters, held, strict=True)
            ]
            rest = torch.cat([numbers_K.float(), numbers_K.new_tensor([not fitted], dtype=torch.float32)])
            flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), rest])
            self._all_reduce(flat)
            *summed, rest = flat.split([*(gradient.numel() for gradient in gradients), len(rest)])
            for gradient, values in zip(gradients, summed, strict=True):
                gradient.copy_(values.view_as(gradient))
            numbers_K, fitted = rest[:-1], not rest[-1].item()
        _raise_unless(fitted)
        return numbers_K

    def _all_reduce(self, tensor: "Tensor") -> None:
        from torch import distributed

        with _collective():
            distributed.all_reduce(tensor)


def digest(tensors: "Iterable[Tensor]") -> int:
    """A digest of the tensors' bits, of 63 bits; all but a few bytes of the work are done on their device."""
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().view(integers[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    hashed = hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(hashed) >> 1


def _raise_unless(fitted: bool) -> None:
    if not fitted:
        import torch

        raise torch.OutOfMemoryError("memory ran out, here or on another rank")


@contextmanager
def _collective() -> Iterator[None]:
    """Inside, what torch raises is that another rank is gone."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
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
