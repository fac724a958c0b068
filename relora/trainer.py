"""The training loop: Algorithm 1 of Lialin et al. 2023, with a warm start before it and a checkpoint at any step."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from relora import checkpoint
from relora.config import RunConfig
from relora.data import TokenSequences
from relora.distributed import World, digest
from relora.errors import Interrupted, RunError
from relora.evaluate import ALONE, Evaluation, evaluate
from relora.groups import LoRAConfig
from relora.lowrank import keyed_generator
from relora.methods import build_method, build_optimizer, learning_rate_factor
from relora.metrics import MICRO_STEP, Progress, Tracker
from relora.model import fits, peak_memory_bytes, precision_context, summed_cross_entropy

T = TypeVar("T")

SMOOTHED_STEPS = 20
"""Updates that the shown tokens/s is averaged over."""


class TrainingError(RunError):
    """Training cannot go on."""


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
    of `checkpoint_folder`; on the CPU the continued run equals an uninterrupted one of as many ranks to the bit.

    Every rank of `world` makes a Trainer of its own with equal arguments, but for `tracker` and `stop`, and is equal to
    the others to the bit after every update; rank 0 writes the checkpoints. A wish to stop, on any rank, stops all at
    the same step. Raises RunError where the ranks cannot share a batch evenly.
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
        world: World = ALONE,
    ) -> None:
        self.config, self.device, self.tracker, self.stop = config, device, tracker, stop
        self.on_warm_start, self.world = on_warm_start, world
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
        self.share = world.share(config.trainer.sequences_per_step)
        self.counters = Counters(
            sequences_per_micro_step=self._micro_step(config.trainer.sequences_per_micro_step or self.share)
        )
        self.optimizer = build_optimizer(self.model, config, config.warm_start_learning_rate, warm_start=True)
        self.first_step = 0
        self._durations: deque[float] = deque(maxlen=SMOOTHED_STEPS)
        self._own_wish: str | None = None
        self._wishes = 0.0
        self._resume()
        self._refresh()
        self.check_ranks(self.first_step)

    # ---------------------------------------------------------------------------------------------- Algorithm 1

    def train(self) -> Evaluation:
        """Train to the end of the budget; return the last validation."""
        settings = self.config.trainer
        self.model.train()
        for step in range(self.first_step, self.clock.total_steps):
            if step % settings.validation_interval_steps == 0:
                self.validate(step)
            stopping = self.stopping()
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
            self._refresh()
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
        self._refresh()
        self.check_ranks(step)
        if step:
            self.tracker.say(f"step {step}: the warm start ends, {self.config.method.name} begins")

    def restart(self, step: int) -> None:
        """Merge, re-initialise and reset; the schedule ramps up again by itself."""
        number = self.clock.restarts_before(step + 1)
        done = self.method.restart(self.model, self.optimizer, number)
        self._refresh()
        self.check_ranks(step)
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
        """Accumulate the gradient of the mean loss over the step's batch, of all ranks; return that loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        fitted = fits(lambda: self._accumulate(step, total))
        own = (total.item() / self.config.tokens_per_step, float(self._own_wish is not None))
        loss, self._wishes = self.world.sum_gradients(self._parameters, own, fitted=fitted)
        return loss

    def _accumulate(self, step: int, total: Tensor) -> None:
        """This rank's share: its part of the gradient, and its summed loss on top of `total`."""
        settings, rank = self.config.trainer, self.world.rank
        inputs_BxT, targets_BxT = self.training.training_batch(
            step, settings.sequences_per_step, settings.seed, rank=rank, ranks=self.world.size
        )
        if isinstance(self.config.method, LoRAConfig) and self.config.method.dropout > 0:
            key = f"dropout/{settings.seed}/{step}" + (f"/{rank}" if rank else "")
            torch.manual_seed(keyed_generator(key).initial_seed())
        micro = self.counters.sequences_per_micro_step
        for inputs, targets in zip(inputs_BxT.split(micro), targets_BxT.split(micro), strict=True):
            with precision_context(settings.precision, self.device):
                summed = summed_cross_entropy(self.model, inputs.to(self.device), targets.to(self.device))
            (summed / self.config.tokens_per_step).backward()
            total += summed.detach().double()

    def update(self, step: int, loss: float) -> float:
        """Clip, set the learning rate and step; return the gradient norm. A non-finite update is skipped and counted.

        The clock is a function of the step, so a skipped update leaves it in phase.
        """
        parameters = self._parameters
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

    def _refresh(self) -> None:
        """The weights are others now."""
        micro = self.counters.sequences_per_micro_step
        self.method.refresh(self.model, micro, self.share // micro)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """What is trained, in the optimizer's order: the same on all ranks and in every attempt."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def stopping(self) -> str | None:
        """Why to stop before this update. Several ranks told each other in the sum of the last one."""
        self._own_wish = self.stop()
        if self.world.size == 1:
            return self._own_wish
        return (self._own_wish or "another rank was asked to stop") if self._wishes else None

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
        """The result of `action`, tried again with half as many sequences at a time whenever memory runs out.

        `action` raises torch.OutOfMemoryError on all ranks or on none.
        """
        while True:
            try:
                return action()
            except torch.OutOfMemoryError:
                pass
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._halve_micro_step()

    def _halve_micro_step(self) -> None:
        size = self.counters.sequences_per_micro_step
        if size == 1:
            raise TrainingError(
                f"out of memory on {self.device} with one sequence of {self.config.data.sequence_length_tokens} tokens "
                "at a time; take a smaller model, shorter sequences or trainer.precision=bf16"
            )
        smaller = self.counters.sequences_per_micro_step = self._micro_step(size // 2)
        self._refresh()
        self.tracker.say(
            f"out of memory on {self.device} with {size} sequences at a time; going on with "
            f"trainer.sequences_per_micro_step={smaller} (the batch of an update stays "
            f"{self.config.trainer.sequences_per_step})"
        )

    def _micro_step(self, wanted: int) -> int:
        """The most sequences at a time, up to `wanted`, that divide this rank's share."""
        return next(n for n in range(wanted, 0, -1) if self.share % n == 0)

    def check_ranks(self, step: int) -> None:
        """Raise TrainingError, on every rank, unless all are before the update of `step` with the same weights."""
        if self.world.size == 1:
            return
        first, *others = self.world.gathered([step, digest(self.model.parameters())])
        unequal = [rank for rank, found in enumerate(others, start=1) if found != first]
        if unequal:
            raise TrainingError(
                f"step {step}: the weights of rank {', '.join(map(str, unequal))} are not those of rank 0, and they "
                "must be, to the bit; give all ranks the same kind of machine, number of threads, versions of "
                "libraries and runs_dir, and go on from the newest checkpoint"
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
                world=self.world,
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
        """Write the state before the update of `step`, metrics first; all ranks wait until it is written."""
        self.check_ranks(step)
        if self.world.is_first:
            self._write(step)
        self.world.barrier()

    def _write(self, step: int) -> None:
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
        # What ran out of memory once would do so again; what is asked to be smaller shall be; ranks may be more now.
        least = min(configured, self.counters.sequences_per_micro_step)
        self.counters.sequences_per_micro_step = self._micro_step(least)
        self.tracker.say(f"resumed at step {self.first_step} of {self.clock.total_steps}")
