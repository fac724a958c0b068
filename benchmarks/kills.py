"""Kill runs at random and at named moments, start them again, and compare their results with an undisturbed run.

    python benchmarks/kills.py --kills 200              # about half an hour on two cores
    python benchmarks/kills.py --kills 12 --seed 3      # a short form; another seed chooses other moments
    python benchmarks/kills.py --moments merge,exit     # only named moments, each with every signal

Every run is small and has its own folder. It has all parts: corpus, MLflow store, warm start, two restarts, export. It
is killed up to `KILLS_A_RUN` times by SIGKILL, SIGTERM, SIGINT or SIGUSR2. The signal goes to the process or to its
whole group. The same command starts the run again each time. The last launch is not disturbed.

After a signal that can be handled, the process must end by itself and leave a true status. In the end the run's
weights, metrics and results, and MLflow's copy of them, must equal those of an undisturbed run to the bit. No temporary
file may be left.

Prints a table, and the folder of each run that differs. The exit code is 1 if a run differs.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
VICTIM = Path(__file__).resolve().parent / "victim"

SETTING = (
    *("model.hidden_size=32", "model.intermediate_size=48", "model.layers=2", "model.heads=2", "method.rank=4"),
    *("method.warm_start_steps=6", "method.warm_start_learning_rate=2e-3", "method.reset_interval_steps=6"),
    *("schedule.warmup_steps=2", "schedule.restart_warmup_steps=2", "trainer.total_steps=24"),
    *("trainer.sequences_per_step=4", "trainer.validation_interval_steps=5", "trainer.checkpoint_interval_steps=4"),
    *("trainer.device=cpu", "data=text", "data.sequence_length_tokens=16", "data.vocab_size=300"),
    *("data.validation_fraction=0.05", "data.test_fraction=0.05"),
)
"""A warm start of 6 steps, restarts at steps 12 and 18 of 24, and a checkpoint every 4 steps."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
KILLS_A_RUN = 4
LIMIT_SECONDS = 300.0
"""A launch that takes longer counts as hung."""
RANDOM = "random"
PYTHON_STARTS_SECONDS = 1.0
"""By then Python has reached the first line of run.py, even on a busy machine. Before, it cannot handle a signal."""
REPRODUCIBLE = ("train/", "eval/", "restart/", "progress/")


@dataclass(frozen=True)
class Moment:
    """The moment at which a signal is sent. victim/sitecustomize.py explains the fields."""

    kind: str
    where: str
    number: int = 1
    delay_seconds: float = 0.0


MOMENTS = {
    "start-up, before torch": Moment("import", "torch"),
    "start-up, in torch": Moment("import", "torch", delay_seconds=0.5),
    "start-up, in transformers": Moment("import", "transformers", delay_seconds=0.3),
    "corpus, while it is written": Moment("open", r"corpora/.*\.bin$"),
    "corpus, before its rename": Moment("rename", r"corpora/[^/]+$"),
    "store, while it is created": Moment("open", r"/mlflow[^/]*\.lock$", delay_seconds=2.0),
    "store, later in its creation": Moment("open", r"/mlflow[^/]*\.lock$", delay_seconds=4.5),
    "warm start, before it is published": Moment("rename", r"warm_starts/[^/]+$"),
    "merge": Moment("call", "lowrank.py:merge", number=5),
    "reset": Moment("call", "reset.py:reset_optimizer"),
    "checkpoint, while it is written": Moment("open", r"checkpoints/[^/]*tmp$", number=2),
    "checkpoint, before its rename": Moment("rename", r"checkpoints/step-\d+\.pt$", number=2),
    "status, before its rename": Moment("rename", r"/status\.json$", number=2),
    "evaluation": Moment("call", "evaluate.py:evaluate", number=2),
    "export": Moment("call", "pretrained.py:save_pretrained"),
    "sample": Moment("call", "sampling.py:sample"),
    "exit": Moment("exit", ""),
}


