"""The gradient of one update: in micro-steps that fit into memory, and of every rank's share of the batch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from relora.budget.memory import WIDE_BYTES
from relora.common.errors import RunError, TrainingError
from relora.config.run import RunConfig, fitting
from relora.core.lowrank import keyed_generator
from relora.data.sequences import TokenSequences
from relora.training.device_memory import fits
from relora.training.distributed import World, gradient_buffer, raise_unless
from relora.training.model import precision_context, summed_cross_entropy

T = TypeVar("T")


def share(config: RunConfig, world: World) -> int:
    """Sequences of each batch that a rank takes.

    Raises RunError where the ranks cannot share it evenly, or are several and each would update in backward.
    """
    if config.trainer.update_in_backward and world.size > 1:
        raise RunError(
            f"trainer.update_in_backward=true is for one process, and these are {world.size}, which sum their "
            "gradients first; set it to false"
        )
    return world.share(config.trainer.sequences_per_step)


@contextmanager
def added_up_in_fp32(parameters: Iterable[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Inside, backward passes add the gradients of those `parameters` that are narrower than fp32 up in what it yields.

    Added up in bf16, the sum of 64 micro-steps is off by 0.8%, and rounded once at the end by 0.17%. Each gradient is
    freed as soon as it is added.
    """
    sums: dict[nn.Parameter, Tensor] = {}

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert isinstance(parameter, nn.Parameter)
        assert gradient is not None
        if parameter in sums:
            sums[parameter].add_(gradient)
        else:
            sums[parameter] = gradient.float()
        parameter.grad = None

    narrow = (each for each in parameters if each.element_size() < WIDE_BYTES)
    hooks = [parameter.register_post_accumulate_grad_hook(add) for parameter in narrow]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


