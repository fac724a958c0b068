"""The training loop: Algorithm 1 of Lialin et al. 2023, with a warm start before it and a checkpoint at any step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from relora.common.errors import Interrupted, Stopped, TrainingError
from relora.config import identity
from relora.config.run import RunConfig
from relora.core.inbackward import UpdateInBackward, step_where_finite
from relora.data.sequences import TokenSequences
from relora.methods.base import warm_start_optimizer
from relora.runs import checkpoint, spent
from relora.runs.metrics import MICRO_STEP, Progress, Tracker
from relora.training.device_memory import fits, peak_memory_bytes
from relora.training.distributed import World, digest
from relora.training.evaluate import ALONE, Evaluation, evaluate
from relora.training.learning_rate import learning_rate_factor
from relora.training.microsteps import MicroSteps
from relora.training.model import compile_layers
from relora.training.underway import UnderWay, Update

MICRO_STEP_KEY = "sequences_per_micro_step"


@dataclass(kw_only=True)
class Counters:
    """What a run has to remember besides tensors."""

    skipped_updates: int = 0
    consecutive_skipped_updates: int = 0
    training_seconds: float = 0.0
    """Spent on updates and restarts, over all attempts, as UnderWay counts them."""
    spent: list[dict[str, Any]] = field(default_factory=list)
    """The training seconds by machine and switches (relora.runs.spent); a fork takes those of its warm start."""
    peak_memory_bytes: int = 0
    """The most that any attempt held, up to its last checkpoint."""


class Trainer:
    """Trains `model` in place as `config` says.

    `stop` is asked before each update and each batch of a validation: a reason to stop, or None. `on_warm_start` is
    called when the warm start is trained and its checkpoint written. Construction picks up the newest checkpoint
    of `checkpoint_folder`; on the CPU the continued run equals an uninterrupted one of as many ranks to the bit.

    Every rank of `world` makes a Trainer of its own with equal arguments, but for `tracker` and `stop`, and is equal to
    the others to the bit after every update; rank 0 writes the checkpoints. A wish to stop, on any rank, stops all at
    the same step. `machine` is what the run's record says of this one (relora.runs.spent.MACHINE). Raises RunError
    where the ranks cannot share a batch evenly.
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
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.device, self.tracker, self.stop = config, device, tracker, stop
        self.on_warm_start, self.world, self.machine = on_warm_start, world, machine or {}
        self.training, self.validation, self.checkpoint_folder = training, validation, checkpoint_folder
        self.model = model.to(device)
        # Buffers stay fp32: a model that is loaded again computes its rotary frequencies in it.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32)
        if config.trainer.compile:
            compile_layers(model)
        self.method, self.clock = config.method, config.clock
        self.factor = learning_rate_factor(config)
        self.warm_start_cost = config.cost(vocab_size, warm_start=True)
        self.method_cost = config.cost(vocab_size)
        self.micro = MicroSteps(
            config,
            model,
            training,
            device=device,
            world=world,
            log_line=tracker.log_line,
            on_smaller=self._refresh,
        )
        self.counters = Counters()
        self.in_backward: UpdateInBackward | None = None
        self.has_begun = False
        self._use_optimizer(warm_start_optimizer(self.model, config))
        self.first_step = 0
        self.under_way = UnderWay(device)
        self._stop_reason: str | None = None
        self._stop_requested = False
        self._resume()
        self._refresh()
        self.check_ranks(self.first_step)

    # ---------------------------------------------------------------------------------------------- Algorithm 1

    def train(self) -> Evaluation:
        """Train to the end of the budget; return the last validation."""
        try:
            return self._train()
        finally:
            if self.in_backward is not None:
                self.in_backward.remove()

    def _train(self) -> Evaluation:
        settings, validation_interval_steps = self.config.trainer, self.config.validation_interval_steps
        self.model.train()
        for step in range(self.first_step, self.clock.total_steps):
            if stopping := self.stopping():  # before a validation, which may take longer than there is time
                self.stop_before(step, stopping)
            if step % validation_interval_steps == 0:
                self.validate(step)
            if step > self.first_step and step % settings.checkpoint_interval_steps == 0:
                self.save(step)

            if self.on_warm_start is not None and self.clock.warm_start_ends_at(step):
                self.save(step)
                self.on_warm_start()

            seconds_before = self.under_way.seconds
            with self.under_way.making():
                if self.clock.warm_start_ends_at(step):
                    self.begin_method(step)
                if self.clock.restarts_at(step):
                    self.restart(step)
                self.set_learning_rate(step)
                loss = self.forward_backward(step)
                self.update(step, loss)
                self._refresh()
            self.report_updates(all_but=self.under_way.ahead)
            if settings.compile and step in (self.first_step, self.clock.warm_start_steps):
                took = self.under_way.seconds - seconds_before
                self.tracker.log_line(f"step {step}: compiled; this update took {took:.1f} s")

        last = self.validate(self.clock.total_steps)
        if self.first_step < self.clock.total_steps:
            self.save(self.clock.total_steps)
        return last

    def begin_method(self, step: int) -> None:
        """The warm start is over: the method takes the model, with a new optimizer."""
        self.report_updates()
        self._begin()
        self._refresh()
        self.check_ranks(step)
        if step:
            self.tracker.log_line(f"step {step}: the warm start ends, {self.config.method.name} begins")

    def restart(self, step: int) -> None:
        """Merge, re-initialise and reset; the schedule ramps up again by itself."""
        self.report_updates()
        number = self.clock.restarts_before(step + 1)
        done = self.method.restart(self.model, self.optimizer, self.config, number)
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
        self.tracker.log_line(
            f"step {step}: restart {number}, merged |dW|/|W| = {done.relative_update:.2%} "
            f"(rounding lost {100 * done.rounding_loss:.2g}% of it), reset {done.reset_fraction:.1%} of the factors' "
            f"optimizer state{at_rate}"
        )

    def set_learning_rate(self, step: int) -> None:
        """What the schedule has for the update of `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_learning_rate"] * self.factor(step)

    def forward_backward(self, step: int) -> Tensor:
        """Accumulate the gradient of the mean loss over the step's batch, of all ranks; return that loss."""
        loss, self._stop_requested = self.micro.within_memory(
            lambda: self.micro.gradient(step, self._parameters, stop_requested=self._stop_reason is not None)
        )
        return loss

    def update(self, step: int, loss: Tensor) -> None:
        """Clip and step; where loss or gradient is not finite, the update is skipped.

        After an update in backward nothing is left to do; it skipped the parameters whose own gradient is not finite.
        The clock is a function of the step, so a skipped update leaves it in phase.
        """
        if self.in_backward is not None:
            norm = self.in_backward.pop_norm()
        else:
            if self.has_begun:
                self.method.before_update(self.model, self.config, step)
            parameters = self._parameters
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self.config.optimizer.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.max_grad_norm, norm)
            step_where_finite(self.optimizer, norm.isfinite() & loss.isfinite())
            self.optimizer.zero_grad(set_to_none=True)

        if self.has_begun:
            self.method.after_update(self.model, self.config, step)
        self.under_way.add(step, loss, norm, self.optimizer.param_groups[0]["lr"])

    def _begin(self) -> None:
        """The method's factors, and its optimizer in place of the warm start's."""
        self.method.begin(self.model, self.config)
        self.has_begun = True
        self._use_optimizer(self.method.build_optimizer(self.model, self.config))

    def _use_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.in_backward is not None:
            self.in_backward.remove()
        self.optimizer = optimizer
        self.micro.make_room(self._parameters)
        self.in_backward = UpdateInBackward(optimizer) if self.config.trainer.update_in_backward else None

    def _refresh(self) -> None:
        """Let the method prepare the forward pass, after the weights or the size of a micro-step changed."""
        if not self.has_begun:
            return
        sizes = {"sequences_per_micro_step": self.micro.sequences_per_micro_step, "micro_steps": self.micro.count}
        if not fits(lambda: self.method.refresh(self.model, self.config, **sizes)):
            options = [*self.method.memory_options, "a smaller model", "trainer.precision=bf16"]
            raise TrainingError(
                f"out of memory on {self.device} while the method prepared the forward pass; take {', '.join(options)}"
            )

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """What is trained, in the optimizer's order: the same on all ranks and in every attempt."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def stopping(self) -> str | None:
        """Why to stop before this update. Several ranks told each other in the sum of the last one."""
        self._stop_reason = self.stop()
        if self.world.size == 1:
            return self._stop_reason
        return (self._stop_reason or "another rank was asked to stop") if self._stop_requested else None

    # ------------------------------------------------------------------------------------------ what goes wrong

    def report_updates(self, *, all_but: int = 0) -> None:
        """Wait for the updates that have been made, but the newest `all_but`; count and report them."""
        finished = self.under_way.finished(all_but=all_but)
        if finished:
            self._charge(warm_start=finished[-1].step < self.clock.warm_start_steps)
        for update in finished:
            loss, gradient_norm = update.loss_and_norm.tolist()
            if math.isfinite(loss) and math.isfinite(gradient_norm):
                self.counters.consecutive_skipped_updates = 0
            else:
                self._skipped(update.step, loss, gradient_norm)
            self.report(update, loss, gradient_norm)

    def _charge(self, *, warm_start: bool) -> None:
        """Count the seconds up to now, under the machine and the switches that they were spent under."""
        size = self.micro.sequences_per_micro_step
        under = spent.conditions(self.config, self.machine, sequences_per_micro_step=size, warm_start=warm_start)
        now = self.under_way.seconds
        spent.spend(self.counters.spent, under, now - self.counters.training_seconds)
        self.counters.training_seconds = now

    def _skipped(self, step: int, loss: float, gradient_norm: float) -> None:
        counters, limit = self.counters, self.config.trainer.max_consecutive_skipped_updates
        counters.skipped_updates += 1
        counters.consecutive_skipped_updates += 1
        done = "it reaches none of the parameters concerned" if self.in_backward else "the update is skipped"
        self.tracker.log_line(f"step {step}: loss {loss}, gradient norm {gradient_norm}; {done}")
        if counters.consecutive_skipped_updates >= limit:
            raise TrainingError(
                f"the run diverged: {limit} updates in a row, up to step {step}, had a non-finite loss or gradient; "
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps or take trainer.precision=fp32"
            )

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

    def report(self, update: Update, loss: float, gradient_norm: float) -> None:
        """Tell of one update; rows are numbered by the updates done."""
        done = update.step + 1
        rate = self.config.tokens_per_step * self.under_way.updates_per_second
        self.tracker.progress(
            Progress(
                step=done,
                total_steps=self.clock.total_steps,
                loss=loss,
                learning_rate=update.learning_rate,
                tokens_per_second=rate,
                next_restart=self.clock.next_restart(update.step),
            )
        )
        if done % self.config.trainer.log_interval_steps == 0 or done == self.clock.total_steps:
            self.tracker.log(
                done,
                {
                    MICRO_STEP: self.micro.sequences_per_micro_step,
                    "train/loss": loss,
                    "train/lr": update.learning_rate,
                    "train/grad_norm": gradient_norm,
                    "train/skipped_updates": self.counters.skipped_updates,
                    **self.progress_metrics(done),
                    "perf/tokens_per_second": rate,
                    "perf/training_seconds": self.counters.training_seconds,
                },
            )

    def validate(self, step: int) -> Evaluation:
        """Evaluate on the validation set after `step` updates; a run that is asked to stop here does so again later."""
        self.report_updates()
        try:
            result = self.micro.within_memory(
                lambda: evaluate(
                    self.model,
                    self.validation,
                    sequences_per_batch=self.micro.sequences_per_micro_step,
                    precision=self.config.trainer.precision,
                    device=self.device,
                    world=self.world,
                    stop=self.stop,
                )
            )
        except Stopped as reason:
            self.stop_before(step, str(reason))
        self.tracker.log(
            step,
            {
                MICRO_STEP: self.micro.sequences_per_micro_step,
                "eval/loss": result.loss,
                "eval/perplexity": result.perplexity,
                **self.progress_metrics(step),
                "perf/training_seconds": self.counters.training_seconds,
            },
        )
        if step:
            self.tracker.log_line(
                f"step {step}: validation perplexity {result.perplexity:.2f} (loss {result.loss:.4f})"
            )
        return result

    def stop_before(self, step: int, reason: str) -> NoReturn:
        """Save the state before the update of `step`, on all ranks, and raise Interrupted."""
        self.save(step)
        raise Interrupted(step, reason)

    def save(self, step: int) -> None:
        """Write the state before the update of `step`, metrics first; all ranks wait until it is written."""
        self.report_updates()
        self.check_ranks(step)
        if self.world.is_first:
            self._write(step)
        self.world.wait_for_first()

    def _write(self, step: int) -> None:
        self.tracker.flush()
        self.counters.peak_memory_bytes = max(self.counters.peak_memory_bytes, peak_memory_bytes(self.device))
        state: dict[str, Any] = {
            "step": step,
            "config_hash": self.config.config_hash,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": {**asdict(self.counters), MICRO_STEP_KEY: self.micro.sequences_per_micro_step},
        }
        checkpoint.save(self.checkpoint_folder, step, state)

    def _resume(self) -> None:
        """Take over the newest checkpoint, if there is one."""
        state = checkpoint.load_latest(self.checkpoint_folder, self.tracker.log_line)
        if state is None:
            return
        if state["config_hash"] not in identity.hashes(self.config):
            raise TrainingError(
                f"the checkpoint in {self.checkpoint_folder} belongs to config {state['config_hash']}, this run is "
                f"{self.config.config_hash}; remove the folder or take another runs_dir"
            )
        self.first_step = state["step"]
        # The method begins inside the step at which the warm start ends, so that step's checkpoint is still without it.
        if self.first_step > self.clock.warm_start_steps:
            self._begin()
        self.model.load_state_dict(state["model"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise TrainingError(
                f"the checkpoint of step {self.first_step} was written by another version of relora, whose optimizer "
                f"had other parameter groups ({error}); finish the run with that version, or remove "
                f"{self.checkpoint_folder} to start anew"
            ) from error
        # What ran out of memory once would do so again; what is asked to be smaller shall be; ranks may be more now.
        self.micro.at_most(state["counters"].pop(MICRO_STEP_KEY))
        self.counters = Counters(**state["counters"])
        self.under_way.go_on_from(self.counters.training_seconds)
        self.tracker.log_line(f"resumed at step {self.first_step} of {self.clock.total_steps}")
