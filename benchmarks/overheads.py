"""Measure the time of a run outside its optimizer steps: start-up, imports, and the share of tracking.

    python benchmarks/overheads.py [key=value ...]      # overrides as for python run.py; without any, the default run

Start-up is timed from outside, as the user sees it, `ROUNDS` times each. Tracking is timed inside a run: clocks measure
every call of the training loop to its tracker, and the work of the thread that mirrors to MLflow.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from slurm import REPOSITORY, rows, run_py

from relora.config.compose import compose
from relora.runs.rundir import RunDir

ROUNDS = 5
LIBRARIES = ("hydra", "omegaconf", "torch", "transformers", "datasets", "tokenizers", "mlflow", "submitit", "rich")


def imported_by(*arguments: str) -> dict[str, float]:
    """The `LIBRARIES` that `python run.py` imports, each with its import time in seconds, nested imports included."""
    command = [sys.executable, "-X", "importtime", "run.py", *arguments]
    told = subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, text=True).stderr
    found: dict[str, float] = {}
    for line in told.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and (name := parts[2].strip()) in LIBRARIES:
            found[name] = int(parts[1]) / 1e6
    return found


def start_up(own: list[str], folder: Path) -> None:
    """Print the seconds to an answer, and to the first optimizer step when the corpus is prepared already."""
    run_py(*own, f"runs_dir={folder}", "trainer.seed=99")
    for name, arguments in (("--help", ["--help"]), ("--cfg job", ["--cfg", "job"])):
        seconds = [run_py(*arguments) for _ in range(ROUNDS)]
        print(f"python run.py {name}: {_spread(seconds)}; imports {_listed(imported_by(*arguments))}", flush=True)
    for tracker in ("mlflow", "jsonl"):
        seconds = []
        for seed in range(ROUNDS):
            settings = [*own, f"runs_dir={folder}", f"trainer.seed={seed}", f"tracker={tracker}"]
            run, began = RunDir(compose(settings).run_dir), time.time()
            process = subprocess.Popen(
                [sys.executable, "run.py", *settings],
                cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            seconds.append(_first_row(run, process)["time_ms"] / 1000 - began)
            process.terminate()
            process.wait()
            subprocess.run(["rm", "-rf", str(run.path)], check=True)
        print(f"to the first update, tracker={tracker}: {_spread(seconds)}", flush=True)
    found = imported_by(*own, f"runs_dir={folder}", "trainer.seed=98")
    print(f"a whole run imports {_listed(found)}", flush=True)


def tracking(own: list[str], folder: Path) -> None:
    """Print the time that tracking takes in the training loop, and the CPU time of the mirroring thread."""
    from relora.runs.metrics import Broadcast
    from relora.tracking.mirror import Mirror
    from relora.training.job import launch
    from relora.training.trainer import Trainer

    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    at_the_end: dict[str, tuple[float, int]] = {}

    def clocked(owner: type, name: str, clock: Callable[[], float]) -> None:
        original = getattr(owner, name)

        def around(*arguments: Any, **named: Any) -> Any:
            began = clock()
            try:
                return original(*arguments, **named)
            finally:
                key = f"{owner.__name__}.{name}"
                spent[key] += clock() - began
                calls[key] += 1
                if owner is Trainer:
                    at_the_end.update({key: (spent[key], calls[key]) for key in list(spent)})

        setattr(owner, name, around)

    for name in ("log", "progress", "log_line", "flush"):
        clocked(Broadcast, name, time.perf_counter)
    clocked(Mirror, "sync", time.thread_time)
    clocked(Trainer, "train", time.perf_counter)
    with contextlib.redirect_stdout(io.StringIO()):
        status = launch(compose([*own, f"runs_dir={folder}", "trainer.seed=97"]))
    training = status.summary["training_seconds"]
    on_the_path = sum(value for key, (value, _) in at_the_end.items() if key.startswith("Broadcast"))
    mirrored, rounds = at_the_end.get("Mirror.sync", (0.0, 0))
    updates = calls["Broadcast.progress"]
    print(
        f"tracking: {1e6 * on_the_path / updates:.0f} us an update of {1e3 * training / updates:.1f} ms, "
        f"{on_the_path / training:.2%} of the training time, on the path; the mirror's thread took "
        f"{mirrored / training:.2%} of one core in {rounds} rounds",
        flush=True,
    )


def _first_row(run: RunDir, process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Wait for the first metrics row with a training loss, and return it."""
    while process.poll() in (None, 0):
        if found := rows(run):
            return found[0]
        time.sleep(0.02)
    raise SystemExit(f"python run.py ended with exit code {process.returncode}: {run.path}")


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _listed(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items()) or "none of the libraries"


def main() -> None:
    """Measure start-up, then tracking."""
    own = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        start_up([*own, "trainer.total_steps=110", "method.warm_start_steps=0"], Path(name))
        tracking(own, Path(name))


if __name__ == "__main__":
    main()
