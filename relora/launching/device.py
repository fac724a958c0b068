"""The device on which the processes of a run would train, without torch."""

from relora.common.host import available_memory_bytes
from relora.config.cluster import SlurmConfig
from relora.config.peak import host_share_bytes
from relora.config.plan import Device
from relora.config.run import RunConfig
from relora.launching.gpus import free_gpu_bytes, visible_gpus


def planned_device(config: RunConfig) -> Device:
    """Return the device of each process of a run that is launched here and now."""
    is_gpu = _is_gpu(config)
    memory_bytes, name = _memory(config, is_gpu=is_gpu)
    return Device(memory_bytes=memory_bytes, name=name, is_gpu=is_gpu)


def _is_gpu(config: RunConfig) -> bool:
    wanted, cluster = config.trainer.device, config.cluster
    if wanted != "auto":
        return wanted != "cpu"
    return bool(cluster.gpus_per_node) if isinstance(cluster, SlurmConfig) else bool(visible_gpus())


def _memory(config: RunConfig, *, is_gpu: bool) -> tuple[int | None, str]:
    """Return the memory of the device in bytes, None if it is not known here, and what it is."""
    given, cluster = config.plan.device_bytes, config.cluster
    if given is not None:
        return given, "plan.device_memory"
    if isinstance(cluster, SlurmConfig):
        if is_gpu:
            return None, "the cluster's GPUs"
        share = host_share_bytes(config, None, processes=cluster.tasks_per_node)
        return share, "the cluster's nodes" if share is None else "cluster.mem_gb"
    if is_gpu:
        free = free_gpu_bytes(config.trainer.device)
        return free, "the GPU" if free is None else "free on the GPU"
    share = host_share_bytes(config, available_memory_bytes(), processes=1)
    return share, "this machine" if share is None else "available on this machine"
