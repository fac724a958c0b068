"""A warm start that several runs share: trained by whoever comes first, forked by all, charged to each."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora.common.errors import DamagedFile
from relora.common.files import publishing, read_json, write_json
from relora.config.run import RunConfig
from relora.runs import checkpoint
from relora.runs.metrics import complete_bytes, encoded, read_rows, recorded, row_metrics
from relora.runs.rundir import RunDir


def key(config: RunConfig) -> str | None:
    """8 hex digits of all that affects the steps of the warm start; None where there is none."""
    if not config.method.warm_start_steps:
        return None
    after_it = ("method.", "optimizer.learning_rate", "optimizer.embedding_learning_rate", "schedule.restart_warmup")
    shared = {name: value for name, value in config.identity.items() if not name.startswith(after_it)}
    shared["steps"] = config.method.warm_start_steps
    shared["learning_rate"] = config.warm_start_learning_rate
    shared["embedding_learning_rate"] = config.optimizer.embedding_learning_rate or config.warm_start_learning_rate
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]


def folder_of(config: RunConfig) -> Path:
    """Where the config's warm start stands or will stand: checkpoint.pt, metrics.jsonl and meta.json."""
    return Path(config.runs_dir) / "warm_starts" / str(key(config))


@contextmanager
def shared(
    config: RunConfig, run: RunDir, origin: dict[str, str], log_line: Callable[[str], None]
) -> Iterator[Callable[[], None] | None]:
    """Fork the warm start into `run`, or hold it for this run to train.

    Gives what is to be called when the run has trained it and saved its checkpoint, None where it has nothing to train.
    While one run trains a warm start, others that need it wait. `origin` is what else must agree (text, device): a
    warm start of another origin is trained anew.
    """
    steps, reached = config.method.warm_start_steps, checkpoint.latest_step(run.checkpoints)
    if not steps or (reached is not None and reached > steps):
        yield None
        return
    folder = folder_of(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log_line(f"waiting for the warm start {folder.name}, which another run trains")
        lock.acquire()
    try:
        meta = _meta(folder, log_line)
        if meta.get("origin") == origin and (reached is not None or _fork(config, run, folder, meta, log_line)):
            lock.release()
            yield None
        else:

            def publish() -> None:
                _publish(config, run, folder, origin)
                lock.release()

            yield publish
    finally:
        lock.release()


def _meta(folder: Path, log_line: Callable[[str], None]) -> dict[str, Any]:
    """What a warm start says of itself; empty where there is none that can be read."""
    try:
        return read_json(folder / "meta.json")
    except DamagedFile as error:
        log_line(f"the warm start {error}; training it anew")
        return {}


def _publish(config: RunConfig, run: RunDir, folder: Path, origin: dict[str, str]) -> None:
    """Keep the newest checkpoint and the rows that led to it; the folder appears when it is whole and on the disk."""
    steps = config.method.warm_start_steps
    # A fork evaluates the last step itself, before it begins.
    rows = [
        row
        for row in read_rows(run.metrics_file)
        if row["step"] <= steps and not (row["step"] == steps and "eval/loss" in row)
    ]
    with publishing(folder) as temporary:
        shutil.copyfile(checkpoint.path_of(run.checkpoints, steps), temporary / "checkpoint.pt")
        (temporary / "metrics.jsonl").write_bytes(b"".join(encoded(row, line) for line, row in enumerate(rows)))
        write_json(temporary / "meta.json", {"run": config.name, "steps": steps, "origin": origin})


def _fork(config: RunConfig, run: RunDir, folder: Path, meta: dict[str, Any], log_line: Callable[[str], None]) -> bool:
    """Make `run` one that has just trained the warm start; False where that cannot be read.

    Its metrics come first, so that a crash between repeats this; rows that the run has already stay as they are, for
    what mirrors them has taken them.
    """
    try:
        state = checkpoint.load(folder / "checkpoint.pt")
    except checkpoint.CheckpointError as error:
        log_line(f"the warm start {error}; training it anew")
        return False
    here, there = recorded(run.metrics_file), recorded(folder / "metrics.jsonl")
    for lost in there.lost:
        log_line(f"the warm start's {lost}; what is lost there stays lost")
    have = {(row["step"], name) for row in here.rows for name in row_metrics(row)}
    lines = count(here.lines)
    with run.metrics_file.open("ab") as file:
        file.truncate(complete_bytes(run.metrics_file))
        for row in there.rows:
            fresh = {name: value for name, value in row_metrics(row).items() if (row["step"], name) not in have}
            if fresh:
                kept = {name: row[name] for name in ("step", "time_ms", "nonfinite") if name in row}
                file.write(encoded({**kept, **fresh}, next(lines)))
    state["config_hash"] = config.config_hash
    micro = config.trainer.sequences_per_micro_step or config.trainer.sequences_per_step
    state["counters"]["sequences_per_micro_step"] = micro
    checkpoint.save(run.checkpoints, state["step"], state)
    log_line(f"forked the warm start {folder.name} of {meta.get('run', 'another run')} at step {state['step']}")
    return True
