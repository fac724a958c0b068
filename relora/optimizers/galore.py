"""GaLore, a baseline: Adam on gradients projected to a low-rank subspace (arXiv 2403.03507). Needs torch only."""

from typing import Any

import torch
from torch import Tensor

from relora.core.merged import wide_dtype
from relora.optimizers.subspace import SubspaceAdamW, is_from_left


class NoSubspaceError(ValueError):
    """A gradient has no leading singular subspace. The message is the reason."""


def projector(gradient_OxI: Tensor, rank: int, previous: Tensor | None = None, *, square_side: str = "right") -> Tensor:
    """Compute an orthonormal basis of the leading singular subspace of the gradient, on its shorter side.

    It is computed in fp32 or wider (section 4.1). The algorithms of the paper have m <= n and project from the left.
    The authors' code projects square matrices from the right (galore_torch, proj_type "std").

    Args:
        gradient_OxI: The gradient of one matrix.
        rank: The dimension r of the subspace.
        previous: The basis until now. The new basis is on the same side, because the shape of the moments depends on
            the side.
        square_side: The side of the basis of a square matrix: "left" or "right".

    Returns:
        r x I (right singular vectors) for O >= I, otherwise O x r (left singular vectors), in the gradient's dtype.

    Raises:
        NoSubspaceError: The gradient is zero or not finite, or its decomposition fails.
    """
    gradient = gradient_OxI.to(wide_dtype(gradient_OxI.dtype))
    norm = torch.linalg.vector_norm(gradient).item()
    if norm == 0:
        raise NoSubspaceError("its gradient is zero")
    if not norm < float("inf"):
        raise NoSubspaceError("its gradient, or the norm of it, is not finite")
    try:
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[reportPrivateImportUsage] -- documented by torch
        raise NoSubspaceError("the singular value decomposition of its gradient did not converge") from None
    basis = left[:, :rank] if _is_left(gradient_OxI.shape, square_side, previous) else right[:rank]
    if not basis.isfinite().all():
        raise NoSubspaceError("the singular value decomposition of its gradient is not finite")
    return basis.to(gradient_OxI.dtype).contiguous()


class GaLoreAdamW(SubspaceAdamW):
    """Algorithm 2 of the paper with decoupled weight decay.

    The projector P is computed from the gradient G again every `update_interval_steps` steps. In every step, Adam's
    moments get R = P^T G (or G P^T, if P is r x I). They are kept when P changes. W changes by lr * scale * P N, where
    N is Adam's normalised direction.

    A gradient without a leading subspace (`NoSubspaceError`) leaves P as it is for another interval. If a matrix has
    no P yet, the matrix stays as it is until a gradient gives one. `pop_skipped` returns the reasons.

    `SubspaceAdamW` has the arguments.
    """

    def __init__(self, params: Any, *, scale: float = 0.25, **settings: Any) -> None:
        super().__init__(params, scale=scale, **settings)

    def project(self, parameter: Tensor, gradient_OxI: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return R = P^T G or G P^T. Compute P first, if a new one is due."""
        state = self.state[parameter]
        basis = state.get("projector")
        if int(state["step"].item()) % group["update_interval_steps"] == 0:
            try:
                basis = projector(gradient_OxI, group["rank"], basis, square_side=group["square_side"])
            except NoSubspaceError as reason:
                self.skip(parameter, str(reason))
        if basis is None:
            return None
        state["projector"] = basis
        return basis.T @ gradient_OxI if self.is_left(parameter, group) else gradient_OxI @ basis.T

    def lift(
        self, parameter: Tensor, gradient_OxI: Tensor, projected: Tensor, direction: Tensor, group: dict[str, Any]
    ) -> Tensor:
        """Return scale * P N or scale * N P."""
        return group["scale"] * self.project_back(parameter, direction, group)

    def project_back(self, parameter: Tensor, low_rank: Tensor, group: dict[str, Any]) -> Tensor:
        """Return P X or X P, O x I, for X in the subspace."""
        basis = self.state[parameter]["projector"]
        return basis @ low_rank if self.is_left(parameter, group) else low_rank @ basis

    def is_left(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the projector of a matrix is O x r and not r x I."""
        return _is_left(parameter.shape, group["square_side"], self.state[parameter]["projector"])


def _is_left(shape_OxI: torch.Size, square_side: str, basis: Tensor | None) -> bool:
    """Whether a basis is O x r and not r x I. The shape of a basis shows its side, unless the basis is square.

    Checkpoints of earlier versions may hold a basis of the other side.
    """
    if basis is not None and basis.shape[0] != basis.shape[1]:
        return basis.shape[1] != shape_OxI[1]
    return is_from_left(shape_OxI, square_side)
