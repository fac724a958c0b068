"""Submit runs as SLURM jobs, with submitit. relora.launching.node has what the jobs do.

A job gets only a path. The frozen config and the checkpoints are in the run's folder. A job that SLURM stops early
writes a checkpoint and puts itself back into the queue.

Jobs import from a snapshot of the code that is made at the submission. Edits and checkouts after that change nothing
for jobs that are queued, running or requeued.

A job waits until the jobs that make its corpus and its warm start have ended, even if they fail. If the corpus or the
warm start is missing then, the job makes it. The batch script survives SLURM's signals from its first line on. Python
remembers them from its first line on.
"""

import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relora.common.errors import RunError
from relora.config.cluster import SlurmConfig
from relora.launching.node import CorpusTask, ReportTask, RunTask
from relora.runs import code, slurm, warmstart
from relora.runs.rundir import RunDir, read_json, write_json
from relora.runs.state import log_of
from relora.studies.study import Planned

EXTRA_JOBS = "submissions.json"
"""A file in the folder of a study or of a single run. It lists the jobs that are not runs."""

IGNORE_SIGNALS_IN_SHELL = "trap : TERM USR2"
"""A line of the batch script. Without it, a signal to its shell ends the job before the checkpoints are written."""

IGNORE_SIGNALS_IN_SRUN = """sh -c 'trap "" INT TERM USR2; exec "$@"' sh"""
"""Prefix of the Python command: a shell that ignores signals and replaces itself by Python, which then holds them."""


@dataclass(kw_only=True)
class Submission:
    """The jobs that were submitted."""

    arrays: list[str]
    """SLURM's job numbers of the runs' arrays."""
    preparations: list[str]
    """Jobs of this launch that make what the runs need: corpora and shared warm starts."""
    awaited: set[str] = field(default_factory=set)
    """Jobs, of this or an earlier launch, that the runs wait for."""
    report: str | None = None
    snapshot: Path | None = None
    """The folder of the code that the jobs run; None if they run the code as it is when they start."""

    def describe(self) -> str:
        """The arrays' job numbers as text for a message."""
        return f"{'array' if len(self.arrays) == 1 else 'arrays'} {', '.join(self.arrays)}"


def check(cluster: SlurmConfig) -> None:
    """Check a job script with sbatch. Raises ConfigError if SLURM would refuse it, and RunError without SLURM."""
    with tempfile.TemporaryDirectory() as folder:
        # submitit has no public way to get the script that it would give to sbatch.
        text = _executor(cluster, Path(folder), "check", [])._make_submission_file_text("true", "check")
        slurm.check_script(text, Path(folder))


def submit(
    pending: Sequence[Planned],
    folder: Path,
    *,
    study: str | None,
    after: Sequence[str] = (),
    max_failures: int | None = None,
) -> Submission:
    """Submit prepared runs, the jobs that make their corpora and warm starts, and the job that writes the report.

    Does not wait for the jobs.

    Args:
        pending: The prepared runs, which share one `cluster`.
        folder: Where submitit keeps its files and the logs.
        study: The study's name. None for a single run, which has no report.
        after: Jobs of the study that are queued or running already. The report waits for them too.
        max_failures: As in `Sweep`. A job that fails cancels those that are queued.

    Raises:
        RunError: The code cannot be copied, or SLURM refuses a job. `check` finds the reason before anything is
            written. Jobs that only make what refused runs need are cancelled.
    """
    cluster = pending[0].config.cluster
    assert isinstance(cluster, SlurmConfig)
    submitted = Submission(arrays=[], preparations=[])
    if cluster.snapshot:
        submitted.snapshot = code.take(
            code.modules_of(item.config for item in pending), Path(pending[0].config.runs_dir)
        )
        cluster = replace(cluster, setup=[*cluster.setup, *code.shell_lines(submitted.snapshot)])
    try:
        corpora = _submit_corpora(pending, cluster, folder, submitted)
        warm_starts = _submit_warm_starts(pending, cluster, folder, corpora, submitted)
        made_by = {**dict.fromkeys(corpora.values(), "corpus"), **dict.fromkeys(warm_starts.values(), "warm start")}
        groups: dict[tuple[str, ...], list[Planned]] = defaultdict(list)
        for item in pending:
            needed = (corpora.get(_data(item)), warm_starts.get(warmstart.key(item.config)))
            groups[tuple(number for number in needed if number)].append(item)
        _submit_arrays(groups, made_by, submitted, cluster, folder, study, max_failures)
        if study is not None:
            dependency = [("afterany", (*submitted.arrays, *after))]
            executor = _executor(_single_task(cluster), folder, f"{study}-report", dependency)
            task = ReportTask(Path(pending[0].config.runs_dir), study)
            (submitted.report,) = _submit_all([task], executor)
    except RunError:
        slurm.cancel(job for job in submitted.preparations if job not in submitted.awaited)
        raise
    finally:  # after an error too, so that the queued jobs can be cancelled
        file = folder.parent / EXTRA_JOBS
        beside = [*read_json(file).get("jobs", []), *submitted.preparations]
        write_json(file, {"jobs": [*beside, *([submitted.report] if submitted.report else [])]})
    return submitted


