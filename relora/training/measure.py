"""Measure the seconds of an optimizer step on this machine, on random tokens, before a run has a corpus."""

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from relora.config.cluster import LocalConfig
from relora.config.run import RunConfig
from relora.data.sequences import Batch, Sequences
from relora.runs.metrics import Broadcast
from relora.training.device_memory import peak_memory_bytes, reset_peak_memory
from relora.training.distributed import World
from relora.training.model import build
from relora.training.processes import choose_device
from relora.training.trainer import Trainer

UNTIMED_STEPS = 2
"""The first steps of a phase take longer: memory is allocated, and layers may be compiled."""
TIMED_STEPS = 8
MOST_SECONDS = 120.0
"""After this time, the steps that are timed already have to do."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The seconds of an optimizer step of one process."""

    step_seconds: float
    """A step of the method: the median of the timed steps."""
    warm_start_step_seconds: float
    """A step of the warm start; 0 without a warm start."""
    peak_memory_bytes: int
    device: str
    sequences_at_a_time: int

    def training_seconds(self, config: RunConfig) -> float:
        """Return the seconds of all steps of a run. Those of its restarts are not counted."""
        warm = config.method.warm_start_steps
        return warm * self.warm_start_step_seconds + (config.total_steps - warm) * self.step_seconds


class RandomTokens(Sequences):
    """Endless sequences of random tokens. Each sequence depends on its number."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        """Draw tokens below `vocab_size`, in sequences as `config` has them. None is padded."""
        self.vocab_size, self.sequence_length_tokens = vocab_size, config.data.sequence_length_tokens
        self.count = 2**30
        self.target_tokens = self.count * self.sequence_length_tokens
        self._has_documents = not config.data.attend_across_documents

    def batch(self, sequences: NDArray[np.int64]) -> Batch:
        """Return the sequences with these numbers, on the CPU."""
        length = self.sequence_length_tokens
        rows = [np.random.default_rng(int(number)).integers(0, self.vocab_size, length + 1) for number in sequences]
        window_BxT1 = torch.from_numpy(np.stack(rows))
        positions_BxT = None
        if self._has_documents:  # their lengths do not change the time
            positions_BxT = (torch.arange(length) % max(1, length // 4)).expand(len(rows), length)
        return Batch(window_BxT1[:, :-1], window_BxT1[:, 1:], positions_BxT)

    def targets_of(self, sequences: NDArray[np.int64]) -> int:
        """Return the number of targets in the sequences with these numbers."""
        return len(sequences) * self.sequence_length_tokens


def measure(config: RunConfig) -> Measured:
    """Train a few steps of a run's phases on random tokens, and return their time. Nothing of the run is written.

    A run of several processes is measured as the share of one of them, without the time in which they add up their
    gradients.

    Raises:
        RunError: There is no such device.
        TrainingError: One sequence at a time does not fit into its memory.
    """
    alone = replace(
        config,
        cluster=LocalConfig(name="local", max_parallel=1),
        trainer=replace(config.trainer, sequences_per_step=config.sequences_per_process),
    )
    device, vocab_size = (
        choose_device(config.trainer.device, World()),
        config.model.vocab_size or config.data.vocab_size,
    )
    tokens, warm = RandomTokens(alone, vocab_size), alone.method.warm_start_steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            alone,
            build(alone.model, alone.trained_shape(vocab_size), end_of_text_id=0, seed=0),
            tokens,
            tokens,
            Broadcast([]),
            vocab_size=vocab_size,
            checkpoint_folder=Path(folder),
            device=device,
        )
        reset_peak_memory(device)
        trainer.model.train()
        warm_start_seconds = _step_seconds(trainer, 0, warm) if warm else 0.0
        trainer.begin_method(warm)
        seconds = _step_seconds(trainer, warm, alone.total_steps - warm)
        return Measured(
            step_seconds=seconds,
            warm_start_step_seconds=warm_start_seconds,
            peak_memory_bytes=peak_memory_bytes(device),
            device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            sequences_at_a_time=trainer.micro.sequences_per_micro_step,
        )


def _step_seconds(trainer: Trainer, first: int, most: int) -> float:
    """Return the median time of the steps from `first` on. Of at most `most` steps, the first ones are not timed."""
    seconds: list[float] = []
    limit = time.perf_counter() + MOST_SECONDS
    for step in range(first, first + min(most, UNTIMED_STEPS + TIMED_STEPS)):
        began = time.perf_counter()
        trainer.set_learning_rate(step)
        trainer.update(step, trainer.forward_backward(step))
        trainer.refresh()
        trainer.under_way.finished()  # waits for the device
        seconds.append(time.perf_counter() - began)
        if time.perf_counter() > limit:
            break
    return statistics.median(seconds[min(UNTIMED_STEPS, len(seconds) - 1) :])
