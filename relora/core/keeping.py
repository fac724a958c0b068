"""Activations that layers keep while activation checkpointing computes all others again. Needs torch only.

torch's checkpoint runs a function twice: in the forward pass, and again in the backward pass. A layer may compute an
activation with `kept`. It is then stored in the first run and used again in the second run.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_here = threading.local()  # a backward pass on a GPU computes in a thread of its own


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of both runs, for the argument `context_fn` of torch.utils.checkpoint.checkpoint."""
    stored: list[Tensor] = []
    return _Run(stored, is_second=False), _Run(stored, is_second=True)


class _Run(AbstractContextManager[None]):
    """One of both runs. The second is entered again by every backward pass through the same graph."""

    def __init__(self, stored: list[Tensor], *, is_second: bool) -> None:
        self._stored, self._is_second = stored, is_second
        self._before: object = None

    def __enter__(self) -> None:
        self._before = getattr(_here, "run", None)
        _here.run = (self._stored, iter(self._stored) if self._is_second else None)

    def __exit__(self, *_: object) -> None:
        _here.run = self._before


def kept(compute: Callable[[], Tensor]) -> Tensor:
    """Return the result of `compute`, which runs without gradients, or the result that the first run stored.

    Compiled code computes every time.
    """
    run = None if torch.compiler.is_compiling() else getattr(_here, "run", None)
    if run is None:
        return compute()
    stored, again = run
    if again is not None:
        return next(again).detach()
    result = compute()
    stored.append(result.detach())
    return result
