"""Peak memory of a device, and a check whether an action fits into its memory."""

import contextlib
import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from relora.common.host import available_memory_bytes


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory_bytes`.

    On a CPU whose system cannot reset the peak, it stays the peak since the process started.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which the next peak must not include
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the highest memory use since `reset_peak_memory`.

    For a GPU this is the memory that torch allocated on it. For a CPU it is the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        high = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if high is not None:
            return int(high[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes(device: torch.device, held_bytes: int) -> int | None:
    """Return the memory that this process can use on its device: the free memory, and what its own tensors hold.

    Args:
        device: A GPU, or the CPU.
        held_bytes: The bytes of the tensors that this process has on the CPU. torch knows those on a GPU.

    Returns:
        The bytes; None if the system does not say.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device)
    available = available_memory_bytes()
    return None if available is None else available + held_bytes


def fits(action: Callable[[], None]) -> bool:
    """Run `action`. Return False if it ran out of memory, on the GPU or the CPU."""
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        # The CPU allocator raises a plain RuntimeError. Only its text shows that memory ran out.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        return False
    return True
