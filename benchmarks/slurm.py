"""Measure the cost of SLURM in seconds: to submit 1, 100 and 1000 runs, to the first step, and for a preemption.

Run this on a submit node. The figures of docs/slurm.md are from the cluster of the tests:
    bash tests/slurm/cluster.sh up; python benchmarks/slurm.py; bash tests/slurm/cluster.sh down
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from relora.config.compose import compose
from relora.runs.rundir import RunDir, read_json

REPOSITORY = Path(__file__).resolve().parent.parent
COUNTS = (1, 100, 1000)
SMALL = (
    *("model.hidden_size=32", "model.intermediate_size=48", "model.layers=2", "model.heads=2", "method.rank=4"),
    *("method.warm_start_steps=0", "method.reset_interval_steps=300", "trainer.sequences_per_step=4"),
    *("trainer.total_steps=3000", "trainer.validation_interval_steps=1000", "trainer.checkpoint_interval_steps=100"),
    *("data=text", "data.sequence_length_tokens=16", "data.vocab_size=300", "trainer.device=cpu", "tracker=jsonl"),
    *("data.validation_fraction=0.05", "data.test_fraction=0.05"),
)


def run_py(*arguments: str) -> float:
    """Run `python run.py` and return the seconds that it took."""
    began = time.monotonic()
    subprocess.run([sys.executable, "run.py", *arguments], check=True, cwd=REPOSITORY, capture_output=True)
    return time.monotonic() - began


def rows(run: RunDir) -> list[dict[str, float]]:
    """The run's metrics rows that have a training loss."""
    text = run.metrics_file.read_text() if run.metrics_file.exists() else ""
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [row for row in found if "train/loss" in row]


def wait_for_rows(run: RunDir, more_than: int) -> list[dict[str, float]]:
    """Wait until the run has more than `more_than` rows with a training loss, and return all such rows."""
    while len(found := rows(run)) <= more_than:
        time.sleep(0.1)
    return found


def submission(own: Sequence[str], folder: Path) -> None:
    """Print the seconds that submitting takes. The partition is closed, so that no job runs meanwhile."""
    subprocess.run(["scontrol", "update", "partition=debug", "state=down"], check=True)
    try:
        for count in COUNTS:
            settings = [*own, f"runs_dir={folder / str(count)}", "method.warm_start_steps=0"]
            # The runs are 24 ranks and one baseline for each seed.
            seeds = count // 25
            sweep = [f"trainer.seed=range(0,{seeds})", "method.rank=range(1,25)"] if count > 1 else []
            seconds = run_py("-m" if sweep else "cluster.wait=false", *settings, "cluster=slurm", *sweep, "study=many")
            made = len(list((folder / str(count)).glob("*/submission.json")))
            print(f"compose, freeze and submit {made} runs: {seconds:.1f} s", flush=True)
            subprocess.run(["scancel", "--user=root"], check=False)
            time.sleep(2)
    finally:
        subprocess.run(["scontrol", "update", "partition=debug", "state=up"], check=True)


def first_update(own: Sequence[str], folder: Path) -> None:
    """Print the seconds from the command to the first step, here and through SLURM, with a prepared corpus."""
    for name, where in (("python run.py", []), ("through SLURM", ["cluster=slurm"])):
        seconds: list[float] = []
        for seed in range(3):
            settings = [*own, f"trainer.seed={seed}", f"runs_dir={folder}", "trainer.total_steps=300", *where]
            began = time.time()
            subprocess.Popen(
                [sys.executable, "run.py", *settings],
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            run = RunDir(compose(settings).run_dir)
            first = wait_for_rows(run, 0)[0]
            seconds.append(first["time_ms"] / 1000 - began)
            while not (run.status and run.status.state == "finished"):
                time.sleep(0.2)
            subprocess.run(["rm", "-rf", str(run.path)], check=True)
        print(f"to the first update, {name}: {', '.join(f'{value:.1f}' for value in seconds)} s", flush=True)


def preemption(own: Sequence[str], folder: Path) -> None:
    """Print the node seconds that a preemption costs: the next attempt's start, and the steps that it repeats."""
    for grace in (20, 0):
        subprocess.run(["scontrol", "update", "partition=debug", f"GraceTime={grace}"], check=True)
        settings = [*own, f"runs_dir={folder / f'grace-{grace}'}", "cluster=slurm"]
        run_py(*settings)
        run = RunDir(compose(settings).run_dir)
        wait_for_rows(run, 350)
        command = [
            "sbatch",
            "--parsable",
            "-p",
            "high",
            "--exclusive",
            "-N",
            "2",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 2",
        ]
        subprocess.run(command, check=True, capture_output=True)
        while not (run.status and run.status.attempt == 2):
            time.sleep(0.1)
        seen = len(rows(run))
        fresh = wait_for_rows(run, seen)[seen]
        job = read_json(run.submission_file)["job"]
        field = ["sacct", "-n", "-P", "-X", "-D", "-j", job, "-o", "Start"]
        start = subprocess.run(field, check=True, capture_output=True, text=True).stdout.split()[-1]
        lost = fresh["time_ms"] / 1000 - datetime.fromisoformat(start).timestamp()
        told = "with a signal and 20 s of grace" if grace else "killed at once, checkpoints every 100 updates"
        print(f"a preemption, {told}: {lost:.1f} s of the next attempt before it made a new update", flush=True)
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(3)


def main() -> None:
    """Measure submission, the first step, and preemption."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text"
        text.mkdir()
        for number in range(200):
            (text / f"{number}.txt").write_text("".join(f"{number} times {n} is {number * n}.\n" for n in range(60)))
        own = [*SMALL, f"data.path={text}"]
        submission(own, folder)
        run_py(*own, f"runs_dir={folder / 'runs'}", "trainer.total_steps=300", "trainer.seed=9")
        first_update(own, folder / "runs")
        preemption(own, folder)


if __name__ == "__main__":
    main()
