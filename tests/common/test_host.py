import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from relora.common.host import available_memory_bytes

GROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 300 * 2**20


def machine(folder: Path, own_groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Folders like /proc and /sys/fs/cgroup of a machine with 8 GiB available."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (proc / "self" / "cgroup").write_text(own_groups)
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content)
    return proc, groups


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}
    assert available_memory_bytes(*machine(tmp_path, "0::/\n", files)) == 8 * 2**30


@pytest.mark.parametrize("of", ["job", "job/step"])
def test_the_smallest_limit_of_the_own_groups_counts(of: str, tmp_path: Path) -> None:
    """Pages of files that the kernel can drop are counted as used there, and are available."""
    files = {f"{of}/memory.max": "1000", f"{of}/memory.current": "900", f"{of}/memory.stat": "inactive_file 250\nx 1"}
    files |= {"other/memory.max": "10", "other/memory.current": "0", "other/memory.stat": "inactive_file 0"}
    assert available_memory_bytes(*machine(tmp_path, "0::/job/step\n", files)) == 350


def test_groups_of_version_1_limit_too(tmp_path: Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": "1000",
        "memory/job/memory.usage_in_bytes": "400",
        "memory/job/memory.stat": "inactive_file 9\ntotal_inactive_file 100\n",
    }
    assert available_memory_bytes(*machine(tmp_path, "5:cpu:/other\n4:memory:/job\n0::/\n", files)) == 700


def test_a_system_that_does_not_say_gives_none(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) is None


@pytest.mark.slow
def test_a_process_in_a_real_group_sees_its_limit() -> None:
    is_old = "memory:" in Path("/proc/self/cgroup").read_text()
    group = (GROUPS / "memory" if is_old else GROUPS) / f"relora-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_old else "memory.max")).write_text(str(LIMIT_BYTES))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"this process may not make control groups: {error}")
    try:
        code = "from relora.common.host import available_memory_bytes; print(available_memory_bytes())"
        command = f'echo $$ > {group}/cgroup.procs && exec "{sys.executable}" -c "{code}"'
        printed = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True).stdout
    finally:
        group.rmdir()
    assert 0.8 * LIMIT_BYTES < int(printed) < LIMIT_BYTES
    here = available_memory_bytes()
    assert here is not None
    total = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert total is not None
    assert here <= int(total[1]) * 1024
