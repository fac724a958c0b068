"""Optimizer steps that the device has not finished yet, and a clock of the training seconds."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SMOOTHED_STEPS = 20
"""Number of steps over which the displayed tokens/s is averaged."""


class Event(Protocol):
    """A point in the queue of a device."""

    def synchronize(self) -> None:
        """Wait until the device has reached this point."""
        ...


@dataclass(frozen=True, kw_only=True)
class Update:
    """An optimizer step that the host has issued. Its loss and norm are still being copied to the host."""

    step: int
    loss_and_norm: Tensor
    """On the CPU. The values are valid when `ready` is reached."""
    ready: Event | None
    learning_rate: float


def cuda_event(device: torch.device) -> Event | None:
    """Record an event after all work that a GPU has received so far. None on a CPU, whose calls return when done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class UnderWay:
    """The optimizer steps that are not finished, and the training seconds so far.

    The host runs `ahead` steps ahead of a GPU, because it need not wait for numbers that are only displayed. The clock
    starts when the host begins a step, and stops when the device has finished the last step. So it counts all work of
    the device, and the work of the host at the same time. It does not run during validation and checkpoints: all steps
    are finished before these.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        ahead: int | None = None,
        event: Callable[[torch.device], Event | None] = cuda_event,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Create a clock that is not running.

        Args:
            device: The device that computes the steps.
            ahead: How many steps the host runs ahead. By default 1 on a GPU and 0 elsewhere.
            event: Records an event on the device, or returns None if the device needs none.
            now: The clock of the host, in seconds.
        """
        self.device, self._event, self._now = device, event, now
        self.ahead = ahead if ahead is not None else int(device.type == "cuda")
        self._updates: deque[Update] = deque()
        self._begun: float | None = None
        """When the clock was started. None while it does not run."""
        self._making = False
        self._seconds = 0.0
        self._finishes: deque[float] = deque([0.0], maxlen=SMOOTHED_STEPS + 1)
        """Training seconds at the end of the last steps."""

    @property
    def seconds(self) -> float:
        """Training seconds: the time of steps and restarts, over all attempts."""
        return self._seconds + (0.0 if self._begun is None else self._now() - self._begun)

    def resume_from(self, seconds: float) -> None:
        """Start from the seconds of earlier attempts."""
        self._seconds = seconds
        self._finishes = deque([seconds], maxlen=SMOOTHED_STEPS + 1)

    @property
    def updates_per_second(self) -> float:
        """Finished steps per second, averaged over the last SMOOTHED_STEPS steps."""
        return (len(self._finishes) - 1) / (self._finishes[-1] - self._finishes[0])

    @contextmanager
    def making(self) -> Iterator[None]:
        """Keep the clock running inside the block, in which the host issues a step or does a restart."""
        self._start()
        self._making = True
        try:
            yield
        finally:
            self._making = False

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float) -> None:
        """Add a step that the host has issued. Its loss and norm are scalars on the device."""
        self._start()
        numbers_2 = torch.stack([loss.double(), gradient_norm.double()]).to("cpu", non_blocking=True)
        ready = self._event(self.device)
        self._updates.append(Update(step=step, loss_and_norm=numbers_2, ready=ready, learning_rate=learning_rate))

    def finished(self, *, all_but: int = 0) -> list[Update]:
        """Wait until all steps except the newest `all_but` are finished. Return those that were not returned before."""
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