class MicroSteps:
    """This rank's share of each batch, `sequences_per_micro_step` sequences at a time, fewer when memory runs out.

    Raises RunError as `share` does. `say` tells people, `on_smaller` that the size changed.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        training: TokenSequences,
        *,
        device: torch.device,
        world: World,
        log_line: Callable[[str], None],
        on_smaller: Callable[[], None],
    ) -> None:
        self.config, self.model, self.training = config, model, training
        self.device, self.world, self.log_line, self.on_smaller = device, world, log_line, on_smaller
        self.share = share(config, world)
        self._buffer: Tensor | None = None
        self.sequences_per_micro_step = fitting(self.share, config.trainer.sequences_per_micro_step)

    @property
    def count(self) -> int:
        """Micro-steps of one update."""
        return self.share // self.sequences_per_micro_step

    def at_most(self, sequences: int) -> None:
        """Take no more than `sequences` at a time. Raises TrainingError where the batch must be taken at once."""
        if self.config.trainer.update_in_backward and sequences < self.share:
            raise TrainingError(
                f"up to here this run took {sequences} sequences at a time, and trainer.update_in_backward=true takes "
                f"all {self.share} of a batch at once; set it to false"
            )
        self.sequences_per_micro_step = fitting(self.share, min(sequences, self.sequences_per_micro_step))

    def make_room(self, parameters: Iterable[nn.Parameter]) -> None:
        """Allocate what several ranks send of the gradients of `parameters`, in place of what they sent before.

        Raises TrainingError on all ranks where one of them has no memory for it.
        """
        if self.world.size == 1:
            return
        self._buffer = None
        fitted = fits(lambda: self._allocate(list(parameters)))
        try:
            self.world.sum(torch.zeros(1), fitted=fitted)
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"out of memory on {self.device}, here or on another rank, for the buffer in which the ranks add up "
                f"their gradients; take {', '.join([*self._smaller(), 'a smaller model'])} or a larger GPU"
            ) from None

    def _allocate(self, parameters: list[nn.Parameter]) -> None:
        self._buffer = gradient_buffer(parameters, numbers=2, device=self.device)

    def gradient(self, step: int, parameters: list[nn.Parameter], *, stop_requested: bool) -> tuple[Tensor, bool]:
        """Accumulate the gradient of the mean loss over the batch of `step`, of all ranks.

        Returns that loss, where the model is, and whether any rank has the `wish` (to stop). With several micro-steps
        the sum is in fp32 at least, over the ranks as well, and rounded to the parameters' type once.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with added_up_in_fp32(parameters if self.count > 1 else ()) as wide:
            fitted = fits(lambda: self._accumulate(step, total))
        loss = total / self.config.tokens_per_step
        if self._buffer is None:
            raise_unless(fitted)
        else:
            summed_2 = torch.stack([loss, loss.new_tensor(float(stop_requested))])
            summed_2 = self.world.sum_gradients(parameters, summed_2, self._buffer, fitted=fitted, wide=wide)
            loss, stop_requested = summed_2[0], bool(summed_2[1].item())
        for parameter in list(wide):
            parameter.grad = wide.pop(parameter).to(parameter.dtype)
        return loss, stop_requested

    def _accumulate(self, step: int, total: Tensor) -> None:
        """This rank's share: its part of the gradient, and its summed loss on top of `total`."""
        settings, rank = self.config.trainer, self.world.rank
        inputs_BxT, targets_BxT = self.training.training_batch(
            step, settings.sequences_per_step, settings.seed, rank=rank, world_size=self.world.size
        )
        # What a method draws in a forward pass, as dropout does, is a function of seed, step and rank.
        key = f"dropout/{settings.seed}/{step}" + (f"/{rank}" if rank else "")
        torch.manual_seed(keyed_generator(key).initial_seed())
        size = self.sequences_per_micro_step
        for tokens in zip(inputs_BxT.split(size), targets_BxT.split(size), strict=True):
            inputs, targets = (self._on_device(each) for each in tokens)
            with precision_context(settings.precision, self.device):
                summed = summed_cross_entropy(self.model, inputs, targets, recompute=settings.activation_checkpointing)
            (summed / self.config.tokens_per_step).backward()
            total += summed.detach().double()

    def _on_device(self, tokens: Tensor) -> Tensor:
        """From pinned memory, a GPU takes them while it is busy with what came before."""
        return (
            tokens.contiguous().pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tokens
        )

    def within_memory(self, action: Callable[[], T]) -> T:
        """The result of `action`, tried again with half as many sequences at a time whenever memory runs out.

        `action` raises torch.OutOfMemoryError on all ranks or on none. Raises TrainingError where one sequence is too
        many.
        """
        while True:
            try:
                return action()
            except torch.OutOfMemoryError:
                pass
            self.model.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._halve()

    def _smaller(self) -> list[str]:
        """The options that save memory and are not taken yet."""
        settings = self.config.trainer
        options = [] if settings.activation_checkpointing else ["trainer.activation_checkpointing=true"]
        options += self.config.method.memory_options
        return options if settings.precision == "bf16" else [*options, "trainer.precision=bf16"]

    def _halve(self) -> None:
        size = self.sequences_per_micro_step
        if self.config.trainer.update_in_backward:
            options = [*self._smaller(), "a smaller model", "shorter sequences"]
            raise TrainingError(
                f"out of memory on {self.device} with {size} sequences at a time, and trainer.update_in_backward=true "
                f"takes a batch at once; take {', '.join(options)}, or trainer.update_in_backward=false, which can "
                "take fewer at a time"
            )
        if size == 1:
            raise TrainingError(
                f"out of memory on {self.device} with one sequence of {self.config.data.sequence_length_tokens} tokens "
                f"at a time; take {', '.join([*self._smaller(), 'a smaller model'])} or shorter sequences"
            )
        self.at_most(size // 2)
        self.on_smaller()
        self.log_line(
            f"out of memory on {self.device} with {size} sequences at a time; going on with "
            f"trainer.sequences_per_micro_step={self.sequences_per_micro_step} (the batch of an update stays "
            f"{self.config.trainer.sequences_per_step})"
        )
