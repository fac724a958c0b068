"""Recover the status of a run whose status.json is damaged from the other files in the run's folder."""

from relora.common.errors import DamagedFile
from relora.common.files import set_aside
from relora.runs.metrics import read_rows, row_metrics
from relora.runs.results import RESULTS
from relora.runs.rundir import RunDir, Status, read_json


def previous_status(run: RunDir) -> Status | None:
    """Return the status that the last attempt left.

    If status.json is damaged, it is renamed. The results of a finished run are then read from its metrics. Otherwise
    the status is None.
    """
    try:
        return run.status
    except DamagedFile as error:
        message = f"{error.path} cannot be read: {error.why}; kept as {set_aside(run.status_file).name}"
        rows = [row_metrics(row) for row in read_rows(run.metrics_file)]
        prefix = "summary/"
        known = {name.removeprefix(prefix): row[name] for row in rows for name in row if name.startswith(prefix)}
        if not run.model.is_dir() or not all(name in known for name in RESULTS):
            print(f"note: {message}; continuing without it", flush=True)
            return None
        print(f"note: {message}; its results are read from metrics.jsonl, but its machine is unknown", flush=True)
        about = read_json(run.model / "relora.json")
        corpus = {name: about[name] for name in ("corpus_digest", "tokenizer_digest") if name in about}
        counts = ("tokens", "parameters", "trainable_parameters", "restarts", "skipped_updates", "peak_memory_bytes")
        summary = {name: int(value) if name in counts else value for name, value in known.items()}
        run.status = Status(state="finished", host="", pid=0, corpus=corpus, summary={"sample": "", **summary})
        return run.status
