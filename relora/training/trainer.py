"""The training loop: Algorithm 1 of Lialin et al. 2023, after an optional warm start, with a checkpoint at any step."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from relora.common.errors import Interrupted, Stopped, TrainingError
from relora.config import identity
from relora.config.learning_rate import learning_rate_factor
from relora.config.run import RunConfig
from relora.core.inbackward import UpdateInBackward, step_where_finite
from relora.data.sequences import Sequences
from relora.methods.base import warm_start_optimizer
from relora.runs import checkpoint
from relora.runs.metrics import MICRO_STEP, Tracker
from relora.training.device_memory import fits, peak_memory_bytes
from relora.training.distributed import World, digest
from relora.training.evaluate import SINGLE_PROCESS, Evaluation, evaluate
from relora.training.microsteps import MicroSteps
from relora.training.model import compile_layers
from relora.training.reporting import Counters, Reporter
from relora.training.underway import UnderWay

MICRO_STEP_KEY = "sequences_per_micro_step"


class Trainer:
    """Trains one model in place, as the config says.

    With several processes each has its own Trainer. Their weights are equal to the bit after every step, and rank 0
    writes the checkpoints. When one of them is asked to stop, all stop at the same step.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        training: Sequences,
        validation: Sequences,
        tracker: Tracker,
        *,
        vocab_size: int,
        checkpoint_folder: Path,
        device: torch.device,
        stop: Callable[[], str | None] = lambda: None,
        on_warm_start: Callable[[], None] | None = None,
        world: World = SINGLE_PROCESS,
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        """Create the trainer and load the newest checkpoint, if there is one.

        On the CPU, a resumed run equals an uninterrupted run of the same world size to the bit.

        Args:
            config: The run.
            model: A model with its initial weights. It is moved to `device` and trained in place.
            training: The training sequences.
            validation: The validation sequences.
            tracker: Receives metrics and log lines. Each process has its own.
            vocab_size: Rows of the embedding, for the FLOPs.
            checkpoint_folder: Where checkpoints are written and found.
            device: Where to train.
            stop: Called before each step and each batch of a validation. Returns the reason to stop, or None.
            on_warm_start: Called when the warm start is trained and its checkpoint is written.
            world: The processes that train together.
            machine: This machine's description in the run's record (relora.runs.spent.MACHINE).

        Raises:
            RunError: The processes cannot share a batch evenly.
            TrainingError: The checkpoint belongs to another config or to another version.
        """
        self.config, self.device, self.tracker, self.stop = config, device, tracker, stop
        self.on_warm_start, self.world = on_warm_start, world
        self.training, self.validation, self.checkpoint_folder = training, validation, checkpoint_folder
        self.model = model.to(device)
        # Buffers stay fp32: a model that is loaded again computes its rotary frequencies in it.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32)
        if config.trainer.compile:
            compile_layers(model)
        self.method, self.clock = config.method, config.clock
        self.factor = learning_rate_factor(config)
        self.micro = MicroSteps(
            config,
            model,
            training,
            device=device,
            world=world,
            log_line=tracker.log_line,
            on_smaller=self.refresh,
        )
        self.reporter = Reporter(
            config, tracker, vocab_size=vocab_size, machine=machine or {}, target_tokens=self.micro.target_tokens
        )
        self.in_backward: UpdateInBackward | None = None
        self.has_begun = False
        self._use_optimizer(warm_start_optimizer(self.model, config))
        self.first_step = 0
        self.under_way = UnderWay(device)
        self._stop_reason: str | None = None
        self._stop_requested = False
        if not self._resume():
            self.micro.fit(vocab_size)
        self.refresh()
        self.check_ranks(self.first_step)

    @property
    def counters(self) -> Counters:
        """What was counted so far; a checkpoint keeps it."""
        return self.reporter.counters

    # ---------------------------------------------------------------------------------------------- Algorithm 1

    def train(self) -> Evaluation:
        """Train to the end of the budget and return the last validation."""
        try:
            return self._train()
        finally:
            if self.in_backward is not None:
                self.in_backward.remove()

    def _train(self) -> Evaluation:
        settings, validation_interval_steps = self.config.trainer, self.config.validation_interval_steps
        self.model.train()
        for step in range(self.first_step, self.clock.total_steps):
            if stopping := self.stopping():  # before a validation: it may take longer than the time that is left
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
                self.refresh()
            self.report_updates(all_but=self.under_way.ahead)
            if settings.compile and step in (self.first_step, self.clock.warm_start_steps):
                took = self.under_way.seconds - seconds_before
                self.tracker.log_line(f"step {step}: compiled; this update took {took:.1f} s")

        last = self.validate(self.clock.total_steps)
        if self.first_step < self.clock.total_steps:
            self.save(self.clock.total_steps)
        return last

    def begin_method(self, step: int) -> None:
        """End the warm start: the method changes the model and brings its own optimizer."""
        self.report_updates()
        done = self._begin()
        self.refresh()
        self.check_ranks(step)
        if step or done:
            ends = "the warm start ends, " if step else ""
            said = f": {done}" if done else ""
            self.tracker.log_line(f"step {step}: {ends}{self.config.method.name} begins{said}")

    def restart(self, step: int) -> None:
        """Merge, re-initialise and reset. The schedule ramps the learning rate up again by itself."""
        self.report_updates()
        number = self.clock.restarts_before(step + 1)
        done = self.method.restart(self.model, self.optimizer, self.config, number)
        self.refresh()
        self.check_ranks(step)
        factor = self.factor(step)
        self.tracker.log(
            step,
            {
                "restart/number": number,
                **{f"restart/{name}": value for name, value in done.metrics.items()},
                "restart/lr_factor": factor,
            },
        )
        at_rate = "" if factor < 0.01 else f"; the learning rate is at {factor:.0%} here, not near zero"
        self.tracker.log_line(f"step {step}: restart {number}, {done.message}{at_rate}")

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rate of each parameter group for `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_learning_rate"] * self.factor(step)

    def forward_backward(self, step: int) -> Tensor:
        """Accumulate the gradient of the mean loss over the whole batch, of all processes, and return the loss."""
        loss, self._stop_requested = self.micro.within_memory(
            lambda: self.micro.gradient(step, self._parameters, stop_requested=self._stop_reason is not None)
        )
        return loss

    def update(self, step: int, loss: Tensor) -> None:
        """Clip the gradients and make the optimizer step. Skip it where the loss or a gradient is not finite.

        With trainer.update_in_backward the step was made during the backward pass. It skipped the parameters whose
        gradient is not finite. The clock depends on the step number only, so a skipped update leaves it in phase.
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
            for message in self.method.messages(self.model, self.optimizer):
                self.tracker.log_line(f"step {step}: {message}")
        self.under_way.add(step, loss, norm, self.optimizer.param_groups[0]["lr"])

    def _begin(self) -> str | None:
        """Let the method change the model, and replace the warm start's optimizer by the method's."""
        done: list[str | None] = []
        try:
            fitted = fits(lambda: done.append(self.method.begin(self.model, self.config)))
        except ValueError as error:
            raise TrainingError(
                f"method={self.config.method.name} cannot begin: {error}; if the warm start diverged, lower "
                "method.warm_start_learning_rate"
            ) from error
        if not fitted:
            raise TrainingError(
                f"out of memory on {self.device} while method={self.config.method.name} changed the model; use a "
                "smaller model or trainer.precision=bf16"
            )
        self.has_begun = True
        self._use_optimizer(self.method.build_optimizer(self.model, self.config))
        return done[0]

    def _use_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.in_backward is not None:
            self.in_backward.remove()
        self.optimizer = optimizer
        self.micro.make_room(self._parameters)
        self.in_backward = UpdateInBackward(optimizer) if self.config.trainer.update_in_backward else None

    def refresh(self) -> None:
        """Let the method prepare the forward pass after the weights or the micro-step size changed."""
        if not self.has_begun:
            return
        sizes = {"sequences_per_micro_step": self.micro.sequences_per_micro_step, "micro_steps": self.micro.count}
        if not fits(lambda: self.method.refresh(self.model, self.config, **sizes)):
            options = [*self.method.memory_options, "a smaller model", "trainer.precision=bf16"]
            raise TrainingError(
                f"out of memory on {self.device} while the method prepared the forward pass; use {', '.join(options)}"
            )

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """The trained parameters in the optimizer's order, which is the same in all processes and attempts."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def stopping(self) -> str | None:
        """Return the reason to stop before this step, or None.

        Several processes share their requests to stop in the sum of the last step's gradients.
        """
        self._stop_reason = self.stop()
        if self.world.size == 1:
            return self._stop_reason
        return (self._stop_reason or "another rank was asked to stop") if self._stop_requested else None

    # ----------------------------------------------------------------------------- reports, validation, checkpoints

    def report_updates(self, *, all_but: int = 0) -> None:
        """Wait for the optimizer steps under way, except the newest `all_but`, and report them."""
        finished = self.under_way.finished(all_but=all_but)
        self.reporter.report(finished, self.under_way, sequences_per_micro_step=self.micro.sequences_per_micro_step)

    def check_ranks(self, step: int) -> None:
        """Raise TrainingError, in every process, unless all are at `step` and have the same weights."""
        if self.world.size == 1:
            return
        first, *others = self.world.gathered([step, digest(self.model.parameters())])
        unequal = [rank for rank, found in enumerate(others, start=1) if found != first]
        if unequal:
            raise TrainingError(
                f"step {step}: the weights of rank {', '.join(map(str, unequal))} differ from those of rank 0, and "
                "they must be equal to the bit; give all processes the same kind of machine, number of threads, "
                "versions of libraries and runs_dir, and continue from the newest checkpoint"
            )

    def validate(self, step: int) -> Evaluation:
        """Evaluate on the validation set after `step` steps. A run that stops during a validation repeats it later."""
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
                **self.reporter.progress_metrics(step),
                "perf/training_seconds": self.counters.training_seconds,
            },
        )
        if step:
            self.tracker.log_line(
                f"step {step}: validation perplexity {result.perplexity:.2f} (loss {result.loss:.4f})"
            )
        return result

    def stop_before(self, step: int, reason: str) -> NoReturn:
        """Save the state before `step` and raise Interrupted, in all processes."""
        self.save(step)
        raise Interrupted(step, reason)

    def save(self, step: int) -> None:
        """Write the metrics, then the state before `step`. All processes wait until it is written."""
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

    def _resume(self) -> bool:
        """Load the newest checkpoint, if there is one. Return whether it has the number of sequences at a time.

        A run goes on with that number, whatever memory is free now, because other micro-steps round differently.
        """
        state = checkpoint.load_latest(self.checkpoint_folder, self.tracker.log_line)
        if state is None:
            return False
        if state["config_hash"] not in identity.hashes(self.config):
            raise TrainingError(
                f"the checkpoint in {self.checkpoint_folder} belongs to config {state['config_hash']}, this run is "
                f"{self.config.config_hash}; remove the folder or use another runs_dir"
            )
        self.first_step = state["step"]
        # The method begins inside the step at which the warm start ends: the checkpoint of that step is without it.
        if self.first_step > self.clock.warm_start_steps:
            self._begin()
        self.model.load_state_dict(state["model"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise TrainingError(
                f"the checkpoint of step {self.first_step} was written by another version of relora, whose optimizer "
                f"had other parameter groups ({error}); finish the run with that version, or remove "
                f"{self.checkpoint_folder} to start again"
            ) from error
        sequences_at_a_time = state["counters"].pop(MICRO_STEP_KEY)
        if sequences_at_a_time is not None:
            # A size that ran out of memory would do so again. The config or a larger world may ask for a smaller one.
            self.micro.at_most(sequences_at_a_time)
        # Checkpoints of earlier versions have no count: each of their steps predicted all its tokens.
        state["counters"].setdefault("tokens", self.first_step * self.config.tokens_per_step)
        self.reporter.counters = Counters(**state["counters"])
        self.under_way.resume_from(self.counters.training_seconds)
        self.tracker.log_line(f"resumed at step {self.first_step} of {self.clock.total_steps}")
        return sequences_at_a_time is not None
