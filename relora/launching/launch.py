"""Launch a run, or the runs of a study with their baselines, on this machine or on SLURM."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from relora.common.errors import RunError
from relora.config.cluster import ClusterConfig, SlurmConfig
from relora.config.run import RunConfig
from relora.launching.local import Processes, one_after_the_other, only_launcher
from relora.launching.stop import stop
from relora.runs.rundir import read_json
from relora.runs.spent import other_switches
from relora.runs.state import ObservedState, observe
from relora.studies.baselines import launch_notes
from relora.studies.manifest import study_dir
from relora.studies.prune import Unwanted, existing, take_out, unwanted
from relora.studies.publish import join_study, leave_study, publish_report
from relora.studies.status import render_plain, show_progress, status_rows
from relora.studies.study import Planned, planned_runs, prepare, write_manifest
from relora.studies.sweeps import Sweep

SLURM_POLL_SECONDS = 10.0


def launch_study(sweep: Sweep, overrides: Sequence[str], *, prune: bool = False) -> bool:
    """Train or submit those runs of the study that are missing, failed or stopped.

    Ctrl-C and SIGTERM stop every run on this machine with a checkpoint. The same launch then continues the runs.

    Args:
        sweep: The study's runs.
        overrides: The arguments of run.py without -m, for the study's manifest.
        prune: Take runs of earlier launches that this launch does not want out of the study, and stop those that no
            other study has.

    Returns:
        Whether all runs are finished. With SLURM, and without `cluster.wait`, whether all are submitted.

    Raises:
        ConfigError: SLURM would refuse the jobs, or a full-rank baseline cannot be made.
    """
    planned = planned_runs(sweep)
    for remark in notes_of(sweep, planned):
        print(f"note: {remark}", flush=True)
    check_cluster(planned[0].config.cluster)
    runs_dir = Path(planned[0].config.runs_dir)
    surplus = unwanted(runs_dir, sweep.study, {item.config.name for item in planned})
    if surplus.names and not prune:
        print(f"note: {surplus.told(sweep.study)}", flush=True)
    write_manifest(runs_dir, sweep, planned, overrides)
    if surplus.names and prune:
        _prune(runs_dir, sweep.study, surplus)
    return launch_planned(sweep.study, planned, ["-m", *overrides], max_failures=sweep.max_failures)


def notes_of(sweep: Sweep, planned: Sequence[Planned]) -> list[str]:
    """Return what a user should know about the runs of a launch before they start."""
    baselines = [item.config for item in planned if item.role == "baseline"]
    return [*sweep.remarks, *launch_notes(baselines, [item.config for item in planned])]


def _prune(runs_dir: Path, study: str, surplus: Unwanted) -> None:
    """Stop the runs that no study wants, and take all surplus runs out of the study."""
    found = existing(runs_dir, surplus.names)
    stopped = stop([item for item in found if item.config.name in surplus.nowhere])
    leave_study(found, study)
    take_out(runs_dir, study, surplus.names, found)
    print(f"took {len(surplus.names)} runs out of study {study}: {', '.join(surplus.names)}", flush=True)
    if stopped:
        print(f"cancelled {', '.join(stopped)}", flush=True)


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise ConfigError if SLURM would refuse the jobs, before anything is written."""
    if isinstance(cluster, SlurmConfig):
        from relora.launching.submit import check

        check(cluster)


def launch_planned(
    study: str, planned: Sequence[Planned], command: Sequence[str], *, max_failures: int | None = None
) -> bool:
    """Launch those runs of a study, already in its manifest, that are neither finished nor queued nor running.

    Args:
        study: The study's name.
        planned: All runs of the study. The first one's `cluster` says where they run.
        command: The arguments of run.py, with which a run can be resumed.
        max_failures: As in `Sweep`.

    Returns:
        As `launch_study`.
    """
    config = planned[0].config
    if isinstance(config.cluster, SlurmConfig):
        return _submit_study(study, planned, command, config.cluster, max_failures)
    states = observe([item.run for item in planned])
    pending = _to_launch(planned, states, command, study)
    names, baselines = [state.name for state in states], sum(item.role == "baseline" for item in planned)
    print(
        f"study {study}: {len(planned)} runs, {baselines} of them baselines that were added; "
        f"{names.count('finished')} finished already, {names.count('running') + names.count('queued')} running",
        flush=True,
    )
    if config.cluster.name == "debug":
        one_after_the_other(pending, max_failures)
    else:
        Processes(study, planned, pending, config.cluster.max_parallel, max_failures).run()
    return _conclude(study, planned)