@dataclass(frozen=True)
class Kill:
    """One signal: its number, its receiver and its moment."""

    moment: str
    number: signal.Signals
    to_group: bool
    after_seconds: float = 0.0
    """Seconds from the launch to a random moment."""

    def __str__(self) -> str:
        at = f"{self.after_seconds:.2f} s after the launch" if self.moment == RANDOM else self.moment
        return f"{self.number.name}{' to the group' if self.to_group else ''}, {at}"


@dataclass
class Story:
    """The signals that one run got, and the faults found."""

    folder: Path
    sent: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Kills:
    """The queue of kills that are still to be done. Several threads take from it."""

    def __init__(self, kills: Sequence[Kill]) -> None:
        self._waiting, self._lock = deque(kills), threading.Lock()
        self._phases = {name: number for number, name in enumerate(MOMENTS)}

    def take(self) -> list[Kill]:
        """The kills of the next run, in the order in which a run reaches their moments. Empty if no kill is left."""
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(KILLS_A_RUN, len(self._waiting)))]
        return sorted(taken, key=lambda kill: self._phases.get(kill.moment, 0))

    def give_back(self, kills: Sequence[Kill]) -> None:
        """Put back the kills that a run did not reach or had passed. Another run gets them."""
        with self._lock:
            self._waiting.extend(kills)


def launch(folder: Path, kill: Kill | None, attempt: int) -> tuple[int, str, int | None]:
    """Start the run of `folder` and wait until it ends.

    Args:
        folder: The folder of this run. Its parent holds the text.
        kill: The signal to send, None for an undisturbed launch.
        attempt: Number of the launch, for the names of its files.

    Returns:
        The exit code, the output, and the id of the process that got the signal. The id is -1 for a child process of
        the run, and None if no signal was sent.
    """
    mark = folder / f"killed-{attempt}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if kill is not None and kill.moment != RANDOM:
        paths = [str(VICTIM), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "KILLS_MOMENT": json.dumps(vars(MOMENTS[kill.moment])),
            "KILLS_SIGNAL": str(int(kill.number)),
            "KILLS_GROUP": str(int(kill.to_group)),
            "KILLS_MARK": str(mark),
        }
    with (folder / f"log-{attempt}.txt").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "run.py", *SETTING, f"data.path={folder.parent / 'text'}", f"runs_dir={folder / 'runs'}"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        hit: int | None = None
        try:
            if kill is not None and kill.moment == RANDOM:
                try:
                    process.wait(kill.after_seconds)
                except subprocess.TimeoutExpired:
                    hit = process.pid
                    (os.killpg if kill.to_group else os.kill)(process.pid, kill.number)
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 999
        log.seek(0)
        said = log.read()
    if mark.exists():
        hit = process.pid if kill is None or kill.to_group or mark.read_text() == str(process.pid) else -1
    return code, said, hit


def run_folder(folder: Path) -> Path | None:
    """The run's own folder, None if the run did not make it."""
    found = [path for path in (folder / "runs").glob("llama*") if path.is_dir()]
    return found[0] if found else None


def check_end(kill: Kill, code: int, said: str, hit: int, run: Path | None) -> list[str]:
    """Faults in how a killed launch ended. `code`, `said` (the output) and `hit` are the results of `launch`."""
    faults: list[str] = []
    status = json.loads((run / "status.json").read_text()) if run and (run / "status.json").exists() else {}
    if code == 999:
        return [f"hung for {LIMIT_SECONDS:.0f} s"]
    if kill.number == signal.SIGKILL:
        if hit > 0 and code != -signal.SIGKILL:
            faults.append(f"exit code {code} after SIGKILL")
    elif code == -kill.number and not said and kill.moment == RANDOM and kill.after_seconds < PYTHON_STARTS_SECONDS:
        pass
    else:
        expected = (0, 1, 130) if hit == -1 else (0, 130)
        if code not in expected:
            faults.append(f"exit code {code} is not one of {expected}")
        if status.get("state") == "running":
            faults.append("the status says that the run is running")
        if code == 0 and status.get("state") != "finished":
            faults.append(f"exit code 0 and the status says {status.get('state')}")
        if "Traceback" in said:
            faults.append("a traceback was printed")
    return faults


