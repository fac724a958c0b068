"""Which GPU each local process gets, found without torch."""

import os
import re
import subprocess
from collections import Counter
from functools import cache

LIST_SECONDS = 10.0
"""`nvidia-smi -L` can hang where a driver is broken."""

_taken: list[tuple[subprocess.Popen[bytes], str]] = []
_warned: set[int] = set()


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or, where it is not set, the UUIDs that `nvidia-smi -L` lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA ignores what follows the first name that is no device.
        end = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:end]
    return _listed()


@cache
def _listed() -> list[str]:
    """Asked once: the GPUs of a machine do not change, and a driver that hangs would delay each start."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LIST_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    # UUIDs, not numbers: CUDA and nvidia-smi may count the GPUs in a different order.
    return re.findall(r"^GPU \d+:.*\(UUID: (GPU-[^)]+)\)", listed.stdout, flags=re.MULTILINE)


def gpu_for(device: str, max_parallel: int) -> str | None:
    """The visible GPU that the fewest local processes use, or None where a run needs no choice."""
    if max_parallel == 1 or device == "cpu" or ":" in device:
        return None
    gpus = visible_gpus()
    if not gpus:
        return None
    if max_parallel > len(gpus) and max_parallel not in _warned:
        _warned.add(max_parallel)
        print(f"note: cluster.max_parallel={max_parallel} is more than {len(gpus)} GPUs: runs share them", flush=True)
    _taken[:] = [(process, gpu) for process, gpu in _taken if process.poll() is None]
    load = Counter(gpu for _, gpu in _taken)
    return min(gpus, key=lambda gpu: load[gpu])


def hold_gpu(process: subprocess.Popen[bytes], gpu: str | None) -> None:
    """Count a GPU as used until the process ends."""
    if gpu is not None:
        _taken.append((process, gpu))
