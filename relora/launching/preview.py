"""What a launch would do: the runs, their costs and what exists already. Starts and writes nothing."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relora.common.tables import aligned, in_time_units, in_units, some_of
from relora.config import plan_text
from relora.config.cluster import SlurmConfig
from relora.config.compose import compose
from relora.config.plan import Device, Plan, run_plan
from relora.config.run import RunConfig
from relora.launching.device import planned_device
from relora.launching.launch import check_cluster, notes_of
from relora.launching.speeds import speeds_of
from relora.runs import warmstart
from relora.runs.state import observe
from relora.runs.throughput import Estimate
from relora.studies import sweeps
from relora.studies.compare import labels_of
from relora.studies.study import Planned, planned_runs


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """A run of a launch with its cost."""

    item: Planned
    state: str
    """The state of the run now. "missing" if it was never started."""
    is_pending: bool
    """Whether the launch would start it."""
    plan: Plan
    estimate: Estimate | None
    trains_warm_start: bool
    """Whether it would train its warm start. The other runs that share the warm start fork it."""

    @property
    def flops(self) -> int:
        """The FLOPs that the launch would compute for this run."""
        if not self.is_pending:
            return 0
        forked_steps = 0 if self.trains_warm_start else self.item.config.method.warm_start_steps
        return self.plan.total_flops - forked_steps * self.plan.flops_per_update_at_full_rank

    @property
    def seconds(self) -> float | None:
        """The expected seconds that this run would take."""
        if self.estimate is None:
            return None
        forked_flops = self.plan.total_flops - self.flops
        return self.estimate.seconds - forked_flops / self.estimate.flops_per_second if self.is_pending else 0.0


def previewed(planned: Sequence[Planned], device: Device, *, measure: bool = False) -> list[Previewed]:
    """Return the runs of a launch with their costs, in the order of the launch.

    Args:
        planned: The runs.
        device: The device of each process.
        measure: Train a few steps of each kind of run here, instead of using the speed of finished runs.
    """
    states = observe([item.run for item in planned])
    speeds = speeds_of(planned[0].config, measure=measure)
    trained: set[str | None] = set()
    found: list[Previewed] = []
    for item, state in zip(planned, states, strict=True):
        made, shared = run_plan(item.config, device=device), warmstart.key(item.config)
        exists = shared is not None and (warmstart.folder_of(item.config) / "meta.json").exists()
        trains = state.needs_launch and not exists and shared not in trained
        found.append(
            Previewed(
                item=item,
                state=state.name,
                is_pending=state.needs_launch,
                plan=made,
                estimate=speeds.estimate(item.config, made, on_gpu=device.is_gpu),
                trains_warm_start=trains and shared is not None,
            )
        )
        if trains:
            trained.add(shared)
    return found


def launch_text(overrides: Sequence[str], *, measure: bool = False) -> str:
    """Return what `python run.py -m` with these overrides would do. Raises ConfigError as the launch does.

    Args:
        overrides: The arguments of run.py without -m.
        measure: Train a few steps of each kind of run here, instead of using the speed of finished runs.
    """
    search = sweeps.search(overrides)
    if search is not None:
        return _search_text(search, measure=measure)
    sweep, planned = _planned(overrides)
    if shutil.which("sbatch") is not None:  # a cluster's launch may be planned elsewhere
        check_cluster(planned[0].config.cluster)
    notes = [f"note: {remark}" for remark in notes_of(sweep, planned)]
    return "\n".join([*notes, study_text(sweep.study, planned, measure=measure)])


def launch_values(overrides: Sequence[str], *, measure: bool = False) -> dict[str, Any]:
    """Return the same as `launch_text`, as values for programs."""
    search = sweeps.search(overrides)
    if search is not None:
        return {
            "study": search.study,
            "trials": search.trials,
            "seeds": search.seeds,
            "run": run_values(_trial(search)),
        }
    sweep, planned = _planned(overrides)
    return {
        "study": sweep.study,
        "runs": [
            {
                **plan_text.as_dict(each.plan, each.item.config),
                "role": each.item.role,
                "state": each.state,
                "is_pending": each.is_pending,
                "trains_warm_start": each.trains_warm_start,
                "flops_to_compute": each.flops,
                "time": None if each.estimate is None else asdict(each.estimate),
            }
            for each in previewed(planned, planned_device(planned[0].config), measure=measure)
        ],
    }


def _planned(overrides: Sequence[str]) -> tuple[sweeps.Sweep, list[Planned]]:
    sweep = sweeps.expand(overrides)
    return sweep, planned_runs(sweep)


def _trial(search: sweeps.Search) -> RunConfig:
    """Return the config of a trial with the lowest rates. All trials of a search cost the same."""
    lowest = [f"{key}={low:g}" for key, (low, _) in search.ranges.items()]
    return compose([*search.overrides, *lowest, f"trainer.seed={search.seeds[0]}"])


def _search_text(search: sweeps.Search, *, measure: bool) -> str:
    """Return what a search would do."""
    count = search.trials * len(search.seeds)
    title = (
        f"search {search.study}: at most {count} runs, {search.trials} trials of {len(search.seeds)} seeds each; bad "
        "trials end early. Each run:"
    )
    return f"{title}\n\n{run_text(_trial(search), measure=measure)}"


# ------------------------------------------------------------------------------------------------------ a study


def study_text(study: str, planned: Sequence[Planned], *, measure: bool) -> str:
    """Return the preview of a study's launch as text: a row for each arm, and what all runs take together."""
    device = planned_device(planned[0].config)
    found = previewed(planned, device, measure=measure)
    labels = labels_of([each.item.config for each in found])
    arms: dict[tuple[str, str], list[Previewed]] = {}
    for each in found:
        arms.setdefault((each.item.config.variant, each.item.role), []).append(each)
    rows = [_row(labels[variant], role, members) for (variant, role), members in arms.items()]
    head = ("role", "seeds", "state", "parameters", "trainable", "FLOPs", "peak", "at a time", "time", "run")
    pending = [each for each in found if each.is_pending]
    baselines = sum(each.item.role == "baseline" for each in found)
    title = f"study {study}: {len(found)} runs, {baselines} of them baselines that are added; {len(pending)} to train"
    warnings = [warning for each in pending for warning in _doubts(each.item.config, each.plan, each.estimate)]
    warnings += [warning for each in pending for warning in plan_text.warnings(each.plan, each.item.config)]
    items = _together(found, pending, device)
    lines = [f"{name:<12} {value}" for name, value in items.items()]
    lines += [f"{'warning':<12} {warning}" for warning in dict.fromkeys(warnings)]
    return "\n".join([title, "", aligned([head, *rows]), "", *lines])