def live(folder: Path, kills: Sequence[Kill]) -> tuple[Story, Sequence[Kill]]:
    """Kill a run as planned, start it again after each kill, and let the last launch end undisturbed.

    Returns the run's story, and the kills that were not done because the run ended before their moment. A random kill
    that came too late gets an earlier time.
    """
    story = Story(folder)
    folder.mkdir()
    left: Sequence[Kill] = kills
    for attempt, kill in enumerate(kills):
        code, said, hit = launch(folder, kill, attempt)
        if hit is None:
            if code != 0:
                story.faults.append(f"launch {attempt}: exit code {code} without a signal ({kill})")
            if attempt == 0:
                left = left[1:]
                if kill.moment == RANDOM:  # the run was faster than the undisturbed one
                    left = [replace(kill, after_seconds=kill.after_seconds / 2), *left]
                else:
                    story.faults.append(f"launch 0: the moment did not come ({kill})")
            break
        left = left[1:]
        story.sent.append(kill)
        found = check_end(kill, code, said, hit, run_folder(folder))
        story.faults += [f"launch {attempt}: {kill}: {fault}" for fault in found]
    code, said, _ = launch(folder, None, len(kills))
    if code != 0:
        story.faults.append(f"the last launch, undisturbed, ended with exit code {code}")
    return story, left


# ------------------------------------------------------------------------------------------- what a run leaves


def left_behind(folder: Path) -> dict[str, Any]:
    """All results of a finished run that must not depend on the kills."""
    run = run_folder(folder)
    if run is None:
        return {"run": "no run folder"}
    status = json.loads((run / "status.json").read_text())
    metrics: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name.startswith(REPRODUCIBLE):
                key = f"{name} at step {row['step']}"
                metrics[key] = value if key not in metrics else float("nan")
    results = ("test_loss", "eval_loss", "tokens", "flops", "restarts", "skipped_updates", "sample")
    files = {path.relative_to(folder).as_posix() for path in (folder / "runs").rglob("*")}
    return {
        "weights": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "state": status["state"],
        **{f"result {name}": status["summary"][name] for name in results},
        **metrics,
        **mirrored(folder, run),
        "temporary files": sorted(file for file in files if re.search(r"\.tmp|\.broken|\.partial", file)),
    }


