"""Where runs are executed: the choices of the `cluster` group, each checked for what can be wrong with it alone."""

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
"""What a job is given to import, load its checkpoint and make its first update."""

SET_BY_RELORA = (
    *("dependency", "array", "output", "error", "signal", "open-mode"),
    *("requeue", "no-requeue", "kill-on-invalid-dep"),
)
"""Options of sbatch that have to be what they are."""

HAS_A_SETTING = {
    **{name: name for name in ("partition", "account", "qos", "nodes")},
    "time": "timeout_minutes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "mem_gb",
}
"""Options of sbatch that are set by a field of SlurmConfig."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """What every choice has: how many runs of a study are trained at a time."""

    name: str
    max_parallel: int = 1

    def __post_init__(self) -> None:
        cluster_class(self.name)
        at_least("cluster.max_parallel", self.max_parallel, 1)
        at_most("cluster.max_parallel", self.max_parallel, 10**6, "no cluster takes as many jobs")

    def check_folder(self, runs_dir: str) -> None:
        """Raise ConfigError where runs cannot stand in `runs_dir`: asked at a launch, not when an old run is read."""


@dataclass(kw_only=True, slots=True)
class LocalConfig(ClusterConfig):
    """A process on this machine for each run of a study; a single run trains in the process that launched it."""


@dataclass(kw_only=True, slots=True)
class DebugConfig(ClusterConfig):
    """The runs of a study one after the other in the process that launched it."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        if self.max_parallel != 1:
            raise ConfigError(f"cluster.max_parallel={self.max_parallel} must be 1 with cluster=debug: one process")


@dataclass(kw_only=True, slots=True)
class SlurmConfig(ClusterConfig):
    """A SLURM job for each run; None leaves a setting to the cluster's own default.

    A run is trained by nodes * tasks_per_node processes, each with a share of every update's batch.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_minutes: int = 240
    """Walltime of one attempt; a run that needs more is requeued and goes on."""
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int | None = None
    mem_gb: float | None = None
    """Of a node."""
    signal_delay_seconds: int = 120
    """How long before the end of its walltime a job is told, to write its checkpoint and be requeued."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the job's command: modules, containers, environment."""
    python: str | None = None
    """What starts Python on a node, where it is not the Python that submits: a container's, say."""
    srun_options: list[str] = field(default_factory=list)
    """Options of srun, which starts a run's processes: ["--container-image=IMAGE"]."""
    options: dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch, by its long name: {constraint: a100, exclude: n7}."""
    wait: bool = False
    """Stay until the last run ends, with the table of the runs, instead of returning when all are submitted."""

    def __post_init__(self) -> None:
        ClusterConfig.__post_init__(self)
        for name, maximum in LARGEST.items():
            at_least(f"cluster.{name}", getattr(self, name), 0 if name == "gpus_per_node" else 1)
            at_most(f"cluster.{name}", getattr(self, name), maximum, "no cluster has as much")
        positive("cluster.mem_gb", self.mem_gb)
        if self.mem_gb is not None and not round(self.mem_gb * 1024) >= 1:
            raise ConfigError(
                f"cluster.mem_gb={self.mem_gb} is less than a megabyte, and SLURM reads --mem=0 as the whole node; "
                "give what a process needs, some gigabytes, or null for the cluster's default"
            )
        at_most("cluster.mem_gb", self.mem_gb, 10**6, "no node has as much")
        at_least("cluster.signal_delay_seconds", self.signal_delay_seconds, 1)
        if self.timeout_minutes * 60 < self.signal_delay_seconds + START_UP_SECONDS:
            raise ConfigError(
                f"cluster.timeout_minutes={self.timeout_minutes} is below what a checkpoint needs: "
                f"{START_UP_SECONDS} s to start and cluster.signal_delay_seconds={self.signal_delay_seconds} to write "
                "it; raise the walltime or lower the delay"
            )
        for name, value in self.options.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise ConfigError(
                    f"cluster.options: {shown(name)} is no option of sbatch; write its long name without --"
                )
            if not isinstance(value, str | int | float) or value != value:
                raise ConfigError(
                    f"cluster.options.{shown(name)}={shown(value)} must be text, a number, or true for an option "
                    "without a value"
                )
            if name.replace("_", "-") in SET_BY_RELORA:
                raise ConfigError(f"cluster.options.{name} is set by relora itself; leave it out")
            if name.replace("_", "-") in HAS_A_SETTING:
                raise ConfigError(
                    f"cluster.options.{name} has a setting of its own: cluster.{HAS_A_SETTING[name.replace('_', '-')]}"
                )

    def check_folder(self, runs_dir: str) -> None:
        """SLURM replaces %j and its like in the path of a job's log."""
        if "%" in runs_dir:
            raise ConfigError(
                f"runs_dir={shown(runs_dir)} holds %, which SLURM replaces in the paths of logs; with cluster=slurm "
                "name a folder without it"
            )

    @property
    def world_size(self) -> int:
        """That train one run."""
        return self.nodes * self.tasks_per_node


CLUSTERS: dict[str, type[ClusterConfig]] = {"local": LocalConfig, "debug": DebugConfig, "slurm": SlurmConfig}


def cluster_class(name: object) -> type[ClusterConfig]:
    """The class of a cluster's settings. Raises ConfigError for a name that is unknown."""
    if not isinstance(name, str) or name not in CLUSTERS:
        raise ConfigError(f"cluster.name={shown(name)} is not one of {', '.join(CLUSTERS)}")
    return CLUSTERS[name]
