"""The training loop: Algorithm 1 of Lialin et al. 2023, with a warm start before it and a checkpoint at any step."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from relora import checkpoint
from relora.config import RunConfig
from relora.data import TokenSequences
from relora.errors import RunError
from relora.evaluate import Evaluation, evaluate
from relora.groups import LoRAConfig
from relora.lowrank import keyed_generator
from relora.methods import build_method, build_optimizer, learning_rate_factor
from relora.metrics import MICRO_STEP, Progress, Tracker
from relora.model import peak_memory_bytes, precision_context, summed_cross_entropy

T = TypeVar("T")

SMOOTHED_STEPS = 20
"""Updates that the shown tokens/s is averaged over."""


class TrainingError(RunError):
    """Training cannot go on."""


class Interrupted(Exception):  # noqa: N818 -- like KeyboardInterrupt, no error
    """The run was asked to stop, and wrote a checkpoint first."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} after step {step}")
        self.step, self.reason = step, reason


@dataclass(kw_only=True)
class Counters:
    """What a run has to remember besides tensors."""

    sequences_per_micro_step: int
    skipped_updates: int = 0
    consecutive_skipped_updates: int = 0
    training_seconds: float = 0.0
    """Spent on updates and restarts, over all attempts; evaluation and checkpoints left out."""
    peak_memory_bytes: int = 0
    """The most that any attempt held, up to its last checkpoint."""


