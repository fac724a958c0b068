"""The base class of methods that keep Adam's moments of some matrices in a subspace of the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from relora.budget.cost import ADAM_MOMENTS, MATRICES, STORAGE_BYTES, Cost, LlamaShape, cost, module_matches
from relora.common.checks import at_least, at_most, one_of, positive
from relora.common.errors import ConfigError
from relora.methods.base import Targeted, parameter_groups, trained_parameters
from relora.optimizers.adamw import AdamW

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig

SIDES = ("right", "left")


@dataclass(kw_only=True, slots=True)
class Subspace(Targeted):
    """Changes the subspace of dimension `rank` every `update_interval_steps`, and scales updates by `scale`.

    `square_side` is the side from which square matrices are projected. Other matrices are projected on their shorter
    side.
    """

    update_interval_steps: int = 200
    scale: float
    square_side: str = "right"

    def __post_init__(self) -> None:
        Targeted.__post_init__(self)
        at_least("method.update_interval_steps", self.update_interval_steps, 1)
        positive("method.scale", self.scale)
        at_most("method.scale", self.scale, 1e6, "a larger scale would dominate the update")
        one_of("method.square_side", self.square_side, SIDES)

    def check(self, run: "RunConfig") -> None:
        """Raise ConfigError for any optimizer but AdamW, because these methods include their own optimizer."""
        Targeted.check(self, run)
        if type(run.optimizer) is not AdamW:
            raise ConfigError(
                f"method={self.name} is Adam in a subspace and does not work with optimizer={run.optimizer.name}; use "
                "optimizer=adamw"
            )

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """Return `fields` without a side that no targeted matrix has, and with an interval of at most the phase.

        An interval that is longer than the phase after the warm start is replaced by the length of this phase.
        """
        found, steps = dict(Targeted.canonical(self, fields, run)), run.total_steps - self.warm_start_steps
        if self.update_interval_steps > steps:
            found["method.update_interval_steps"] = steps
        if all(short != long for short, long in self._targeted(run.model.shape(vocab_size=1))):
            found.pop("method.square_side", None)
        return found

    def _targeted(self, shape: LlamaShape) -> list[tuple[int, int]]:
        """Return the shorter and the longer side of each targeted matrix."""
        linears = shape.linears().items()
        return [(min(i, o), max(i, o)) for name, (i, o) in linears if module_matches(name, self.target_modules)]

    # --------------------------------------------------------------------------------------- the cost of one matrix

    def projector_numel(self, short: int, long: int) -> int:
        """Return the elements of the stored projector of one matrix."""
        return 0

    def matrix_state_bytes(self) -> int:
        """Return the bytes of one matrix's state besides moments, projector and step count."""
        return 0

    def matrix_flops(self, short: int, long: int) -> float:
        """Return the FLOPs of one matrix in a step of the optimizer: projections, and a share of decompositions."""
        raise NotImplementedError(f"method={self.name} has no matrix_flops()")

    def cost(self, shape: LlamaShape, run: "RunConfig") -> Cost:
        """Return the cost of full rank, with another state of the targeted matrices and the FLOPs of projections.

        The state of a targeted i x o matrix includes two moments of r x max(i, o).
        """
        whole = cost(shape, sequence_length_tokens=run.data.sequence_length_tokens, precision=run.trainer.precision)
        element_bytes, flops, saved_bytes = STORAGE_BYTES[run.trainer.precision], 0.0, 0
        for short, long in self._targeted(shape):
            flops += self.matrix_flops(short, long)
            kept_numel = ADAM_MOMENTS * self.rank * long + self.projector_numel(short, long)
            saved_bytes += (ADAM_MOMENTS * short * long - kept_numel) * element_bytes - self.matrix_state_bytes()
        return replace(
            whole,
            optimizer_flops=round(flops),
            optimizer_bytes=whole.optimizer_bytes - saved_bytes,
            optimizer_step_bytes=2 * whole.largest_gradient_bytes,
        )

    # ---------------------------------------------------------------------------------------------- used by the trainer

    def optimizer_over(self, groups: list[dict[str, Any]], run: "RunConfig", **adam: Any) -> "torch.optim.Optimizer":
        """Build the method's optimizer over `groups`. `adam` has the arguments of Adam."""
        raise NotImplementedError(f"method={self.name} has no optimizer_over()")

    def build_optimizer(self, model: "nn.Module", run: "RunConfig") -> "torch.optim.Optimizer":
        """Build the optimizer. Matrices that are not targeted have the settings of targeted ones, but no projection."""
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
        subspace = {
            "rank": self.rank,
            "update_interval_steps": self.update_interval_steps,
            "scale": self.scale,
            "square_side": self.square_side,
        }
        groups = [{**groups[0], "params": projected, **subspace}, {**groups[0], "params": matrices}, *groups[1:]]
        return self.optimizer_over(
            [group for group in groups if group["params"]],
            run,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )

    def messages(self, model: "nn.Module", optimizer: "torch.optim.Optimizer") -> Sequence[str]:
        """Return one message for each reason why matrices got no new projector in the last step."""
        from relora.optimizers.subspace import SubspaceAdamW

        assert isinstance(optimizer, SubspaceAdamW)
        skipped = optimizer.pop_skipped()
        if not skipped:
            return ()
        names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
        by_reason: dict[str, list[str]] = {}
        for parameter, reason in skipped:
            by_reason.setdefault(reason, []).append(names[id(parameter)])
        return [
            f"{self.name}: no new projector for {found[0]}"
            + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            + f", because {reason}; a matrix keeps its last projector, and does not change while it has none"
            for reason, found in by_reason.items()
        ]
