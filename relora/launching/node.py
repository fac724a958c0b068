"""What a node of the cluster runs: the tasks that submitit stores for the jobs."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from relora.common import signals
from relora.common.errors import RunError, WarmStartTrained
from relora.config import frozen
from relora.config.cluster import SlurmConfig
from relora.launching.stop import stop
from relora.runs import slurm
from relora.runs.rundir import RunDir, Status, read_json
from relora.runs.state import observe
from relora.studies.failures import ended, reason_to_stop
from relora.studies.study import of_manifest
from relora.training.job import EXIT_CODES, job

RECORDED_SECONDS = 30.0
"""How long a job waits for the launcher to record it as the job of its run."""


@dataclass(frozen=True)
class RunTask:
    """Train a prepared run. With `warm_start_only`, train only its warm start."""

    path: Path
    warm_start_only: bool = False

    def __call__(self) -> None:
        """Exit with a code that gives the job the right SLURM state, or put the job back into the queue."""
        signals.hold()  # submitit has installed its own handlers
        from submitit.helpers import TorchDistributedEnvironment

        rank = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).rank
        began, run = time.monotonic(), RunDir(self.path)
        if not self.warm_start_only and not _is_own(run):
            print(f"{run.path} belongs to another job now; this job ({slurm.own_job()}) does not train it")
            return
        before = _progress(run)
        try:
            status = job(self.path, on_node=True, warm_start_only=self.warm_start_only)
        except (RunError, OSError) as error:
            sys.exit(f"relora: {error}")
        if status.state == "finished" or status.message == str(WarmStartTrained()):
            return
        if status.state == "interrupted":
            # Only rank 0 requeues the job. Another rank that exits with an error would end the job before that.
            if rank:
                return
            self._requeue_if_needed(run, status, seconds=time.monotonic() - began, progressed=_progress(run) > before)
        if status.state == "failed" and not rank:
            _stop_if_too_many_fail(run)
        sys.exit(EXIT_CODES[status.state])

    def _requeue_if_needed(self, run: RunDir, status: Status, *, seconds: float, progressed: bool) -> None:
        """Requeue a job that SLURM stopped early. Let the run fail if a job cannot make a step in its time limit."""
        number, cluster = slurm.own_job(), frozen.thaw(run.config_file).cluster
        assert isinstance(cluster, SlurmConfig)
        at_its_end = seconds > 0.5 * (60 * cluster.timeout_minutes - cluster.signal_delay_seconds)
        if status.stopped_by == "SIGUSR2" and at_its_end and not progressed:
            status.state = "failed"
            status.message = (
                f"no optimizer step was made in cluster.timeout_minutes={cluster.timeout_minutes}, so a requeued job "
                "would make no progress; raise it"
            )
            run.status = status
            print(f"failed: {status.message}", flush=True)
        elif not slurm.is_cancelled(number) and (status.stopped_by == "SIGUSR2" or slurm.is_requeueing(number)):
            print(f"putting job {number} back into the queue", flush=True)
            try:
                slurm.requeue(number)
            except RunError as error:
                status.state, status.message = "failed", f"{status.message}, but the job could not be requeued: {error}"
                run.status = status
                print(f"failed: {status.message}", flush=True)


def _is_own(run: RunDir) -> bool:
    """Whether this job is recorded as the job of the run. The launcher records it a moment after it submits."""
    limit = time.monotonic() + RECORDED_SECONDS
    while read_json(run.submission_file).get("job") != slurm.own_job():
        if time.monotonic() > limit:
            return False
        time.sleep(0.5)
    return True


def _stop_if_too_many_fail(run: RunDir) -> None:
    """Cancel the queued runs of the same launch of a study, if this and other runs of it have failed too often."""
    study, own = frozen.thaw(run.config_file).study, read_json(run.submission_file)
    if study is None or "launched_ms" not in own:
        return
    runs_dir = run.path.parent
    peers = [
        item
        for item in of_manifest(runs_dir, study)
        if read_json(item.run.submission_file).get("launched_ms") == own["launched_ms"]
    ]
    over = [found for found in (ended(item.run) for item in peers) if found is not None]
    reason = reason_to_stop(over, own["max_failures"])
    states = observe([item.run for item in peers]) if reason is not None else []
    queued = [item for item, state in zip(peers, states, strict=False) if state.name == "queued"]
    if reason is not None and queued:
        print(f"{reason}; cancelling {len(queued)} queued runs of the launch", flush=True)
        stop(queued, why=f"not started: {reason}")


def _progress(run: RunDir) -> int:
    from relora.runs.checkpoint import latest_step

    return latest_step(run.checkpoints) or 0


@dataclass(frozen=True)
class CorpusTask:
    """Prepare the corpus of a run."""

    path: Path

    def __call__(self) -> None:
        """Prepare the corpus. Raises RunError if the text cannot be read or is too little."""
        signals.hold()  # held and never checked: there is nothing to save
        from relora.data.corpus import prepare

        config = frozen.thaw(RunDir(self.path).config_file)
        prepare(config.data, Path(config.runs_dir) / "corpora", print)


@dataclass(frozen=True)
class ReportTask:
    """Write the report of a study after its runs have ended, also if they failed."""

    runs_dir: Path
    study: str

    def __call__(self) -> None:
        """Write the report, and send it to MLflow if that is a server.

        If MLflow's store is a file, the next command on the submitting machine sends the report.
        """
        signals.hold()
        from relora.studies.publish import publish_report

        publish_report(self.runs_dir, self.study, on_node=True)
