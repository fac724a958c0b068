"""GaLore (arXiv 2403.03507): full-rank weights, with Adam in a low-rank subspace of the gradient of each matrix."""

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
    """Computes the subspace of dimension `rank` again every `update_interval_steps`, and scales updates by `scale`."""

    update_interval_steps: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        Targeted.__post_init__(self)
        at_least("method.update_interval_steps", self.update_interval_steps, 1)
        positive("method.scale", self.scale)
        at_most("method.scale", self.scale, 1e6, "a larger scale would dominate the update")

    def check(self, run: "RunConfig") -> None:
        """Raise ConfigError for any optimizer but AdamW, because GaLore includes its own optimizer."""
        Targeted.check(self, run)
        if type(run.optimizer) is not AdamW:
            raise ConfigError(
                f"method=galore is Adam in a subspace and does not work with optimizer={run.optimizer.name}; use "
                "optimizer=adamw"
            )

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """Replace an interval that is longer than the phase after the warm start by the length of this phase."""
        found, steps = Targeted.canonical(self, fields, run), run.total_steps - self.warm_start_steps
        return found if self.update_interval_steps <= steps else {**found, "method.update_interval_steps": steps}

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Return the cost of full rank, with another state of the targeted matrices and the FLOPs of projections.

        The state of a targeted i x o matrix is two moments of r x max(i, o) and a projector of r x min(i, o). A step
        projects its gradient to the subspace and the result back. It also has its share of the decompositions. A
        singular value decomposition of m x n, m >= n, takes 6mn^2 + 20n^3 FLOPs (Golub and Van Loan, Matrix
        Computations, R-SVD).
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
        """Build GaLore. Matrices that are not targeted have the same settings as targeted ones, but no projection."""
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
