"""A SLURM cluster of two nodes for the tests of this folder.

The tests are skipped if there can be no cluster, or fail if RELORA_REQUIRE names slurm.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from jobs import CLUSTER
from small import skip_or_fail

NEEDED = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "ip", "nsenter")


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that is up for the session. Its nodes are different hosts if network namespaces can be made."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    reason = f"{', '.join(missing)} missing; see tests/slurm/cluster.sh" if missing else ""
    if not missing and os.geteuid() != 0:
        reason = "starting a cluster needs root"
    conf = Path("/etc/slurm/slurm.conf")
    if conf.is_file() and "ClusterName=relora\n" not in conf.read_text():
        reason = f"{conf} belongs to another cluster, and the cluster of the tests would replace it"
    if reason:
        skip_or_fail("slurm", reason)
    with FileLock(Path(tempfile.gettempdir()) / "relora-slurm.lock"):  # a second test session waits for the first
        os.environ["NETNS"] = "1" if _namespaces_work() else "0"
        subprocess.run(["bash", CLUSTER, "down"], check=False, capture_output=True)
        subprocess.run(["bash", CLUSTER, "up"], check=True)
        yield
        subprocess.run(["bash", CLUSTER, "down"], check=False, capture_output=True)


def _namespaces_work() -> bool:
    made = subprocess.run(["ip", "netns", "add", "relora-probe"], check=False, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", "relora-probe"], check=False, capture_output=True)
    return made


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """The runs folder of `tiny`."""
    return tmp_path / "runs"


@pytest.fixture
def one(tiny: list[str]) -> list[str]:
    """A run that takes seconds, as a SLURM job."""
    return [*tiny, "cluster=slurm", "cluster.timeout_minutes=10"]