def _row(label: str, role: str, members: Sequence[Previewed]) -> tuple[str, ...]:
    """Return the cells of an arm, whose runs differ only in the seed."""
    states = Counter("new" if each.state == "missing" else each.state for each in members)
    plan, estimate = members[0].plan, members[0].estimate
    return (
        role,
        ",".join(str(each.item.config.trainer.seed) for each in members),
        ", ".join(name if count == len(members) else f"{count} {name}" for name, count in states.items()),
        f"{plan.parameters / 1e6:,.1f}M",
        f"{plan.trainable_parameters / plan.parameters:.0%}",
        f"{plan.total_flops:.3g}",
        in_units(plan.peak_bytes) + ("" if plan.fits else " (too much)"),
        f"{plan.sequences_at_a_time:,}",
        "" if estimate is None else in_time_units(estimate.seconds),
        label,
    )


def _together(found: Sequence[Previewed], pending: Sequence[Previewed], device: Device) -> dict[str, str]:
    """Return what the runs of a launch take together, by the name of the item."""
    config = found[0].item.config
    shared = sum(each.trains_warm_start for each in pending)
    forking = sum(warmstart.key(each.item.config) is not None for each in pending) - shared
    items = {"FLOPs": f"{sum(each.flops for each in pending):.3g} to compute"}
    if shared or forking:
        items["warm starts"] = f"{shared} to train, and {forking} runs fork one"
    items["device"] = device.name if device.memory_bytes is None else f"{in_units(device.memory_bytes)} ({device.name})"
    items["time"] = _time(pending, device)
    disk_bytes, free_bytes = sum(each.plan.disk_bytes for each in pending), _free_bytes(Path(config.runs_dir))
    items["disk"] = f"{in_units(disk_bytes)} for checkpoints and models"
    if free_bytes is not None:
        items["disk"] += f"; {in_units(free_bytes)} are free" + (", too little" if free_bytes < disk_bytes else "")
    return items


