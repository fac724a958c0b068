"""AdamW on projected gradients: what GaLore, Fira and APOLLO have in common. Needs torch only.

The whole state consists of tensors, so checkpoints load with weights_only=True.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SubspaceAdamW(torch.optim.Optimizer):
    """AdamW whose moments of some matrices are those of a projected gradient. Subclasses define the projection.

    A group with `rank` holds matrices. In every step, `project` computes R from the gradient G of a matrix, Adam's
    moments get R, and `lift` computes the update of the matrix from Adam's normalised direction N. Groups without a
    `rank` use plain AdamW.

    Args:
        params: Parameters or groups, as for other torch optimizers. A group can have its own value of each argument.
        lr: Learning rate.
        betas: Adam's decay rates of the first and the second moment.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        rank: Dimension of the subspace. None means plain AdamW.
        update_interval_steps: Steps between two changes of the projection.
        scale: Factor of the update of projected matrices.
        square_side: The side from which square matrices are projected: "left" or "right". Other matrices are
            projected on their shorter side.
        own: The other defaults of a subclass.

    Raises:
        ValueError: The rank exceeds min(shape) of a parameter in its group, or this parameter is not a matrix.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | None = None,
        update_interval_steps: int = 200,
        scale: float = 1.0,
        square_side: str = "right",
        **own: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_interval_steps": update_interval_steps,
            "scale": scale,
            "square_side": square_side,
            **own,
        }
        super().__init__(params, defaults)
        self._skipped: list[tuple[Tensor, str]] = []
        self._told: set[tuple[Tensor, str]] = set()
        for group in self.param_groups:
            for parameter in group["params"] if group["rank"] is not None else ():
                if parameter.ndim != 2 or group["rank"] > min(parameter.shape):
                    raise ValueError(
                        f"rank={group['rank']} does not fit a parameter of shape {tuple(parameter.shape)}; "
                        "only matrices are projected, with a rank of at most min(shape); lower the rank"
                    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a state. Groups of earlier versions have no `square_side`: they projected squares from the right."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("square_side", "right")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Return the loss of `closure`, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def project(self, parameter: Tensor, gradient_OxI: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return R, the projected gradient of a matrix, or None to leave the matrix as it is in this step.

        `self.state[parameter]["step"]` is the number of updates that the matrix has had.
        """
        raise NotImplementedError

    def lift(
        self, parameter: Tensor, gradient_OxI: Tensor, projected: Tensor, direction: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """Return the update of a matrix, O x I, before the learning rate.

        Args:
            parameter: The matrix.
            gradient_OxI: Its gradient G.
            projected: R, the result of `project`.
            direction: N, Adam's normalised direction in the subspace. It may be changed in place.
            group: The group of the matrix.
        """
        raise NotImplementedError

    def skip(self, parameter: Tensor, reason: str) -> None:
        """Note that a matrix keeps its projection. Each reason of a matrix is noted once."""
        if (parameter, reason) not in self._told:
            self._told.add((parameter, reason))
            self._skipped.append((parameter, reason))

    def pop_skipped(self) -> list[tuple[Tensor, str]]:
        """Return (matrix, reason) of each `skip` since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        projected = gradient if group["rank"] is None else self.project(parameter, gradient, group)
        if projected is None:
            return
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(projected), torch.zeros_like(projected)
        state["step"] += 1
        done = int(state["step"].item())
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(projected, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        first = state["exp_avg"] / (1 - beta1**done)
        second = state["exp_avg_sq"] / (1 - beta2**done)
        direction = first.div_(second.sqrt_().add_(group["eps"]))
        del second
        if group["rank"] is not None:
            direction = self.lift(parameter, gradient, projected, direction, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])


def is_from_left(shape_OxI: torch.Size, square_side: str) -> bool:
    """Whether a matrix is projected from the left: its rows are the shorter side, or it is square."""
    rows, columns = shape_OxI
    return rows < columns or (rows == columns and square_side == "left")
