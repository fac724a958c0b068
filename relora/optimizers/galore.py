"""GaLore, a baseline: Adam on gradients projected to a low-rank subspace (arXiv 2403.03507). Needs torch only.

All state is tensors, so checkpoints load with weights_only=True.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def projector(gradient_OxI: Tensor, rank: int, previous: Tensor | None = None) -> Tensor:
    """Orthonormal basis of the gradient's leading singular subspace on its shorter side.

    r x I (right singular vectors) for O >= I, O x r (left ones) otherwise; computed in fp32 or wider (section 4.1).
    Square matrices are projected from the right, as in the authors' code (galore_torch, proj_type "std").

    With a `previous` basis the side stays that of it, because the moments have the shape of that side.
    """
    rows, columns = gradient_OxI.shape
    from_left = rows < columns if previous is None else _is_left(previous, gradient_OxI.shape)
    wide = gradient_OxI.to(torch.promote_types(gradient_OxI.dtype, torch.float32))
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    basis = left[:, :rank] if from_left else right[:rank]
    return basis.to(gradient_OxI.dtype).contiguous()


class GaLoreAdamW(torch.optim.Optimizer):
    """Algorithm 2 of the paper with decoupled weight decay; groups without a `rank` are plain AdamW.

    A group with `rank` holds matrices. Every `update_interval_steps` updates the projector P is taken anew from the
    gradient G; between, R = P^T G (or G P^T on the longer side) feeds Adam's moments, which are kept when P changes,
    and W moves by lr * scale * P N with N Adam's normalised direction.

    Raises ValueError for a rank above min(shape) of one of the group's parameters, or one that is no matrix.
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
                        "GaLore projects matrices to at most min(shape)"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
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
    """Whether `basis` is O x r and not r x I. An r x I basis of a square matrix at full rank counts as right."""
    return basis.shape[1] != shape_OxI[1]


def _project(gradient_OxI: Tensor, basis: Tensor) -> Tensor:
    return basis.T @ gradient_OxI if _is_left(basis, gradient_OxI.shape) else gradient_OxI @ basis.T


def _project_back(direction: Tensor, basis: Tensor, shape_OxI: torch.Size) -> Tensor:
    return basis @ direction if _is_left(basis, shape_OxI) else direction @ basis
