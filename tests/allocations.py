"""The memory that torch allocates in an action."""

from collections.abc import Callable

import numpy as np
import torch


def most_allocated_bytes(action: Callable[[], object]) -> int:
    """The largest number of bytes that `action` holds at a time, without the bytes allocated before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]
    held = np.cumsum(changes)
    return int(held.max())
