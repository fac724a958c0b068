"""GaLore (arXiv 2403.03507): full-rank weights, Adam in a low-rank subspace of each matrix's gradient."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from relora.budget.cost import ADAM_MOMENTS, MATRICES, STORAGE_BYTES, Cost, LlamaShape, cost, module_matches
from relora.common.checks import at_least, at_most, positive
from relora.common.errors import ConfigError
from relora.methods.base import Targeted, parameter_groups, trained_parameters
from relora.optimizers.adamw import AdamW

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class GaLore(Targeted):
    """The subspace of `rank` is taken anew every `update_interval_steps`; an update is scaled by `scale`."""

    update_interval_steps: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        Targeted.__post_init__(self)
        at_least("method.update_interval_steps", self.update_interval_steps, 1)
        positive("method.scale", self.scale)
        at_most("method.scale", self.scale, 1e6, "the update would be nothing but the scale")

    def check(self, run: "RunConfig") -> None:
        """It is an optimizer by itself."""
        Targeted.check(self, run)
        if type(run.optimizer) is not AdamW:
            raise ConfigError(
                f"method=galore is Adam in a subspace, and cannot be optimizer={run.optimizer.name} too; take "
                "optimizer=adamw"
            )

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """An interval beyond the end of the run is the run's length."""
        found, steps = Targeted.canonical(self, fields, run), run.total_steps - self.warm_start_steps
        return found if self.update_interval_steps <= steps else {**found, "method.update_interval_steps": steps}

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Full rank's, but for the state of the targeted matrices and the work of projections.

        The state: two moments of r x max(i, o) and a projector of r x min(i, o). The work of an update: to the subspace
        and back, and its share of the decompositions. A singular value decomposition of m x n, m >= n, takes
        6mn^2 + 20n^3 FLOPs (Golub and Van Loan, Matrix Computations, R-SVD).
        """
        whole = cost(shape, sequence_length_tokens=run.data.sequence_length_tokens, precision=run.trainer.precision)
        linears, element_bytes = shape.linears(), STORAGE_BYTES[run.trainer.precision]
        flops, saved_numel = 0.0, 0
        for name, sizes in linears.items():
            if module_matches(name, self.target_modules):
                short, long = sorted(sizes)
                decomposition = 6 * long * short**2 + 20 * short**3
                flops += 4 * self.rank * short * long + decomposition / self.update_interval_steps
                saved_numel += ADAM_MOMENTS * short * long - self.rank * (short + ADAM_MOMENTS * long)
        return replace(
            whole,
            optimizer_flops=round(flops),
            optimizer_bytes=whole.optimizer_bytes - saved_numel * element_bytes,
            optimizer_step_bytes=2 * whole.largest_gradient_bytes,
        )

    def build_optimizer(self, model: "nn.Module", run: "RunConfig") -> "torch.optim.Optimizer":
        """Matrices that are not targeted have the settings of those that are, and no projection."""
        from relora.optimizers.galore import GaLoreAdamW

        settings = run.optimizer
        assert isinstance(settings, AdamW)
        groups = parameter_groups(model, run, settings.learning_rate)
        projected = [
            parameter
            for name, role, parameter in trained_parameters(model)
            if role == MATRICES and module_matches(name.removesuffix(".weight"), self.target_modules)
        ]
        held = {id(parameter) for parameter in projected}
        matrices = [parameter for parameter in groups[0]["params"] if id(parameter) not in held]
        subspace = {"rank": self.rank, "update_interval_steps": self.update_interval_steps, "scale": self.scale}
        groups = [{**groups[0], "params": projected, **subspace}, {**groups[0], "params": matrices}, *groups[1:]]
        return GaLoreAdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )
