"""Preempt both nodes of the tests' cluster repeatedly while a study trains. Then compare with undisturbed runs.

    bash tests/slurm/cluster.sh up
    python benchmarks/storm.py --minutes 5    # eight runs; a job of a higher partition every 20 s
    python benchmarks/storm.py --minutes 1 --seeds 1 --steps 800    # a short form, of four runs

For each seed, the study has three low-rank runs and one full-rank run. Their shared warm start is a separate job. Again
and again, a job of the partition `high` takes both nodes, holds them for a moment, and ends. In the end all runs must
be finished. Their weights must equal, to the bit, those of the same study trained undisturbed on this machine.

Prints how often SLURM put jobs back into the queue. The exit code is 1 if a run is not finished or differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kills import REPOSITORY, write_text

SETTING = (
    *("model.hidden_size=32", "model.intermediate_size=48", "model.layers=2", "model.heads=2"),
    *("method.warm_start_steps=100", "method.reset_interval_steps=150", "method.rank=2,3,4", "baseline_rates=[1]"),
    *("schedule.warmup_steps=2", "schedule.restart_warmup_steps=2"),
    *("trainer.sequences_per_step=4", "trainer.validation_interval_steps=400", "trainer.checkpoint_interval_steps=100"),
    *("trainer.device=cpu", "data=text", "data.sequence_length_tokens=16", "data.vocab_size=300", "tracker=jsonl"),
    *("data.validation_fraction=0.05", "data.test_fraction=0.05", "study=storm"),
)
LIMIT_SECONDS = 900
"""How long all runs may take to end after the last preemption."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
"""One thread: sums, and so weights, are the same to the bit only with the same number of threads."""


def launch(runs_dir: Path, *overrides: str) -> None:
    """Launch the study with run.py. Raises CalledProcessError if it fails."""
    command = [sys.executable, "run.py", "-m", *SETTING, f"runs_dir={runs_dir}", *overrides]
    subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def standing(runs_dir: Path) -> list[dict[str, Any]]:
    """The output of `relora status --json`: one object for each run."""
    command = [sys.executable, "-m", "relora", "status", "storm", "--json", f"runs_dir={runs_dir}"]
    return json.loads(subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE).stdout)


def take_nodes(hold_seconds: float) -> None:
    """Take both nodes with a job of the partition `high`. SLURM puts the jobs that run there back into the queue."""
    command = ["sbatch", "--parsable", "-p", "high", "--exclusive", "-N", "2", "-o", "/dev/null"]
    done = subprocess.run([*command, "--wrap", "sleep 600"], capture_output=True, text=True, check=True)
    job, deadline = done.stdout.strip(), time.monotonic() + 60
    while time.monotonic() < deadline:
        state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, check=True)
        if state.stdout.strip() == "RUNNING":
            break
        time.sleep(0.2)
    time.sleep(hold_seconds)
    subprocess.run(["scancel", job], check=True)


def requeues(runs_dir: Path) -> int:
    """How often a job of the study left a node before its end, by sacct."""
    files = [*runs_dir.glob("*/submission.json"), *runs_dir.glob("*/*.job")]
    jobs = {json.loads(file.read_text())["job"] for file in files}
    command = ["sacct", "-n", "-P", "-X", "-D", "-j", ",".join(sorted(jobs)), "-o", "State"]
    states = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return sum(state in ("PREEMPTED", "REQUEUED", "NODE_FAIL") for state in states)


def weights(runs_dir: Path) -> dict[str, str]:
    """Run name -> digest of the weights, for each exported model."""
    return {
        file.parent.parent.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in runs_dir.glob("*/model/model.safetensors")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Preempt the study and compare. Return 1 if a run is not finished or differs, else 0."""
    parser = argparse.ArgumentParser(description="Preempt a study again and again, compare with an undisturbed one.")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long it storms (default: %(default)s)")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two takings (default: %(default)s)")
    parser.add_argument("--hold", type=float, default=3.0, help="seconds that each holds (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="four runs each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="updates of each run (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    write_text(folder / "text")
    disturbed, calm = folder / "disturbed", folder / "calm"
    seeds = f"trainer.seed={','.join(map(str, range(chosen.seeds)))}"
    study = (f"data.path={folder / 'text'}", seeds, f"trainer.total_steps={chosen.steps}")
    began, takings = time.monotonic(), 0
    launch(disturbed, *study, "cluster=slurm", "cluster.timeout_minutes=10", "cluster.max_parallel=4")
    while any(row["state"] in ("queued", "running") for row in standing(disturbed)):
        if time.monotonic() - began < 60 * chosen.minutes:
            take_nodes(chosen.hold)
            takings += 1
        elif time.monotonic() - began > 60 * chosen.minutes + LIMIT_SECONDS:
            break
        time.sleep(chosen.every - chosen.hold)
    rows, seconds = standing(disturbed), time.monotonic() - began
    launch(calm, *study)
    expected, found = weights(calm), weights(disturbed)
    finished = sum(row["state"] == "finished" for row in rows)
    equal = sum(found.get(name) == digest for name, digest in expected.items())
    print(
        f"both nodes were taken {takings} times in {seconds:.0f} s; SLURM put jobs back {requeues(disturbed)} times; "
        f"{finished} of {len(rows)} runs finished, {equal} of {len(expected)} equal the undisturbed ones"
    )
    for row in rows:
        if row["state"] != "finished":
            print(f"{row['run']}: {row['state']}: {row['message']}")
    if not finished == len(rows) == equal == 4 * chosen.seeds:
        print(f"what is left: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
