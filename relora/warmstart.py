"""A warm start that several runs share: trained by whoever comes first, forked by all, charged to each."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora import checkpoint
from relora.config import RunConfig
from relora.metrics import complete_bytes, read_rows, row_metrics
from relora.rundir import RunDir, read_json, sync_folder, write_json


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
    config: RunConfig, run: RunDir, origin: dict[str, str], say: Callable[[str], None]
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
        say(f"waiting for the warm start {folder.name}, which another run trains")
        lock.acquire()
    try:
        meta = read_json(folder / "meta.json")
        if meta.get("origin") == origin and (reached is not None or _fork(config, run, folder, meta, say)):
            lock.release()
            yield None
        else:

            def publish() -> None:
                _publish(config, run, folder, origin)
                lock.release()

            yield publish
    finally:
        lock.release()


def _publish(config: RunConfig, run: RunDir, folder: Path, origin: dict[str, str]) -> None:
    """Keep the newest checkpoint and the rows that led to it; the folder appears when it is whole and on the disk."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    steps = config.method.warm_start_steps
    shutil.copyfile(checkpoint.path_of(run.checkpoints, steps), temporary / "checkpoint.pt")
    # A fork evaluates the last step itself, before it begins.
    rows = [
        row
        for row in read_rows(run.metrics_file)
        if row["step"] <= steps and not (row["step"] == steps and "eval/loss" in row)
    ]
    (temporary / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(temporary / "meta.json", {"run": config.name, "steps": steps, "origin": origin})
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    sync_folder(folder.parent)


def _fork(config: RunConfig, run: RunDir, folder: Path, meta: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Make `run` one that has just trained the warm start; False where that cannot be read.

    Its metrics come first, so that a crash between repeats this; rows that the run has already stay as they are, for
    what mirrors them has taken them.
    """
    try:
        state: dict[str, Any] = checkpoint.load(folder / "checkpoint.pt")
    except Exception as error:  # torch raises many kinds
        say(f"the warm start {folder.name} cannot be read ({type(error).__name__}: {error}); training it anew")
        return False
    have = {(row["step"], name) for row in read_rows(run.metrics_file) for name in row_metrics(row)}
    with run.metrics_file.open("ab") as file:
        file.truncate(complete_bytes(run.metrics_file))
        for row in read_rows(folder / "metrics.jsonl"):
            fresh = {name: value for name, value in row_metrics(row).items() if (row["step"], name) not in have}
            if fresh:
                kept = {name: row[name] for name in ("step", "time_ms", "nonfinite") if name in row}
                file.write(json.dumps({**kept, **fresh}).encode() + b"\n")
    state["config_hash"] = config.config_hash
    micro = config.trainer.sequences_per_micro_step or config.trainer.sequences_per_step
    state["counters"]["sequences_per_micro_step"] = micro
    checkpoint.save(run.checkpoints, state["step"], state)
    say(f"forked the warm start {folder.name} of {meta['run']} at step {state['step']}")
    return True
