"""The peak memory of a run's phases, and the largest micro-step that fits into a device. Needs no torch."""

from dataclasses import dataclass
from functools import cached_property

from relora.budget.cost import COMPUTE_BYTES, Cost, LlamaShape
from relora.budget.memory import peak_bytes, summed_gradient_bytes
from relora.config.cluster import LocalConfig, SlurmConfig
from relora.config.run import RunConfig, fitting

USABLE_SHARE = 0.9
"""The share of a device's memory that a micro-step is chosen for.

The rest is for what `peak_bytes` does not count: its error of up to 5%, the rounding of the allocator and the memory of
kernels.
"""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of a run: the warm start at full rank, or the phase of the method."""

    config: RunConfig
    shape: LlamaShape
    """The sizes of the model that is trained."""
    cost: Cost
    sequences: int
    """The sequences of each step that one process trains on."""
    world_size: int

    def peak_bytes(self, sequences_at_a_time: int) -> int:
        """Return the most memory during an optimizer step of one process, with activations."""
        settings, length = self.config.trainer, self.config.data.sequence_length_tokens
        mask_bytes = 0
        if not self.config.data.attend_across_documents:  # only attention within documents needs a mask
            mask_bytes = COMPUTE_BYTES[settings.precision] * sequences_at_a_time * length * length
        return mask_bytes + peak_bytes(
            self.shape,
            self.cost,
            sequences_per_micro_step=sequences_at_a_time,
            sequence_length_tokens=length,
            micro_steps=self.sequences // sequences_at_a_time,
            precision=settings.precision,
            merged_weight=self.config.method.merged_weight_in_use,
            activation_checkpointing=settings.activation_checkpointing,
            update_in_backward=settings.update_in_backward,
            world_size=self.world_size,
        )

    def gradient_bytes(self, sequences_at_a_time: int) -> int:
        """Return the bytes of the gradients that are in memory together."""
        if self.config.trainer.update_in_backward:
            return self.cost.largest_gradient_bytes
        micro_steps = self.sequences // sequences_at_a_time
        return summed_gradient_bytes(self.cost, precision=self.config.trainer.precision, micro_steps=micro_steps)


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The phases of a run as one process trains it.

    Args:
        config: The run.
        vocab_size: Rows of the embedding.
        world_size: The processes that train together. None means as many as the config has.
    """

    config: RunConfig
    vocab_size: int
    world_size: int | None = None

    @property
    def sequences(self) -> int:
        """The sequences of each step that one process trains on."""
        return self.config.trainer.sequences_per_step // (self.world_size or self.config.world_size)

    @cached_property
    def of_method(self) -> Phase:
        """The phase of the method."""
        return self._phase(self.config.trained_shape(self.vocab_size), self.config.cost(self.vocab_size))

    @cached_property
    def at_full_rank(self) -> Phase:
        """Training at full rank, as in a warm start."""
        full = self.config.cost(self.vocab_size, warm_start=True)
        return self._phase(self.config.model.shape(self.vocab_size), full)

    @property
    def most_at_a_time(self) -> int:
        """The most sequences that the config lets a process train on at a time."""
        return fitting(self.sequences, self.config.trainer.sequences_per_micro_step)

    def peak_bytes(self, sequences_at_a_time: int) -> int:
        """Return the highest peak of the run. A warm start needs the memory of full rank."""
        phases = [self.of_method, *([self.at_full_rank] if self.config.method.warm_start_steps else [])]
        return max(phase.peak_bytes(sequences_at_a_time) for phase in phases)

    def fitting(self, device_bytes: int) -> int:
        """Return the most sequences at a time whose peak leaves a tenth of `device_bytes` free; 0 if one is too many.

        A number that the user has set is not changed. With trainer.update_in_backward a batch is never divided.
        """
        most = self.most_at_a_time
        if not self.may_be_divided:
            return most if self.fits(most, device_bytes) else 0
        divisors = (count for count in range(most, 0, -1) if most % count == 0)
        return next((count for count in divisors if self.fits(count, device_bytes)), 0)

    @property
    def may_be_divided(self) -> bool:
        """Whether the number of sequences at a time is free to choose."""
        settings = self.config.trainer
        return settings.sequences_per_micro_step is None and not settings.update_in_backward

    def fits(self, sequences_at_a_time: int, device_bytes: int) -> bool:
        """Whether the peak with so many sequences at a time leaves a tenth of `device_bytes` free."""
        return self.peak_bytes(sequences_at_a_time) <= USABLE_SHARE * device_bytes

    def _phase(self, shape: LlamaShape, cost: Cost) -> Phase:
        world_size = self.world_size or self.config.world_size
        return Phase(config=self.config, shape=shape, cost=cost, sequences=self.sequences, world_size=world_size)


def host_share_bytes(config: RunConfig, available_bytes: int | None, *, processes: int) -> int | None:
    """Return the part of a machine's memory that one process of a run can use on the CPU; None if it is not known.

    Args:
        config: The run. A SLURM job has `cluster.mem_gb`. `cluster.max_parallel` local runs share their machine.
        available_bytes: The available memory of the machine; None if it is not known.
        processes: The processes of the run on the machine.
    """
    cluster, known = config.cluster, [] if available_bytes is None else [available_bytes]
    if isinstance(cluster, SlurmConfig) and cluster.mem_gb is not None:
        known.append(round(cluster.mem_gb * 2**30))
    if not known:
        return None
    return min(known) // (processes * (cluster.max_parallel if isinstance(cluster, LocalConfig) else 1))


def memory_options(config: RunConfig) -> list[str]:
    """Return the overrides that save memory and are not used yet."""
    settings = config.trainer
    options = [] if settings.activation_checkpointing else ["trainer.activation_checkpointing=true"]
    options += config.method.memory_options
    return options if settings.precision == "bf16" else [*options, "trainer.precision=bf16"]