def _to_launch(
    planned: Sequence[Planned], states: Sequence[ObservedState], command: Sequence[str], study: str
) -> list[Planned]:
    """Prepare and return the runs that need a launch. The other runs become members of the study in MLflow."""
    pending = [item for item, state in zip(planned, states, strict=True) if state.needs_launch]
    for line in _other_switches(planned, states):
        print(f"note: {line}", flush=True)
    prepare(pending, command)
    join_study([item for item in planned if item not in pending], study)
    return pending


def _other_switches(planned: Sequence[Planned], states: Sequence[ObservedState]) -> list[str]:
    """Notes on finished runs that the study uses although this launch asks for other switches."""
    runs: dict[str, list[str]] = {}
    for item, state in zip(planned, states, strict=True):
        status = item.run.known_status
        if state.name == "finished" and status and (switches := other_switches(item.config, status.spent)):
            runs.setdefault(switches, []).append(item.config.name)
    return [
        f"this study uses finished runs with {switches}, with the speed and memory measured then: {', '.join(names)}"
        for switches, names in runs.items()
    ]


def _conclude(study: str, planned: Sequence[Planned]) -> bool:
    """Print the table and write the report of a study whose runs have ended. Return whether all runs are finished."""
    rows = status_rows(planned)
    print(render_plain(rows), flush=True)
    publish_report(Path(planned[0].config.runs_dir), study)
    unfinished = sum(row.state.name != "finished" for row in rows)
    if unfinished:
        print(f"{unfinished} runs are not finished; the same command continues them", flush=True)
    return not unfinished


# ------------------------------------------------------------------------------------------------------------ SLURM


def _submit_study(
    study: str, planned: Sequence[Planned], command: Sequence[str], cluster: SlurmConfig, max_failures: int | None
) -> bool:
    from relora.launching.submit import submit

    check_cluster(cluster)
    runs_dir = Path(planned[0].config.runs_dir)
    with only_launcher(runs_dir):
        states = observe([item.run for item in planned])
        if all(state.name == "finished" for state in states):
            return _conclude(study, planned)
        pending = _to_launch(planned, states, command, study)
        under_way = {
            read_json(item.run.submission_file)["job"].partition("_")[0]
            for item, state in zip(planned, states, strict=True)
            if state.is_under_way and item.run.submission_file.exists()
        }
        outcome = "submitted nothing"
        if pending:
            jobs = study_dir(runs_dir, study) / "jobs"
            made = submit(pending, jobs, study=study, after=sorted(under_way), max_failures=max_failures)
            outcome = f"submitted {len(pending)} runs as {made.describe()}"
    done = ", ".join(
        f"{count} {word}"
        for word, name in (("already done", "finished"), ("running", "running"), ("queued", "queued"))
        if (count := sum(state.name == name for state in states))
    )
    where = f" runs_dir={runs_dir}" if runs_dir != Path("runs").absolute() else ""
    print(f"{outcome}{f' ({done})' if done else ''}; relora status {study}{where}", flush=True)
    if not cluster.wait:
        return True
    _wait(planned)
    return _conclude(study, planned)


def _wait(planned: Sequence[Planned]) -> None:
    """Show the runs until none is queued or running. Ctrl-C ends the display, and the SLURM jobs continue."""
    show = show_progress(planned)
    try:
        while True:
            with suppress(RunError):  # SLURM may be busy for a moment
                if not any(state.is_under_way for state in show(False)):
                    break
            time.sleep(SLURM_POLL_SECONDS)
    finally:
        show(True)


def submit_run(config: RunConfig, overrides: Sequence[str]) -> bool:
    """Submit a single run as a SLURM job, unless it needs no launch.

    Args:
        config: The run. Its `cluster` is a SlurmConfig.
        overrides: The arguments of run.py, with which the run can be resumed.

    Returns:
        True. With `cluster.wait`, whether the run is finished after the wait.
    """
    from relora.launching.submit import submit

    assert isinstance(config.cluster, SlurmConfig)
    check_cluster(config.cluster)
    item = Planned(config=config, role="arm")
    with only_launcher(Path(config.runs_dir)):
        (state,) = observe([item.run])
        if state.needs_launch:
            prepare([item], overrides)
            made = submit([item], item.run.path / "jobs", study=None)
            print(f"submitted {config.name} as job {made.arrays[0]}; relora logs {config.name}", flush=True)
        else:
            print(f"{item.run.path} is {state.name} already; relora logs {config.name}", flush=True)
    if not config.cluster.wait:
        return True
    _wait([item])
    return item.state == "finished"