def _time(pending: Sequence[Previewed], device: Device) -> str:
    """Return how long the pending runs take, one after the other and as many at a time as the cluster may run."""
    if not pending:
        return "none"
    config, seconds = pending[0].item.config, [each.seconds for each in pending]
    known = [each for each in seconds if each is not None]
    if not known:
        return UNKNOWN_TIME
    total, parallel = sum(known), min(config.cluster.max_parallel, len(pending))
    text = f"{in_time_units(total)} one run after the other"
    if parallel > 1:
        text += f", at best {in_time_units(max(total / parallel, *known))} with cluster.max_parallel={parallel}"
    if device.is_gpu:
        text += f"; {total * config.world_size / 3600:,.1f} GPU-hours"
    if len(known) < len(seconds):
        text += f"; without {len(seconds) - len(known)} runs whose time is not known"
    bases = list(dict.fromkeys(each.estimate.basis for each in pending if each.estimate is not None))
    return f"{text} (at the speed of {some_of(bases)})"


UNKNOWN_TIME = (
    "not known: no finished run of runs_dir tells the speed of such a device; plan.flops_per_second=... gives it, and "
    "relora plan --measure measures it here"
)


def _free_bytes(runs_dir: Path) -> int | None:
    """Return the free space where the runs are stored. The folder itself may not exist yet."""
    existing = next((folder for folder in (runs_dir, *runs_dir.parents) if folder.is_dir()), None)
    return None if existing is None else shutil.disk_usage(existing).free


# ------------------------------------------------------------------------------------------------------- one run


def _planned_run(config: RunConfig, *, measure: bool) -> tuple[Device, Plan, Estimate | None]:
    """Return the device of one run, its plan there and its expected time."""
    device = planned_device(config)
    made = run_plan(config, device=device)
    return device, made, speeds_of(config, measure=measure).estimate(config, made, on_gpu=device.is_gpu)


def run_text(config: RunConfig, *, measure: bool = False) -> str:
    """Return the plan of one run as text, with its time and the doubts about its walltime."""
    device, made, estimate = _planned_run(config, measure=measure)
    time = UNKNOWN_TIME
    if estimate is not None:
        time = (
            f"{in_time_units(estimate.seconds)}, {in_time_units(estimate.training_seconds)} of it in updates, at "
            f"{estimate.flops_per_second:.3g} FLOPs a second, the speed of {estimate.basis}"
        )
    doubts = _doubts(config, made, estimate)
    return plan_text.text(made, config, device=device, more={"time": time}, doubts=doubts)


def run_values(config: RunConfig, *, measure: bool = False) -> dict[str, Any]:
    """Return the plan of one run as values for programs."""
    _, made, estimate = _planned_run(config, measure=measure)
    values = plan_text.as_dict(made, config)
    values["warnings"] = [*plan_text.warnings(made, config), *_doubts(config, made, estimate)]
    return {**values, "time": None if estimate is None else asdict(estimate)}


def _doubts(config: RunConfig, made: Plan, estimate: Estimate | None) -> list[str]:
    """Return a warning about a walltime that is shorter than the time between two checkpoints."""
    cluster, interval = config.cluster, config.trainer.checkpoint_interval_steps
    if estimate is None or not isinstance(cluster, SlurmConfig):
        return []
    between = min(interval, made.total_steps) * estimate.training_seconds / made.total_steps
    limit = 60 * cluster.timeout_minutes
    if between <= limit:
        return []
    good = max(1, math.floor(interval * limit / between / 4))
    return [
        f"trainer.checkpoint_interval_steps={interval} takes {in_time_units(between)}, longer than "
        f"cluster.timeout_minutes={cluster.timeout_minutes}: a job that dies without a signal loses its whole time; "
        f"use trainer.checkpoint_interval_steps={good}"
    ]
