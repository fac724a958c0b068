"""GaLore, a baseline: Adam on gradients projected to a low-rank subspace (arXiv 2403.03507). Needs torch only.

The whole state consists of tensors, so checkpoints load with weights_only=True.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def projector(gradient_OxI: Tensor, rank: int, previous: Tensor | None = None) -> Tensor:
    """Compute an orthonormal basis of the leading singular subspace of the gradient, on its shorter side.

    It is computed in fp32 or wider (section 4.1). Square matrices are projected from the right, as in the authors'
    code (galore_torch, proj_type "std").

    Args:
        gradient_OxI: The gradient of one matrix.
        rank: The dimension r of the subspace.
        previous: The basis until now. The new basis is on the same side, because the shape of the moments depends on
            the side.

    Returns:
        r x I (right singular vectors) for O >= I, otherwise O x r (left singular vectors), in the gradient's dtype.
    """
    rows, columns = gradient_OxI.shape
    from_left = rows < columns if previous is None else _is_left(previous, gradient_OxI.shape)
    wide = gradient_OxI.to(torch.promote_types(gradient_OxI.dtype, torch.float32))
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    basis = left[:, :rank] if from_left else right[:rank]
    return basis.to(gradient_OxI.dtype).contiguous()


class GaLoreAdamW(torch.optim.Optimizer):
    """Algorithm 2 of the paper with decoupled weight decay. Groups without a `rank` use plain AdamW.

    A group with `rank` holds matrices. The projector P is computed from the gradient G again every
    `update_interval_steps` steps. In every step, Adam's moments get R = P^T G (or G P^T, if P is r x I). They are
    kept when P changes. W changes by lr * scale * P N, where N is Adam's normalised direction.

    Args:
        params: Parameters or groups, as for other torch optimizers. A group can have its own value of each argument.
        lr: Learning rate.
        betas: Adam's decay rates of the first and the second moment.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay.
        rank: Dimension of the subspace. None means plain AdamW.
        update_interval_steps: Steps between two computations of the projector.
        scale: Factor of the update of projected matrices.

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
        scale: float = 0.25,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_interval_steps": update_interval_steps,
            "scale": scale,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"] if group["rank"] is not None else ():
                if parameter.ndim != 2 or group["rank"] > min(parameter.shape):
                    raise ValueError(
                        f"rank={group['rank']} does not fit a parameter of shape {tuple(parameter.shape)}; "
                        "GaLore projects only matrices, with a rank of at most min(shape); lower the rank"
                    )

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

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rank = self.state[parameter], group["rank"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        done = int(state["step"].item())
        if rank is not None and done % group["update_interval_steps"] == 0:
            state["projector"] = projector(gradient, rank, state.get("projector"))
        moved = gradient if rank is None else _project(gradient, state["projector"])
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(moved), torch.zeros_like(moved)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(moved, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(moved, moved, value=1 - beta2)
        first = state["exp_avg"] / (1 - beta1 ** (done + 1))
        second = state["exp_avg_sq"] / (1 - beta2 ** (done + 1))
        direction = first.div_(second.sqrt_().add_(group["eps"]))
        del second
        if rank is not None:
            direction = group["scale"] * _project_back(direction, state["projector"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])


def _is_left(basis: Tensor, shape_OxI: torch.Size) -> bool:
    """Whether `basis` is O x r and not r x I. A square basis at full rank counts as r x I."""
    return basis.shape[1] != shape_OxI[1]


def _project(gradient_OxI: Tensor, basis: Tensor) -> Tensor:
    return basis.T @ gradient_OxI if _is_left(basis, gradient_OxI.shape) else gradient_OxI @ basis.T


def _project_back(direction: Tensor, basis: Tensor, shape_OxI: torch.Size) -> Tensor:
    return basis @ direction if _is_left(basis, shape_OxI) else direction @ basis
