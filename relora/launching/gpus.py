"""Choose a GPU for each local process, without torch."""

import os
import re
import subprocess
from collections import Counter
from functools import cache

LIST_SECONDS = 10.0
"""The time limit of `nvidia-smi -L`, which can hang when a driver is broken."""

_taken: list[tuple[subprocess.Popen[bytes], str]] = []
_warned: set[int] = set()


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES. If it is not set, the UUIDs that `nvidia-smi -L` lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA ignores everything after the first name that is not a device.
        end = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:end]
    return _listed()


@cache
def _listed() -> list[str]:
    """The UUIDs from nvidia-smi. Cached: GPUs do not change, and a driver that hangs would delay every start."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LIST_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    # UUIDs, not numbers: CUDA and nvidia-smi may number the GPUs in a different order.
    return re.findall(r"^GPU \d+:.*\(UUID: (GPU-[^)]+)\)", listed.stdout, flags=re.MULTILINE)


def free_gpu_bytes(device: str) -> int | None:
    """Return the free memory of the GPU that `trainer.device` means; None if nvidia-smi shows no such GPU."""
    gpus, number = visible_gpus(), int(device.partition(":")[2] or 0)
    if number >= len(gpus):
        return None
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=LIST_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    for row in rows.splitlines():
        index, uuid, free_mib = (cell.strip() for cell in row.split(","))
        if gpus[number] == index or uuid.startswith(gpus[number]):
            return int(free_mib) * 2**20 if free_mib.isdecimal() else None
    return None


def gpu_for(device: str, max_parallel: int) -> str | None:
    """Choose the GPU of the next local process.

    Args:
        device: `trainer.device` of the run.
        max_parallel: `cluster.max_parallel`, how many runs are trained at a time.

    Returns:
        The visible GPU that the fewest local processes use. None when there is nothing to choose: one run at a time,
        the CPU, a device with a number such as "cuda:1", or no GPU.
    """
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
    """Count the GPU as used until the process ends."""
    if gpu is not None:
        _taken.append((process, gpu))
