"""A method of a package outside of the checkout, on SLURM."""

import subprocess
import sys
from pathlib import Path

from jobs import ended
from own_method import environment, install
from small import REPOSITORY


def test_a_study_with_it_is_submitted_and_finished(tiny: list[str], runs_dir: Path, tmp_path: Path) -> None:
    site = install(tmp_path)
    command = [sys.executable, "run.py", "-m", *tiny, "cluster=slurm", "method=orthogonal", "study=own"]
    subprocess.run(
        [*command, "method.rank=2,3", "method.warm_start_steps=0"],
        cwd=REPOSITORY,
        env={**environment(site), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    states = {row["run"]: row["state"] for row in ended(runs_dir, "own")}
    assert set(states.values()) == {"finished"}
    assert sum("-orthogonal-r" in name for name in states) == 2
