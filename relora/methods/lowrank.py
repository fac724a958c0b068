"""Low-rank training with factors alone, W = B A, with or without the restarts of arXiv 2505.22922."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from relora.budget.replaced import Replaced, factorised
from relora.common.checks import MOST_STEPS, at_least, at_most
from relora.common.errors import TrainingError
from relora.methods.base import Restart
from relora.methods.replacing import Replacing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from relora.config.run import RunConfig

INTERVAL = "restart_interval_steps"


@dataclass(kw_only=True, slots=True)
class LowRank(Replacing):
    """Trains factors in the place of the targeted matrices, and all other weights at full rank.

    The factors begin as the best approximation of the matrices that they replace: those of the warm start, or the
    random ones of a new model (relora.core.factorised).

    With `restart_interval_steps`, a restart refactorises each product B A into balanced factors, and the optimizer's
    state of all trained parameters starts anew (arXiv 2505.22922). The schedule's re-warm-up follows. It begins at 0
    and ends at the cosine after schedule.restart_warmup_steps. In the authors' code it begins at 0.1% of the cosine
    and takes 10 updates, with a restart every 200 updates.
    """

    short_names: ClassVar[dict[str, str]] = {**Replacing.short_names, f"method.{INTERVAL}": "interval"}
    restart_interval_field: ClassVar[str] = INTERVAL

    restart_interval_steps: int | None = None

    def __post_init__(self) -> None:
        Replacing.__post_init__(self)
        at_least(f"method.{INTERVAL}", self.restart_interval_steps, 1, " (null: no restarts)")
        at_most(f"method.{INTERVAL}", self.restart_interval_steps, MOST_STEPS, "no run has that many steps")

    def canonical(self, fields: dict[str, Any], run: "RunConfig") -> dict[str, Any]:
        """Write an interval that is never reached as None."""
        found = Replacing.canonical(self, fields, run)
        interval, steps = self.restart_interval_steps, run.total_steps - self.warm_start_steps
        return found if interval is not None and interval < steps else {**found, f"method.{INTERVAL}": None}

    def replaced(self, in_features: int, out_features: int) -> Replaced:
        """Return the cost of the layer in the place of a matrix."""
        return factorised(in_features, out_features, self.rank)

    def begin(self, model: "nn.Module", run: "RunConfig") -> str | None:
        """Replace the targeted matrices by factors."""
        from relora.core.factorised import factorise

        return kept(factorise(model, rank=self.rank, target_modules=self.target_modules))

    def restart(self, model: "nn.Module", optimizer: "torch.optim.Optimizer", run: "RunConfig", number: int) -> Restart:
        """Refactorise every product, and let the optimizer's state start anew: arXiv 2505.22922."""
        from relora.core.factorised import forget, refactorise

        try:
            change = refactorise(model)
        except ValueError as error:
            raise TrainingError(
                f"the run diverged: at restart {number} {error}; lower optimizer.learning_rate or lengthen "
                "schedule.warmup_steps"
            ) from error
        count = forget(optimizer)
        return Restart(
            metrics={"rounding_change": change, "reset_tensors": count},
            message=(
                f"refactorised the products (rounding changed them by {100 * change:.2g}%), reset the optimizer state "
                f"of all {count} trained tensors"
            ),
        )

    def finish(self, model: "nn.Module", run: "RunConfig") -> None:
        """Multiply the factors to plain matrices."""
        from relora.core.factorised import multiply_out

        multiply_out(model)


def kept(share: float, of: str = "factors") -> str:
    """Return the clause that says how much of the matrices' norm the new layers keep."""
    return f"the {of} keep {share:.1%} of |W| (Frobenius norm) of the matrices that they replace"
