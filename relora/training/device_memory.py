"""How much memory a device holds, and whether something fits into it."""

import contextlib
import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory_bytes` anew; where the system cannot, a CPU's stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but held back by glibc, is no need of what comes next
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held since `reset_peak_memory`: on the GPU where it trains on one, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        high = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if high is not None:
            return int(high[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fits(action: Callable[[], None]) -> bool:
    """Do `action`; False where memory ran out in it, on the GPU or the CPU."""
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        # The CPU allocator raises a RuntimeError that only its text tells.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        return False
    return True