def _submit_arrays(
    groups: dict[tuple[str, ...], list[Planned]],
    made_by: dict[str, str],
    submitted: Submission,
    cluster: SlurmConfig,
    folder: Path,
    study: str | None,
    max_failures: int | None,
) -> None:
    """Submit one or more arrays for each group of runs that wait for the same jobs.

    Each array's jobs are recorded in their run folders at once.
    """
    size = slurm.max_array_size()
    chunks = [
        (needed, items[start : start + size])
        for needed, items in groups.items()
        for start in range(0, len(items), size)
    ]
    launch = {"launched_ms": time.time_ns() // 1_000_000, "max_failures": max_failures}
    shares = _shares([len(items) for _, items in chunks], cluster.max_parallel)
    for number, (needed, items) in enumerate(chunks):
        conditions = [("afterany", needed)]
        if number >= cluster.max_parallel:  # arrays have no common limit, so one waits for another
            conditions.append(("afterany", (submitted.arrays[number - cluster.max_parallel],)))
        names = _submit_all(
            [RunTask(item.run.path) for item in items],
            _executor(cluster, folder, study or items[0].config.name, conditions, array_parallelism=shares[number]),
        )
        submitted.arrays.append(names[0].partition("_")[0])
        submitted.awaited |= set(needed)
        for item, name in zip(items, names, strict=True):
            _record(item.run, name, folder, {job: made_by[job] for job in needed}, submitted.snapshot, launch)


def _shares(sizes: Sequence[int], max_parallel: int) -> list[int]:
    """How many tasks of each array may run at once: at least one, and together at most `max_parallel` if possible."""
    shares = [max(1, max_parallel * size // sum(sizes)) for size in sizes]
    while sum(shares) > max(max_parallel, len(shares)):
        shares[shares.index(max(shares))] -= 1
    return shares


def _data(item: Planned) -> str:
    """A key of the run's text and its settings, made without reading the files."""
    return repr(item.config.data)


def _submit_corpora(
    pending: Sequence[Planned], cluster: SlurmConfig, folder: Path, submitted: Submission
) -> dict[str, str]:
    """Submit a job for each corpus that is not prepared yet. Return the job of each `_data` key."""
    from relora.data.corpus import folder_of

    made: dict[Path, str] = {}
    found: dict[str, str] = {}
    for data, item in {_data(item): item for item in pending}.items():
        place = folder_of(item.config.data, Path(item.config.runs_dir) / "corpora")
        if (place / "meta.json").exists():
            continue
        if place not in made:
            executor = _executor(_single_task(cluster), folder, "corpus", [])
            made[place] = _under_way(place) or _made_by(CorpusTask(item.run.path), executor, place, submitted)
        found[data] = made[place]
    return found


def _submit_warm_starts(
    pending: Sequence[Planned], cluster: SlurmConfig, folder: Path, corpora: dict[str, str], submitted: Submission
) -> dict[str | None, str]:
    """Submit a job for each untrained warm start that several runs share. The job uses the config of one of them.

    Returns the job of each warm start's key, also the jobs of earlier launches that are queued or running.
    """
    sharing: dict[str, list[Planned]] = defaultdict(list)
    for item in pending:
        key = warmstart.key(item.config)
        if key is not None and not (warmstart.folder_of(item.config) / "meta.json").exists():
            sharing[key].append(item)
    found: dict[str | None, str] = {}
    for key, items in sharing.items():
        place = warmstart.folder_of(items[0].config)
        under_way = _under_way(place)
        if under_way is not None:
            found[key] = under_way
        elif len(items) > 1:
            needed = corpora.get(_data(items[0]))
            executor = _executor(cluster, folder, f"warm-start-{key}", [("afterany", (needed,) if needed else ())])
            task = RunTask(items[0].run.path, warm_start_only=True)
            found[key] = _made_by(task, executor, place, submitted)
    return found


def _made_by(task: Callable[[], None], executor: Any, place: Path, submitted: Submission) -> str:
    """Submit the job that makes `place`, and record its number in a file beside `place`."""
    (name,) = _submit_all([task], executor)
    submitted.preparations.append(name)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place.with_name(f"{place.name}.job"), {"job": name})
    return name


def _under_way(place: Path) -> str | None:
    """The job of an earlier launch that makes `place`, None if no such job is queued or running."""
    name = read_json(place.with_name(f"{place.name}.job")).get("job")
    job = slurm.ask([name]).of(name) if name else None
    return name if job is not None and job.alive else None


def _record(
    run: RunDir, name: str, folder: Path, needs: dict[str, str], snapshot: Path | None, launch: dict[str, Any]
) -> None:
    """Record the run's job. `needs` maps each job that it waits for to "corpus" or "warm start"."""
    submitted_ms = time.time_ns() // 1_000_000
    log, code_hash = str(log_of(folder, name)), snapshot.name if snapshot else None
    record = {"job": name, "log": log, "needs": needs, "submitted_ms": submitted_ms, "code": code_hash, **launch}
    write_json(run.submission_file, record)


def _single_task(cluster: SlurmConfig) -> SlurmConfig:
    """The cluster settings for a job of one process without a GPU."""
    return replace(cluster, nodes=1, tasks_per_node=1, gpus_per_node=None)


def _executor(
    cluster: SlurmConfig,
    folder: Path,
    name: str,
    conditions: Sequence[tuple[str, Sequence[str]]],
    *,
    array_parallelism: int = 1,
) -> Any:
    """Return submitit's executor for jobs with these settings, which start after `conditions` are met."""
    from submitit import SlurmExecutor

    threads = f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cluster.cpus_per_task}}}"
    dependency = ",".join(":".join([kind, *numbers]) for kind, numbers in conditions if numbers)
    extra: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.options}
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.timeout_minutes,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node,
        "mem": None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        "signal_delay_s": cluster.signal_delay_seconds,
        "setup": [IGNORE_SIGNALS_IN_SHELL, threads, *cluster.setup],
        "dependency": dependency or None,
        "array_parallelism": array_parallelism,
        "stderr_to_stdout": True,
        # Since SLURM 22.05, srun does not inherit --cpus-per-task from the batch job.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}", *cluster.srun_options],
        "additional_parameters": extra,
    }
    try:
        python = cluster.python or shlex.quote(sys.executable)
        executor = SlurmExecutor(folder=folder, python=f"{IGNORE_SIGNALS_IN_SRUN} {python} -u -m relora.common.signals")
    except RuntimeError:
        raise RunError("srun is not installed here: this machine is no SLURM submit node; use cluster=local") from None
    # By default submitit sets a wckey. Clusters that account by wckeys refuse an unknown one.
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None}, wckey=None)
    return executor


def _submit_all(tasks: Sequence[Callable[[], None]], executor: Any) -> list[str]:
    """Submit one job or an array. Return the jobs' names: "4711", or "4711_0", "4711_1", .... Raises RunError."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    try:
        with clean_env(), executor.batch():
            submitted = [executor.submit(task) for task in tasks]
        return [entry.job_id for entry in submitted]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise RunError(f"SLURM refused the jobs: {' '.join(str(error).split())}") from error
