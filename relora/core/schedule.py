"""The restart clock of a ReLoRA run and its learning-rate factor: pure functions of the step number.

Nothing here holds state. A resumed run, a skipped update or a second replica therefore cannot be out of phase.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RestartClock:
    """The clock that says when the low-rank phase begins and when it restarts.

    Steps are numbered from 0. The first `warm_start_steps` steps train at full rank. The low-rank phase has its own
    time, t = step - warm_start_steps. It restarts at every t = k * reset_interval_steps, k >= 1, up to the last step
    (Lialin et al. 2023, Algorithm 1).

    Args:
        total_steps: Optimizer steps of the whole run, warm start included.
        reset_interval_steps: Steps between two restarts. None means no restarts: plain LoRA.
        warm_start_steps: Steps at full rank before the low-rank phase.

    Raises:
        ValueError: The low-rank phase is empty, `warm_start_steps` is negative or the interval is not positive.
    """

    total_steps: int
    reset_interval_steps: int | None = None
    warm_start_steps: int = 0

    def __post_init__(self) -> None:
        if self.warm_start_steps < 0 or self.warm_start_steps >= self.total_steps:
            raise ValueError(
                f"warm_start_steps={self.warm_start_steps} must be at least 0 and below total_steps={self.total_steps}"
            )
        if self.reset_interval_steps is not None and self.reset_interval_steps < 1:
            raise ValueError(f"reset_interval_steps={self.reset_interval_steps} must be at least 1 (None: no restarts)")

    @property
    def low_rank_steps(self) -> int:
        """T: the number of steps after the warm start."""
        return self.total_steps - self.warm_start_steps

    def warm_start_ends_at(self, step: int) -> bool:
        """Whether the full-rank warm start ends, and the low-rank phase begins, directly before `step`."""
        return step == self.warm_start_steps

    def restarts_at(self, step: int) -> bool:
        """Whether a restart happens directly before `step`."""
        t = step - self.warm_start_steps
        return (
            self.reset_interval_steps is not None and 0 < t < self.low_rank_steps and t % self.reset_interval_steps == 0
        )

    def restarts_before(self, step: int) -> int:
        """Count the restarts that belong to the steps 0 .. step - 1. A restart just before `step` is not counted."""
        if self.reset_interval_steps is None:
            return 0
        last_t = min(step, self.total_steps) - 1 - self.warm_start_steps
        return max(last_t, 0) // self.reset_interval_steps

    def next_restart(self, step: int) -> int | None:
        """The first step after `step` that has a restart, or None if no restart is left."""
        if self.reset_interval_steps is None:
            return None
        t = max(step - self.warm_start_steps, 0)
        following = self.warm_start_steps + (t // self.reset_interval_steps + 1) * self.reset_interval_steps
        return following if following < self.total_steps else None


class JaggedCosine:
    """Learning-rate factor of the low-rank phase: a cosine with a linear re-warm-up after every restart.

    The formula (Lialin et al. 2023, section 3.1, "jagged cosine") uses these names: t is the time of the low-rank
    phase, T its length, w0 = `warmup_steps`, C the restart interval, k = t div C, rho = t mod C,
    w = `restart_warmup_steps`, m = `min_lr_ratio`, and

        J(v) = m + (1 - m)/2 * (1 + cos(pi * (v - w0)/(T - w0))).

    The factor is

        t/w0                   for t < w0,
        (rho/w) * J(kC + w)    in a re-warm-up (k >= 1, rho < w),
        J(t)                   elsewhere before T,
        m                      from T on.

    It is 0 at every restart where w > 0. In a re-warm-up that reaches past T, J is taken at T.

    Args:
        clock: Its phase and restarts.
        warmup_steps: Length of the first warm-up.
        restart_warmup_steps: Length of the re-warm-up after each restart.
        min_lr_ratio: The factor at the end, between 0 and 1.

    Raises:
        ValueError: A warm-up does not fit into the phase or the interval, or `min_lr_ratio` is outside [0, 1]. A call
            for a step of the warm start raises it too.
    """

    def __init__(
        self, clock: RestartClock, *, warmup_steps: int, restart_warmup_steps: int = 0, min_lr_ratio: float = 0.1
    ) -> None:
        total, interval = clock.low_rank_steps, clock.reset_interval_steps
        if not 0 <= warmup_steps < total:
            raise ValueError(f"warmup_steps={warmup_steps} must be at least 0 and below the phase's {total} steps")
        if restart_warmup_steps < 0:
            raise ValueError(f"restart_warmup_steps={restart_warmup_steps} must be at least 0")
        if not 0.0 <= min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio={min_lr_ratio} must be between 0 and 1")
        if interval is not None and interval < total:
            for name, value in (("warmup_steps", warmup_steps), ("restart_warmup_steps", restart_warmup_steps)):
                if value > interval:
                    raise ValueError(f"{name}={value} exceeds reset_interval_steps={interval}")
        self.clock = clock
        self.warmup_steps = warmup_steps
        self.restart_warmup_steps = restart_warmup_steps
        self.min_lr_ratio = min_lr_ratio

    def _cosine(self, t: int) -> float:
        progress = (t - self.warmup_steps) / (self.clock.low_rank_steps - self.warmup_steps)
        return self.min_lr_ratio + 0.5 * (1.0 - self.min_lr_ratio) * (1.0 + math.cos(math.pi * progress))

    def __call__(self, step: int) -> float:
        """Return the factor in [0, 1] that multiplies the base learning rate at `step`."""
        t, total = step - self.clock.warm_start_steps, self.clock.low_rank_steps
        if t < 0:
            raise ValueError(f"step={step} lies in the warm start, which ends at {self.clock.warm_start_steps}")
        if t >= total:
            return self.min_lr_ratio
        if t < self.warmup_steps:
            return t / self.warmup_steps
        if self.clock.reset_interval_steps is not None:
            restarts, since = divmod(t, self.clock.reset_interval_steps)
            if restarts >= 1 and since < self.restart_warmup_steps:
                target = min(t - since + self.restart_warmup_steps, total)
                return since / self.restart_warmup_steps * self._cosine(target)
        return self._cosine(t)
