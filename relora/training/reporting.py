"""What a run reports of its optimizer steps: metrics, progress, and the seconds and skipped updates it has counted."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relora.common.errors import TrainingError
from relora.config.run import RunConfig
from relora.runs import spent
from relora.runs.metrics import MICRO_STEP, Progress, Tracker
from relora.training.underway import SMOOTHED_STEPS, UnderWay, Update


@dataclass(kw_only=True)
class Counters:
    """What a checkpoint keeps besides tensors."""

    tokens: int = 0
    """The tokens that the finished steps predicted. Padding does not count."""
    skipped_updates: int = 0
    consecutive_skipped_updates: int = 0
    training_seconds: float = 0.0
    """Seconds of optimizer steps and restarts, over all attempts (UnderWay counts them)."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """The training seconds by machine and speed switches (relora.runs.spent). A fork includes its warm start's."""
    peak_memory_bytes: int = 0
    """The highest peak of all attempts, up to their last checkpoint."""


class Reporter:
    """Counts finished optimizer steps and sends their metrics to the tracker."""

    def __init__(
        self,
        config: RunConfig,
        tracker: Tracker,
        *,
        vocab_size: int,
        machine: Mapping[str, Any],
        target_tokens: Callable[[int], int],
    ) -> None:
        """Create a reporter with all counters at zero.

        Args:
            config: The run.
            tracker: Receives metrics, progress and log lines.
            vocab_size: Rows of the embedding, for the FLOPs.
            machine: This machine's description in the run's record (relora.runs.spent.MACHINE).
            target_tokens: Returns the tokens that a step predicts.
        """
        self.target_tokens = target_tokens
        self._last_tokens: deque[int] = deque(maxlen=SMOOTHED_STEPS)
        """The tokens of the steps over which the speed is averaged."""
        self.config, self.tracker, self.machine, self.clock = config, tracker, machine, config.clock
        self.counters = Counters()
        self.warm_start_cost = config.cost(vocab_size, warm_start=True)
        self.method_cost = config.cost(vocab_size)

    def report(self, finished: Sequence[Update], under_way: UnderWay, *, sequences_per_micro_step: int) -> None:
        """Count and log finished optimizer steps.

        Args:
            finished: The steps, in order. Their losses and norms have reached the host.
            under_way: Knows the seconds and the speed so far.
            sequences_per_micro_step: The size of a micro-step now.

        Raises:
            TrainingError: trainer.max_consecutive_skipped_updates updates in a row were not finite.
        """
        if finished:
            warm_start = finished[-1].step < self.clock.warm_start_steps
            self._charge(under_way, sequences_per_micro_step, warm_start=warm_start)
        for update in finished:
            self._last_tokens.append(self.target_tokens(update.step))
            self.counters.tokens += self._last_tokens[-1]
            loss, gradient_norm = update.loss_and_norm.tolist()
            if math.isfinite(loss) and math.isfinite(gradient_norm):
                self.counters.consecutive_skipped_updates = 0
            else:
                self._count_skipped(update.step, loss, gradient_norm)
            self._log(update, loss, gradient_norm, under_way.updates_per_second, sequences_per_micro_step)

    def progress_metrics(self, step: int) -> dict[str, float]:
        """Tokens and FLOPs after `step` optimizer steps: the axes on which runs are compared.

        The tokens are those of the reported steps. Padding is computed, so the FLOPs include it.
        """
        warm = min(step, self.clock.warm_start_steps)
        tokens = self.config.tokens_per_step
        return {
            "progress/tokens": self.counters.tokens,
            "progress/flops": warm * self.warm_start_cost.flops_per_update(tokens)
            + (step - warm) * self.method_cost.flops_per_update(tokens)
            + self.clock.restarts_before(step) * self.method_cost.merge_flops,
        }

    def _charge(self, under_way: UnderWay, sequences_per_micro_step: int, *, warm_start: bool) -> None:
        """Add the seconds since the last report to the machine and the switches that they were spent with."""
        under = spent.conditions(
            self.config, self.machine, sequences_per_micro_step=sequences_per_micro_step, warm_start=warm_start
        )
        now = under_way.seconds
        spent.spend(self.counters.spent, under, now - self.counters.training_seconds)
        self.counters.training_seconds = now

    def _count_skipped(self, step: int, loss: float, gradient_norm: float) -> None:
        counters, limit = self.counters, self.config.trainer.max_consecutive_skipped_updates
        counters.skipped_updates += 1
        counters.consecutive_skipped_updates += 1
        in_backward = self.config.trainer.update_in_backward
        done = "no parameter with such a gradient is updated" if in_backward else "the update is skipped"
        self.tracker.log_line(f"step {step}: loss {loss}, gradient norm {gradient_norm}; {done}")
        if counters.consecutive_skipped_updates >= limit:
            raise TrainingError(
                f"the run diverged: {limit} updates in a row, up to step {step}, had a non-finite loss or gradient; "
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps or use trainer.precision=fp32"
            )

    def _log(
        self, update: Update, loss: float, gradient_norm: float, steps_per_second: float, sequences_per_micro_step: int
    ) -> None:
        """Log one step. Rows are numbered by the steps that are done."""
        done = update.step + 1
        rate = sum(self._last_tokens) / len(self._last_tokens) * steps_per_second
        self.tracker.progress(
            Progress(
                step=done,
                total_steps=self.clock.total_steps,
                loss=loss,
                learning_rate=update.learning_rate,
                tokens_per_second=rate,
                steps_per_second=steps_per_second,
                next_restart=self.clock.next_restart(update.step),
            )
        )
        if done % self.config.trainer.log_interval_steps == 0 or done == self.clock.total_steps:
            self.tracker.log(
                done,
                {
                    MICRO_STEP: sequences_per_micro_step,
                    "train/loss": loss,
                    "train/lr": update.learning_rate,
                    "train/grad_norm": gradient_norm,
                    "train/skipped_updates": self.counters.skipped_updates,
                    **self.progress_metrics(done),
                    "perf/tokens_per_second": rate,
                    "perf/training_seconds": self.counters.training_seconds,
                },
            )