class Trainer:
    """Trains `model` in place as `config` says.

    `stop` is asked once a step and answers with a reason to stop, or None. `on_warm_start` is called when the warm
    start is trained and its checkpoint written. Construction picks up the newest checkpoint
    of `checkpoint_folder`; on the CPU the continued run equals an uninterrupted one to the bit.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        training: TokenSequences,
        validation: TokenSequences,
        tracker: Tracker,
        *,
        vocab_size: int,
        checkpoint_folder: Path,
        device: torch.device,
        stop: Callable[[], str | None] = lambda: None,
        on_warm_start: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.device, self.tracker, self.stop = config, device, tracker, stop
        self.on_warm_start = on_warm_start
        self.training, self.validation, self.checkpoint_folder = training, validation, checkpoint_folder
        self.model = model.to(device)
        # Buffers stay fp32: a model that is loaded again computes its rotary frequencies in it.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32)
        self.method = build_method(config)
        self.clock = self.method.clock
        self.factor = learning_rate_factor(config)
        self.warm_start_cost = config.cost(vocab_size, warm_start=True)
        self.method_cost = config.cost(vocab_size)
        self.counters = Counters(
            sequences_per_micro_step=config.trainer.sequences_per_micro_step or config.trainer.sequences_per_step
        )
        self.optimizer = build_optimizer(self.model, config, config.warm_start_learning_rate, warm_start=True)
        self.first_step = 0
        self._durations: deque[float] = deque(maxlen=SMOOTHED_STEPS)
        self._resume()

    # ---------------------------------------------------------------------------------------------- Algorithm 1

    def train(self) -> Evaluation:
        """Train to the end of the budget; return the last validation."""
        settings = self.config.trainer
        self.model.train()
        for step in range(self.first_step, self.clock.total_steps):
            if step % settings.validation_interval_steps == 0:
                self.validate(step)
            stopping = self.stop()
            if stopping or (step > self.first_step and step % settings.checkpoint_interval_steps == 0):
                self.save(step)
            if stopping:
                raise Interrupted(step, stopping)

            if self.on_warm_start is not None and self.clock.warm_start_ends_at(step):
                self.save(step)
                self.on_warm_start()

            began = time.perf_counter()
            if self.clock.warm_start_ends_at(step):
                self.begin_method(step)
            if self.clock.restarts_at(step):
                self.restart(step)
            loss = self.within_memory(lambda: self.forward_backward(step))  # noqa: B023 -- called at once
            gradient_norm = self.update(step, loss)
            self._durations.append(time.perf_counter() - began)
            self.counters.training_seconds += self._durations[-1]
            self.report(step, loss, gradient_norm)

        last = self.validate(self.clock.total_steps)
        if self.first_step < self.clock.total_steps:
            self.save(self.clock.total_steps)
        return last

    def begin_method(self, step: int) -> None:
        """The warm start is over: the method takes the model, with a new optimizer."""
        self.method.begin(self.model)
        self.optimizer = build_optimizer(self.model, self.config, self.config.optimizer.learning_rate)
        if step:
            self.tracker.say(f"step {step}: the warm start ends, {self.config.method.name} begins")

    def restart(self, step: int) -> None:
        """Merge, re-initialise and reset; the schedule ramps up again by itself."""
        number = self.clock.restarts_before(step + 1)
        done = self.method.restart(self.model, self.optimizer, number)
        factor = self.factor(step)
        self.tracker.log(
            step,
            {
                "restart/number": number,
                "restart/relative_update": done.relative_update,
                "restart/rounding_loss": done.rounding_loss,
                "restart/reset_fraction": done.reset_fraction,
                "restart/lr_factor": factor,
            },
        )
        at_rate = "" if factor < 0.01 else f"; the learning rate is at {factor:.0%} here, not near zero"
        self.tracker.say(
            f"step {step}: restart {number}, merged |dW|/|W| = {done.relative_update:.2%} "
            f"(rounding lost {100 * done.rounding_loss:.2g}% of it), reset {done.reset_fraction:.1%} of the factors' "
            f"optimizer state{at_rate}"
        )

    def forward_backward(self, step: int) -> float:
        """Accumulate the gradient of the mean loss over the step's batch; return that loss."""
        settings = self.config.trainer
        inputs_BxT, targets_BxT = self.training.training_batch(step, settings.sequences_per_step, settings.seed)
        if isinstance(self.config.method, LoRAConfig) and self.config.method.dropout > 0:
            torch.manual_seed(keyed_generator(f"dropout/{settings.seed}/{step}").initial_seed())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        micro = self.counters.sequences_per_micro_step
        for inputs, targets in zip(inputs_BxT.split(micro), targets_BxT.split(micro), strict=True):
            with precision_context(settings.precision, self.device):
                summed = summed_cross_entropy(self.model, inputs.to(self.device), targets.to(self.device))
            (summed / targets_BxT.numel()).backward()
            total += summed.detach().double()
        return total.item() / targets_BxT.numel()

    def update(self, step: int, loss: float) -> float:
        """Clip, set the learning rate and step; return the gradient norm. A non-finite update is skipped and counted.

        The clock is a function of the step, so a skipped update leaves it in phase.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        gradient_norm = norm.item()
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            if self.config.optimizer.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.max_grad_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_learning_rate"] * self.factor(step)
            self.optimizer.step()
            self.counters.consecutive_skipped_updates = 0
        else:
            self._skip(step, loss, gradient_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return gradient_norm

    # ------------------------------------------------------------------------------------------ what goes wrong

    def _skip(self, step: int, loss: float, gradient_norm: float) -> None:
        counters, limit = self.counters, self.config.trainer.max_consecutive_skipped_updates
        counters.skipped_updates += 1
        counters.consecutive_skipped_updates += 1
        self.tracker.say(f"step {step}: loss {loss}, gradient norm {gradient_norm}; the update is skipped")
        if counters.consecutive_skipped_updates >= limit:
            raise TrainingError(
                f"the run diverged: {limit} updates in a row, up to step {step}, had a non-finite loss or gradient; "
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps or take trainer.precision=fp32"
            )

    def within_memory(self, action: Callable[[], T]) -> T:
        """The result of `action`, tried again with half as many sequences at a time whenever memory runs out."""
        while True:
            try:
                return action()
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._halve_micro_step()

    def _halve_micro_step(self) -> None:
        size, whole = self.counters.sequences_per_micro_step, self.config.trainer.sequences_per_step
        if size == 1:
            raise TrainingError(
                f"out of memory on {self.device} with one sequence of {self.config.data.sequence_length_tokens} tokens "
                "at a time; take a smaller model, shorter sequences or trainer.precision=bf16"
            )
        smaller = next(n for n in range(size // 2, 0, -1) if whole % n == 0)
        self.counters.sequences_per_micro_step = smaller
        self.tracker.say(
            f"out of memory on {self.device} with {size} sequences at a time; going on with "
            f"trainer.sequences_per_micro_step={smaller} (the batch of an update stays {whole})"
        )

    # ------------------------------------------------------------------------------------- what is told and kept

    def progress_metrics(self, step: int) -> dict[str, float]:
        """How far `step` updates have come, on the axes that runs are compared on."""
        warm = min(step, self.clock.warm_start_steps)
        tokens = self.config.tokens_per_step
        return {
            "progress/tokens": step * tokens,
            "progress/flops": warm * self.warm_start_cost.flops_per_update(tokens)
            + (step - warm) * self.method_cost.flops_per_update(tokens)
            + self.clock.restarts_before(step) * self.method_cost.merge_flops,
        }

    def report(self, step: int, loss: float, gradient_norm: float) -> None:
        """Tell the update of `step`; rows are numbered by the updates done."""
        done, learning_rate = step + 1, self.optimizer.param_groups[0]["base_learning_rate"] * self.factor(step)
        rate = self.config.tokens_per_step * len(self._durations) / sum(self._durations)
        self.tracker.progress(
            Progress(
                step=done,
                total_steps=self.clock.total_steps,
                loss=loss,
                learning_rate=learning_rate,
                tokens_per_second=rate,
                next_restart=self.clock.next_restart(step),
            )
        )
        if done % self.config.trainer.log_interval_steps == 0 or done == self.clock.total_steps:
            self.tracker.log(
                done,
                {
                    MICRO_STEP: self.counters.sequences_per_micro_step,
                    "train/loss": loss,
                    "train/lr": learning_rate,
                    "train/grad_norm": gradient_norm,
                    "train/skipped_updates": self.counters.skipped_updates,
                    **self.progress_metrics(done),
                    "perf/tokens_per_second": rate,
                    "perf/training_seconds": self.counters.training_seconds,
                },
            )

    def validate(self, step: int) -> Evaluation:
        """Evaluate on the validation set after `step` updates."""
        result = self.within_memory(
            lambda: evaluate(
                self.model,
                self.validation,
                sequences_per_batch=self.counters.sequences_per_micro_step,
                precision=self.config.trainer.precision,
                device=self.device,
            )
        )
        self.tracker.log(
            step,
            {
                MICRO_STEP: self.counters.sequences_per_micro_step,
                "eval/loss": result.loss,
                "eval/perplexity": result.perplexity,
                **self.progress_metrics(step),
            },
        )
        if step:
            self.tracker.say(f"step {step}: validation perplexity {result.perplexity:.2f} (loss {result.loss:.4f})")
        return result

    def save(self, step: int) -> None:
        """Write the state before the update of `step`, metrics first."""
        self.tracker.flush()
        self.counters.peak_memory_bytes = max(self.counters.peak_memory_bytes, peak_memory_bytes(self.device))
        state: dict[str, Any] = {
            "step": step,
            "config_hash": self.config.config_hash,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": asdict(self.counters),
        }
        checkpoint.save(self.checkpoint_folder, step, state)

    def _resume(self) -> None:
        """Take over the newest checkpoint, if there is one."""
        state = checkpoint.load_latest(self.checkpoint_folder, self.tracker.say)
        if state is None:
            return
        if state["config_hash"] != self.config.config_hash:
            raise TrainingError(
                f"the checkpoint in {self.checkpoint_folder} belongs to config {state['config_hash']}, this run is "
                f"{self.config.config_hash}; remove the folder or take another runs_dir"
            )
        self.first_step = state["step"]
        # The method begins inside the step at which the warm start ends, so that step's checkpoint is still without it.
        if self.first_step > self.clock.warm_start_steps:
            self.method.begin(self.model)
            self.optimizer = build_optimizer(self.model, self.config, self.config.optimizer.learning_rate)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        configured = self.counters.sequences_per_micro_step
        self.counters = Counters(**state["counters"])
        # What ran out of memory once would do so again; what is asked to be smaller shall be.
        self.counters.sequences_per_micro_step = min(configured, self.counters.sequences_per_micro_step)
        self.tracker.say(f"resumed at step {self.first_step} of {self.clock.total_steps}")


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU allocator raises a RuntimeError that only its text tells."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
