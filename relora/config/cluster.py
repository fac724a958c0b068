"""The choices of the `cluster` group, which say where runs are executed. Each dataclass checks its own fields."""

import re
from dataclasses import dataclass, field
from typing import Any

from relora.common.checks import at_least, at_most, positive
from relora.common.errors import ConfigError, shown

LARGEST = {
    "timeout_minutes": 5_256_000,
    "nodes": 100_000,
    "tasks_per_node": 10_000,
    "cpus_per_task": 100_000,
    "gpus_per_node": 10_000,
    "signal_delay_seconds": 86_400,
}

START_UP_SECONDS = 30
"""Time that a job needs to import, load its checkpoint and make its first optimizer step."""

SET_BY_RELORA = (
    *("dependency", "array", "output", "error", "signal", "open-mode"),
    *("requeue", "no-requeue", "kill-on-invalid-dep"),
)
"""Options of sbatch that relora sets and the user must not change."""

HAS_A_SETTING = {
    **{name: name for name in ("partition", "account", "qos", "nodes")},
    "time": "timeout_minutes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "mem_gb",
}
"""Options of sbatch that have a field in SlurmConfig, with the name of that field."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Settings of every choice. `max_parallel` is the number of runs of a study that train at the same time."""

    name: str
    max_parallel: int = 1

    def __post_init__(self) -> None:
        cluster_class(self.name)
        at_least("cluster.max_parallel", self.max_parallel, 1)
        at_most("cluster.max_parallel", self.max_parallel, 10**6, "no cluster accepts that many jobs")

    def check_folder(self, runs_dir: str) -> None:
        """Raise ConfigError if runs cannot be stored in `runs_dir`. Only a launch calls this."""


@dataclass(kw_only=True, slots=True)
class LocalConfig(ClusterConfig):
    """Each run of a study trains in its own process on this machine. A single run trains in the launching process."""


@dataclass(kw_only=True, slots=True)
class DebugConfig(ClusterConfig):
    """The runs of a study train one after the other, in the launching process."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        if self.max_parallel != 1:
            raise ConfigError(f"cluster.max_parallel={self.max_parallel} must be 1 with cluster=debug: one process")


@dataclass(kw_only=True, slots=True)
class SlurmConfig(ClusterConfig):
    """Each run is a SLURM job. None leaves a setting at the cluster's default.

    nodes * tasks_per_node processes train a run. Each process trains on an equal share of every step's batch.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_minutes: int = 240
    """Walltime of one attempt. A run that needs more time is requeued and continues."""
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    """Memory of a node."""
    signal_delay_seconds: int = 120
    """A job gets a signal this long before its walltime ends. It then writes a checkpoint and is requeued."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before the job's command: modules, containers, environment."""
    python: str | None = None
    """The command that starts Python on a node, if it is not the submitting Python: in a container, for example."""
    srun_options: list[str] = field(default_factory=list)
    """Options of srun, which starts a run's processes, for example ["--container-image=IMAGE"]."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch, by their long names, for example {constraint: a100, exclude: n7}."""
    snapshot: bool = True
    """Jobs run a copy of the code as it is at the submission. If false, they run the code as it is when they start."""
    wait: bool = False
    """Wait until the last run ends, with a table of the runs, instead of returning after the submission."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        for name, maximum in LARGEST.items():
            at_least(f"cluster.{name}", getattr(self, name), 0 if name == "gpus_per_node" else 1)
            at_most(f"cluster.{name}", getattr(self, name), maximum, "no cluster has that many")
        positive("cluster.mem_gb", self.mem_gb)
        if self.mem_gb is not None and not round(self.mem_gb * 1024) >= 1:
            raise ConfigError(
                f"cluster.mem_gb={self.mem_gb} is less than a megabyte, and SLURM reads --mem=0 as the whole node; "
                "set the gigabytes that a node needs, or null for the cluster's default"
            )
        at_most("cluster.mem_gb", self.mem_gb, 10**6, "no node has that much memory")
        at_least("cluster.signal_delay_seconds", self.signal_delay_seconds, 1)
        if self.timeout_minutes * 60 < self.signal_delay_seconds + START_UP_SECONDS:
            raise ConfigError(
                f"cluster.timeout_minutes={self.timeout_minutes} is too short: a job needs "
                f"{START_UP_SECONDS} s to start and cluster.signal_delay_seconds={self.signal_delay_seconds} to write "
                "its checkpoint; raise the walltime or lower the delay"
            )
        for name, value in self.options.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"cluster.options: {shown(name)} is not an option of sbatch; write its long name without --"
                )
            if not isinstance(value, str | int | float) or value != value:
                raise ConfigError(
                    f"cluster.options.{shown(name)}={shown(value)} must be text, a number, or true for an option "
                    "without a value"
                )
            if name.replace("_", "-") in SET_BY_RELORA:
                raise ConfigError(f"cluster.options.{name} is set by relora; leave it out")
            if name.replace("_", "-") in HAS_A_SETTING:
                raise ConfigError(
                    f"cluster.options.{name} has its own setting; use cluster.{HAS_A_SETTING[name.replace('_', '-')]}"
                )

    def check_folder(self, runs_dir: str) -> None:
        """Refuse a folder with %, because SLURM replaces %j and similar patterns in the path of a job's log."""
        if "%" in runs_dir:
            raise ConfigError(
                f"runs_dir={shown(runs_dir)} contains %, which SLURM replaces in the paths of logs; with cluster=slurm "
                "use a folder without %"
            )

    @property
    def world_size(self) -> int:
        """Number of processes that train one run."""
        return self.nodes * self.tasks_per_node


CLUSTERS: dict[str, type[ClusterConfig]] = {"local": LocalConfig, "debug": DebugConfig, "slurm": SlurmConfig}


def cluster_class(name: object) -> type[ClusterConfig]:
    """Return the class of a cluster's settings. Raises ConfigError for an unknown name."""
    if not isinstance(name, str) or name not in CLUSTERS:
        raise ConfigError(f"cluster.name={shown(name)} is not one of {', '.join(CLUSTERS)}")
    return CLUSTERS[name]