def mirrored(folder: Path, run: Path) -> dict[str, Any]:
    """The number of MLflow's runs, the run's status there, and the metrics that differ from metrics.jsonl."""
    from relora.tracking.store import quiet_mlflow

    quiet_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("relora")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    if len(found) != 1:
        return {"MLflow's runs": len(found)}
    wrong: list[str] = []
    history: dict[str, list[tuple[int, int, float]]] = {}
    for name in found[0].data.metrics:
        points = client.get_metric_history(found[0].info.run_id, name)
        history[name] = sorted((point.step, point.timestamp, point.value) for point in points)
    written: dict[str, list[tuple[int, int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time_ms", "nonfinite"):
                written.setdefault(name, []).append((row["step"], row["time_ms"], value))
    for name in sorted(history.keys() | written.keys()):
        if history.get(name, []) != sorted(written.get(name, [])):
            wrong.append(name)
    return {"MLflow's runs": 1, "MLflow's status": found[0].info.status, "metrics that differ in MLflow": wrong}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Describe the keys whose values differ: the first three with both values, and the number of further ones."""
    keys = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    told = [f"{key}: {found.get(key)!r} instead of {expected.get(key)!r}" for key in sorted(keys)[:3]]
    return [*told, *([f"and {len(keys) - 3} more"] if len(keys) > 3 else [])]


# --------------------------------------------------------------------------------------------------- the whole


def write_text(folder: Path) -> None:
    """Write text files with a structure that a model can learn."""
    folder.mkdir()
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(40)]
    for number in range(120):
        (folder / f"{number:03}.txt").write_text(f"text {number}: {' '.join(chance.choices(words, k=80))}.\n")


def planned(kills: int, seed: int, seconds: float) -> list[Kill]:
    """Plan the kills: half at the named moments in turn, half at random times within `seconds` of the launch."""
    chance = random.Random(seed)
    named = [(moment, number) for moment in MOMENTS for number in SIGNALS]
    chance.shuffle(named)
    made: list[Kill] = []
    for count in range(kills):
        moment, number = (RANDOM, chance.choice(SIGNALS)) if count % 2 else named[count // 2 % len(named)]
        after = chance.uniform(0, seconds) if moment == RANDOM else 0.0
        made.append(Kill(moment, number, chance.random() < 0.5, after))
    return made


def table(stories: Sequence[Story]) -> str:
    """A table of the number of signals sent, by moment and signal."""
    sent = Counter((kill.moment, kill.number.name) for story in stories for kill in story.sent)
    moments = sorted({moment for moment, _ in sent})
    width = max(map(len, moments), default=0)
    names = [number.name for number in SIGNALS]
    lines = [f"{'':<{width}}  {'  '.join(names)}"]
    for moment in moments:
        counts = [f"{sent[moment, name]:>{len(name)}}" for name in names]
        lines.append(f"{moment:<{width}}  {'  '.join(counts)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill and compare runs. Return 1 if a run differs, else 0."""
    parser = argparse.ArgumentParser(description="Kill runs, start them again, compare with an undisturbed run.")
    parser.add_argument("--kills", type=int, default=200, help="how many signals to send (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of moments (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: the cores)")
    parser.add_argument("--moments", default=None, help="comma-separated parts of moment names; use only these")
    chosen = parser.parse_args(arguments)
    if chosen.moments is None:
        moments = list(MOMENTS)
    else:
        wanted = chosen.moments.split(",")
        moments = [name for name in MOMENTS if any(part in name for part in wanted)]
        if not moments:
            parser.error(f"--moments={chosen.moments} matches none of: {', '.join(MOMENTS)}")

    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    write_text(folder / "text")
    began = time.monotonic()
    undisturbed, _ = live(folder / "undisturbed", [])
    seconds = time.monotonic() - began
    if undisturbed.faults:
        print(f"{undisturbed.folder}: {'; '.join(undisturbed.faults)}")
        return 1
    expected = left_behind(undisturbed.folder)
    if chosen.moments is None:
        kills = planned(chosen.kills, chosen.seed, seconds)
    else:
        kills = [Kill(name, number, group) for name in moments for number in SIGNALS for group in (False, True)]
    print(f"an undisturbed run takes {seconds:.1f} s; {len(kills)} signals in {folder}", flush=True)
    stories = tell_all(folder, Kills(kills), expected, chosen.jobs)
    bad = sum(bool(story.faults) for story in stories)
    print(table(stories))
    print(
        f"{sum(len(story.sent) for story in stories)} signals to {len(stories)} runs: {len(stories) - bad} runs equal "
        f"the undisturbed one, {bad} do not; {time.monotonic() - began:.0f} s"
    )
    if not bad:
        shutil.rmtree(folder)
    return int(bad > 0)


def tell_all(folder: Path, kills: Kills, expected: dict[str, Any], jobs: int) -> list[Story]:
    """Run the runs, `jobs` at a time, until no kill is left. Return their stories."""
    numbers, comparing = itertools.count(), threading.Lock()

    def work() -> list[Story]:
        stories: list[Story] = []
        while taken := kills.take():
            story, left = live(folder / f"run-{next(numbers):03}", taken)
            kills.give_back(left)
            stories.append(story)
            try:
                with comparing:
                    story.faults += differences(expected, left_behind(story.folder))
            except (OSError, ValueError, KeyError) as error:
                story.faults.append(f"cannot be compared: {type(error).__name__}: {error}")
            for fault in story.faults:
                print(f"{story.folder.name}: {fault}", flush=True)
            if not story.faults:
                shutil.rmtree(story.folder)
        return stories

    with ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work) for _ in range(jobs)]
        return [story for worker in workers for story in worker.result()]


if __name__ == "__main__":
    sys.exit(main())
