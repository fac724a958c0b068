"""The learning-rate factor of each step of a run, including the warm start."""

from collections.abc import Callable

from relora.config.run import RunConfig
from relora.core.schedule import JaggedCosine, RestartClock


def learning_rate_factor(config: RunConfig) -> Callable[[int], float]:
    """Return a function from a step to the factor of the base learning rates at that step.

    The warm start is the beginning of a full-rank run with the same budget. Its schedule is a cosine over all steps,
    which stops where the warm start ends. After it, the method has its own schedule over the remaining steps.
    """
    schedule, clock = config.schedule, config.clock
    full_rank = JaggedCosine(
        RestartClock(total_steps=clock.total_steps),
        warmup_steps=schedule.warmup_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )
    method = JaggedCosine(
        clock,
        warmup_steps=schedule.warmup_steps,
        restart_warmup_steps=schedule.restart_warmup_steps,
        min_lr_ratio=schedule.min_lr_ratio,
    )
    return lambda step: full_rank(step) if step < clock.warm_start_steps else method(step)
