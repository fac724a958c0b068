"""The learning-rate factor of every step of a run, warm start included."""

from collections.abc import Callable

from relora.config.run import RunConfig
from relora.core.schedule import JaggedCosine, RestartClock


def learning_rate_factor(config: RunConfig) -> Callable[[int], float]:
    """Step -> factor of the base learning rates, for the whole run.

    The warm start is the beginning of a full-rank run of the same budget: a cosine over all steps, left where the
    warm start ends. The method then has a schedule of its own over the remaining steps.
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
