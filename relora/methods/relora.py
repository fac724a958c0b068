"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): low-rank factors that are merged, drawn anew and reset."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

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
        """The same reset, fields without effect at their defaults: a ratio of 1 is mode "zero", of 0 prunes nothing."""
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
    """Restarts every `reset_interval_steps` updates after the warm start (None: never)."""

    reset_interval_steps: int | None
    optimizer_reset: OptimizerReset = field(default_factory=OptimizerReset)

    def __post_init__(self) -> None:
        LoRA.__post_init__(self)
        at_least("method.reset_interval_steps", self.reset_interval_steps, 1, " (null: no restarts)")
        at_most("method.reset_interval_steps", self.reset_interval_steps, MOST_STEPS, "no run has as many updates")

    def check(self, run: "RunConfig") -> None:
        """A reset that prunes needs values."""
        LoRA.check(self, run)
        reset = self.optimizer_reset.effective
        prunes = reset.mode not in ("none", "zero") or (reset.mode == "zero" and not reset.reset_step)
        if self.reset_interval_steps is not None and run.optimizer.keeps_codes and prunes:
            raise ConfigError(
                f"{RESET}mode={reset.mode} prunes values, and optimizer={run.optimizer.name} keeps codes; take "
                f"{RESET}mode=zero {RESET}reset_step=true, or {RESET}mode=none"
            )

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """An interval that is never reached is none, and a reset that does nothing is mode "none"."""
        found = LoRA.canonical(self, fields, run)
        found = {name: value for name, value in found.items() if not name.startswith(RESET)}
        interval, steps = self.reset_interval_steps, run.total_steps - self.warm_start_steps
        if interval is None or interval >= steps:
            return {**found, "method.reset_interval_steps": None}
        return found | {f"{RESET}{name}": value for name, value in asdict(self.optimizer_reset.effective).items()}

    def restart(self, model: "nn.Module", optimizer: "torch.optim.Optimizer", run: "RunConfig", number: int) -> Restart:
        """Lialin et al. 2023, Algorithm 1, the lines under "if t mod q = 0"."""
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
            relative_update=merged.relative_update, rounding_loss=merged.rounding_loss, reset_fraction=fraction_reset
        )
