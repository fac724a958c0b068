"""Updates under way, on the host or on the device, and the seconds that they take."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMOOTHED_STEPS = 20
"""Updates that the shown tokens/s is averaged over."""


class Event(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Wait until the device has come so far."""
        ...


@dataclass(frozen=True, kw_only=True)
class Update:
    """One that the host has made and that is yet to be told: its numbers are on their way from the device."""

    step: int
    loss_and_norm: Tensor
    """On the CPU; filled when `ready`."""
    ready: Event | None
    learning_rate: float


def cuda_event(device: torch.device) -> Event | None:
    """The end of what a GPU has been given so far; None on a CPU, which is done when the call returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class UnderWay:
    """The updates that are not finished, and the training seconds so far.

    The host runs `ahead` updates ahead of a GPU: it does not wait for numbers that only people read. The clock runs
    from the moment the host begins an update until the device has finished the last one. So it counts the device's work
    whole, what the host does meanwhile included, and stands still during validation and checkpoints, before which all
    updates are finished.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        ahead: int | None = None,
        event: Callable[[torch.device], Event | None] = cuda_event,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`ahead`: 1 on a GPU, 0 elsewhere. `event` and `now` (seconds) are the device's and the host's clocks."""
        self.device, self._event, self._now = device, event, now
        self.ahead = ahead if ahead is not None else int(device.type == "cuda")
        self._updates: deque[Update] = deque()
        self._begun: float | None = None
        """When the clock was started; None while it stands still."""
        self._making = False
        self._seconds = 0.0
        self._finishes: deque[float] = deque([0.0], maxlen=SMOOTHED_STEPS + 1)
        """Training seconds at the end of the last updates."""

    @property
    def seconds(self) -> float:
        """Spent on updates and restarts, over all attempts."""
        return self._seconds + (0.0 if self._begun is None else self._now() - self._begun)

    def go_on_from(self, seconds: float) -> None:
        """Take over the seconds of earlier attempts."""
        self._seconds = seconds
        self._finishes = deque([seconds], maxlen=SMOOTHED_STEPS + 1)

    @property
    def updates_per_second(self) -> float:
        """Averaged over the last SMOOTHED_STEPS updates that are finished."""
        return (len(self._finishes) - 1) / (self._finishes[-1] - self._finishes[0])

    @contextmanager
    def making(self) -> Iterator[None]:
        """The host makes an update inside, and whatever else belongs to training."""
        self._start()
        self._making = True
        try:
            yield
        finally:
            self._making = False

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """The host has made the update of `step`; loss and norm are scalars on the device."""
        self._start()
        numbers_2 = torch.stack([loss.double(), gradient_norm.double()]).to("cpu", non_blocking=True)
        ready = self._event(self.device)
        self._updates.append(Update(step=step, loss_and_norm=numbers_2, ready=ready, learning_rate=learning_rate))

    def finished(self, *, all_but: int = 0) -> list[Update]:
        """Wait until the device has finished all updates but the newest `all_but`; returns those not returned yet."""
        done: list[Update] = []
        while len(self._updates) > all_but:
            update = self._updates.popleft()
            if update.ready is not None:
                update.ready.synchronize()
            self._finishes.append(self.seconds)
            done.append(update)
        if not self._updates and not self._making:
            self._stop()
        return done

    def _start(self) -> None:
        if self._begun is None:
            self._begun = self._now()

    def _stop(self) -> None:
        self._seconds, self._begun = self.seconds, None
