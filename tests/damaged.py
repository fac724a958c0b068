"""Small runs to damage: a finished run and a killed run. Each is made once and copied for every test."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from small import TINY

from relora.config.compose import compose
from relora.runs.rundir import RunDir, Status
from relora.training.job import launch

KILLED_AT = 12
"""The killed run dies after this step. Its newest checkpoint is of step 8, and the restart at step 11 is later."""

KILL = f"""
import os, signal, sys
from relora.tracking.console import Console
from relora.cli.main import run
Console.progress = lambda self, progress: os.kill(os.getpid(), signal.SIGKILL) if progress.step == {KILLED_AT} else None
sys.exit(run(sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A copy of a run, which one test damages and launches again."""

    overrides: list[str]

    @property
    def runs_dir(self) -> Path:
        return Path(compose(self.overrides).runs_dir)

    @property
    def run(self) -> RunDir:
        return RunDir(compose(self.overrides).run_dir)

    def launch(self) -> Status:
        return launch(compose(self.overrides), self.overrides)

    @property
    def weights(self) -> str:
        return digest(self.run.model / "model.safetensors")

    def copied(self, folder: Path) -> "Case":
        shutil.copytree(self.runs_dir, folder)
        return Case(overrides=[*self.overrides, f"runs_dir={folder}"])


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def flip(file: Path, share: float) -> None:
    """Flip one bit, in the byte at `share` of the file."""
    content = bytearray(file.read_bytes())
    content[int((len(content) - 1) * share)] ^= 0x10
    file.write_bytes(content)


def settings_of(text: Path, runs_dir: Path) -> list[str]:
    changes = ["data=text", f"data.path={text}", "tracker=jsonl", "trainer.checkpoint_interval_steps=4"]
    return [*TINY, *changes, f"runs_dir={runs_dir}"]


def killed_case(overrides: list[str]) -> Case:
    """Return a run of these overrides that SIGKILL has ended after step `KILLED_AT`."""
    case = Case(overrides=overrides)
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILL, *case.overrides], env=threads, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    names = sorted(path.name for path in case.run.checkpoints.iterdir())
    assert names == ["step-00000004.pt", "step-00000008.pt"]
    return case
