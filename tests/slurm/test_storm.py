"""The short form of benchmarks/storm.py."""

import re
import subprocess
import sys

import pytest
from jobs import ONE_THREAD
from small import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_study_that_is_preempted_many_times_ends_like_an_undisturbed_study() -> None:
    command = [sys.executable, "benchmarks/storm.py", "--minutes", "1", "--seeds", "1", "--steps", "800"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 runs finished, 4 of 4 equal" in done.stdout
    counts = re.search(r"taken (\d+) times .* put jobs back (\d+) times", done.stdout)
    assert counts is not None
    assert min(map(int, counts.groups())) > 0, "no run was disturbed"
