"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): low-rank factors with restarts.

A restart merges the factors, initialises them again and resets their optimizer state.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from relora.common.checks import MOST_STEPS, at_least, at_most, fraction, one_of
from relora.common.errors import ConfigError
from relora.core.choices import PRUNING_RATIO, RESET_MODES, RESET_MOMENTS
from relora.methods.base import Restart
from relora.methods.lora import LoRA

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig

RESET = "method.optimizer_reset."


@dataclass(kw_only=True, slots=True)
class OptimizerReset:
    """How a restart prunes the optimizer state of the factors (relora.core.reset)."""

    mode: str = "magnitude"
    pruning_ratio: float = PRUNING_RATIO
    moments: str = "joint"
    reset_step: bool = True

    def __post_init__(self) -> None:
        one_of(f"{RESET}mode", self.mode, RESET_MODES)
        one_of(f"{RESET}moments", self.moments, RESET_MOMENTS)
        fraction(f"{RESET}pruning_ratio", self.pruning_ratio)

    @property
    def effective(self) -> "OptimizerReset":
        """The same reset, with the default values in fields that have no effect.

        A pruning ratio of 1 is written as mode "zero". A ratio of 0 prunes nothing.
        """
        mode, ratio = self.mode, self.pruning_ratio
        if mode == "none" or (mode != "zero" and ratio == 0 and not self.reset_step):
            return OptimizerReset(mode="none")
        if mode == "zero" or ratio == 1:
            return OptimizerReset(mode="zero", reset_step=self.reset_step)
        if ratio == 0:
            return OptimizerReset(mode="magnitude", pruning_ratio=0.0)
        return self


@dataclass(kw_only=True, slots=True)
class ReLoRA(LoRA):
    """LoRA that restarts every `reset_interval_steps` steps after the warm start (None: no restarts)."""

    short_names: ClassVar[dict[str, str]] = {
        **LoRA.short_names,
        "method.reset_interval_steps": "interval",
        f"{RESET}mode": "reset",
        f"{RESET}pruning_ratio": "ratio",
    }

    reset_interval_steps: int | None
    optimizer_reset: OptimizerReset = field(default_factory=OptimizerReset)

    def __post_init__(self) -> None:
        LoRA.__post_init__(self)
        at_least("method.reset_interval_steps", self.reset_interval_steps, 1, " (null: no restarts)")
        at_most("method.reset_interval_steps", self.reset_interval_steps, MOST_STEPS, "no run has that many steps")

    def check(self, run: "RunConfig") -> None:
        """Raise ConfigError for a reset that prunes by value if the optimizer's state holds codes."""
        LoRA.check(self, run)
        reset = self.optimizer_reset.effective
        prunes = reset.mode not in ("none", "zero") or (reset.mode == "zero" and not reset.reset_step)
        if self.reset_interval_steps is not None and run.optimizer.keeps_codes and prunes:
            raise ConfigError(
                f"{RESET}mode={reset.mode} prunes values, but optimizer={run.optimizer.name} keeps codes; use "
                f"{RESET}mode=zero {RESET}reset_step=true, or {RESET}mode=none"
            )

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """Write an interval that is never reached as None, and a reset that does nothing as mode "none"."""
        found = LoRA.canonical(self, fields, run)
        found = {name: value for name, value in found.items() if not name.startswith(RESET)}
        interval, steps = self.reset_interval_steps, run.total_steps - self.warm_start_steps
        if interval is None or interval >= steps:
            return {**found, "method.reset_interval_steps": None}
        return found | {f"{RESET}{name}": value for name, value in asdict(self.optimizer_reset.effective).items()}

    def restart(self, model: "nn.Module", optimizer: "torch.optim.Optimizer", run: "RunConfig", number: int) -> Restart:
        """Merge, initialise again and reset: Lialin et al. 2023, Algorithm 1, the lines under "if t mod q = 0"."""
        from relora.core.lowrank import merge_and_reinit
        from relora.core.reset import reset_optimizer

        seed, reset = run.trainer.seed, self.optimizer_reset
        merged = merge_and_reinit(model, seed=seed, restart=number)
        fraction_reset = reset_optimizer(
            optimizer,
            model,
            mode=reset.mode,
            pruning_ratio=reset.pruning_ratio,
            moments=reset.moments,
            reset_step=reset.reset_step,
            seed=seed,
            restart=number,
        )
        return Restart(
            metrics={
                "relative_update": merged.relative_update,
                "rounding_loss": merged.rounding_loss,
                "reset_fraction": fraction_reset,
            },
            message=(
                f"merged |dW|/|W| = {merged.relative_update:.2%} (rounding lost {100 * merged.rounding_loss:.2g}% of "
                f"it), reset {fraction_reset:.1%} of the factors' optimizer state"
            ),
        )
