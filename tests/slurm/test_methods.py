"""A method of a package outside of the checkout, on SLURM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from own_method import environment, install
from small import REPOSITORY, eventually

pytestmark = pytest.mark.slow


def test_a_study_with_such_a_method_is_submitted_and_finished(tiny: list[str], runs_dir: Path, tmp_path: Path) -> None:
    env = {**environment(install(tmp_path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run.py", "-m", *tiny, "cluster=slurm", "method=orthogonal", "study=own"]
    subprocess.run([*command, "method.rank=2,3", "method.warm_start_steps=0"], cwd=REPOSITORY, env=env, check=True)

    def states() -> dict[str, str]:
        asked = [sys.executable, "-m", "relora", "status", "own", "--json", f"runs_dir={runs_dir}"]
        shown = subprocess.run(asked, env=env, check=True, stdout=subprocess.PIPE).stdout
        return {row["run"]: row["state"] for row in json.loads(shown)}

    eventually(lambda: not {"queued", "running"} & set(states().values()), "the study has ended")
    assert set(states().values()) == {"finished"}
    assert sum("-orthogonal-r" in name for name in states()) == 2
