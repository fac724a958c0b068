"""The memory of this machine that a process can still use."""

import contextlib
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def available_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the bytes that this process can allocate without swapping. None where the system does not say.

    This is the available memory of the machine, or less if a control group (a container, a SLURM job) limits it. Pages
    of files that the system can drop count as available.

    Args:
        proc: Where the kernel shows its processes.
        cgroups: Where the control groups are mounted, of version 2 or 1.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
        if found is not None:
            return min([int(found[1]) * 1024, *_left_in_groups(proc, cgroups)])
    return None


def _left_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """Return the bytes that each control group of this process leaves to it, from its own group up to the root."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
            if controllers:
                root, names = (
                    cgroups / "memory",
                    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                )
            group = root / path.strip("/")
            while group != root.parent:
                left = _left(group, *names)
                found += [] if left is None else [left]
                group = group.parent
    return found


def _left(group: Path, limit: str, usage: str, droppable: str) -> int | None:
    """Return the bytes that a control group leaves. None if it has no limit."""
    try:
        limit_bytes = int((group / limit).read_text())  # "max" is no limit
        used_bytes = int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, limit_bytes - used_bytes + int(statistics.get(droppable, 0)))
