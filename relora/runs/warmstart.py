"""A warm start that several runs share.

The first run trains it, and the other runs fork it. Its cost counts for each of them.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from relora.common.errors import DamagedFile
from relora.common.files import publishing, read_json, write_json
from relora.config.identity import short_hash
from relora.config.run import RunConfig
from relora.runs import checkpoint
from relora.runs.metrics import complete_bytes, encoded, read_rows, recorded, row_metrics
from relora.runs.rundir import RunDir


def key(config: RunConfig) -> str | None:
    """Return a hash of all that affects the steps of the warm start, in 8 hex digits; None without a warm start."""
    if not config.method.warm_start_steps:
        return None
    after_it = ("method.", "optimizer.learning_rate", "optimizer.embedding_learning_rate", "schedule.restart_warmup")
    shared = {name: value for name, value in config.identity.items() if not name.startswith(after_it)}
    shared["steps"] = config.method.warm_start_steps
    shared["learning_rate"] = config.warm_start_learning_rate
    shared["embedding_learning_rate"] = config.optimizer.embedding_learning_rate or config.warm_start_learning_rate
    return short_hash(shared)


def folder_of(config: RunConfig) -> Path:
    """Return the folder of the warm start: checkpoint.pt, metrics.jsonl and meta.json. It may not exist yet."""
    return Path(config.runs_dir) / "warm_starts" / str(key(config))


@contextmanager
def shared(
    config: RunConfig, run: RunDir, origin: dict[str, str], log_line: Callable[[str], None]
) -> Iterator[Callable[[], None] | None]:
    """Fork the warm start into `run`, or hold its lock while this run trains it.

    While one run trains a warm start, the other runs that need it wait.

    Args:
        config: The run's config.
        run: The folder of the run.
        origin: What else must be equal (text, device). A warm start of a different origin is trained again.
        log_line: Called with each line for the user.

    Yields:
        A function to call when the run has trained the warm start and saved its checkpoint; it publishes the warm
        start. None if the run does not have to train it.
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
    """Read the meta.json of a warm start; empty if there is none or it is damaged."""
    try:
        return read_json(folder / "meta.json")
    except DamagedFile as error:
        log_line(f"the warm start {error}; training it again")
        return {}


def _publish(config: RunConfig, run: RunDir, folder: Path, origin: dict[str, str]) -> None:
    """Publish the checkpoint and the rows up to it. The folder appears when it is complete and on the disk."""
    steps = config.method.warm_start_steps
    # Leave out the evaluation at the last step: a fork makes it itself before it begins.
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
    """Bring `run` into the state of a run that has just trained the warm start; False if its checkpoint is damaged.

    The metrics are written before the checkpoint, so that a crash between the two repeats the fork. Rows that the run
    already has are not changed, because they may have been sent to MLflow.
    """
    try:
        state = checkpoint.load(folder / "checkpoint.pt")
    except checkpoint.CheckpointError as error:
        log_line(f"the warm start {error}; training it again")
        return False
    here, there = recorded(run.metrics_file), recorded(folder / "metrics.jsonl")
    for lost in there.lost:
        log_line(f"the warm start's {lost}; the lost rows are not restored")
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
    # The run that trained the warm start may have had another memory. None: this run chooses again.
    state["counters"]["sequences_per_micro_step"] = config.trainer.sequences_per_micro_step
    checkpoint.save(run.checkpoints, state["step"], state)
    log_line(f"forked the warm start {folder.name} of {meta.get('run', 'another run')} at step {state['step']}")
    return True
