import io
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from relora.optimizers.galore import GaLoreAdamW, NoSubspaceError, projector


def published(
    weight: Tensor, gradients: list[Tensor], *, rank: int, every: int, scale: float, lr: float, side: str = "right"
) -> Tensor:
    """Algorithm 2 of arXiv 2403.03507 written out, in float64: project, Adam, project back.

    The algorithm has m <= n and projects from the left, so a square matrix has side="left" there.
    """
    weight, m, v, basis = weight.clone(), None, None, None
    left = weight.shape[0] < weight.shape[1] or (weight.shape[0] == weight.shape[1] and side == "left")
    for t, gradient in enumerate(gradients):
        if t % every == 0:
            u, _, vh = torch.linalg.svd(gradient)
            basis = u[:, :rank] if left else vh[:rank].T
        assert basis is not None
        low = basis.T @ gradient if left else gradient @ basis
        m = 0.1 * low if m is None else 0.9 * m + 0.1 * low
        v = 0.001 * low**2 if v is None else 0.999 * v + 0.001 * low**2
        normalised = (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        weight = weight - lr * scale * (basis @ normalised if left else normalised @ basis.T)
    return weight


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("shape", "rank"), [((6, 10), 3), ((10, 6), 3), ((7, 7), 3), ((7, 7), 7)])
def test_updates_equal_the_published_formula(shape: tuple[int, int], rank: int, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(31)]
    weight = nn.Parameter(start.clone())
    optimizer = GaLoreAdamW([weight], lr=0.02, rank=rank, update_interval_steps=4, scale=0.25, square_side=side)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    expected = published(start, gradients, rank=rank, every=4, scale=0.25, lr=0.02, side=side)
    assert torch.allclose(weight, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(weight, start, atol=1e-3)
    other = published(
        start, gradients, rank=rank, every=4, scale=0.25, lr=0.02, side="left" if side == "right" else "right"
    )
    assert torch.allclose(weight, other, atol=1e-3) == (shape[0] != shape[1])


def authors(weight: Tensor, gradients: list[Tensor], *, rank: int, every: int, scale: float, lr: float) -> Tensor:
    """GaLoreProjector (proj_type "std") and AdamW of the authors' galore_torch, written out in float64."""
    weight = weight.clone()
    exp_avg = exp_avg_sq = ortho = torch.empty(0)
    for step, grad in enumerate(gradients):
        right = grad.shape[0] >= grad.shape[1]
        if step % every == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            ortho = vh[:rank, :] if right else u[:, :rank]
        low = grad @ ortho.t() if right else ortho.t() @ grad
        if step == 0:
            exp_avg, exp_avg_sq = torch.zeros_like(low), torch.zeros_like(low)
        exp_avg = exp_avg * 0.9 + low * (1 - 0.9)
        exp_avg_sq = exp_avg_sq * 0.999 + low * low * (1 - 0.999)
        denom = exp_avg_sq.sqrt() + 1e-8
        step_size = lr * math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        norm_grad = exp_avg / denom
        weight = weight - step_size * scale * (norm_grad @ ortho if right else ortho @ norm_grad)
    return weight


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_sixty_updates_equal_the_authors_code_on_every_shape(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(60)]
    weight = nn.Parameter(start.clone())
    optimizer = GaLoreAdamW([weight], lr=0.02, rank=3, update_interval_steps=7, scale=0.25)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(weight, authors(start, gradients, rank=3, every=7, scale=0.25, lr=0.02), atol=1e-5, rtol=0)


def test_a_square_matrix_is_projected_from_the_right_or_from_the_side_of_its_state() -> None:
    """A checkpoint of an earlier version may hold the left side: its moments have that side's shape."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(6, 6, generator=generator) for _ in range(4)]
    new, old = nn.Parameter(torch.zeros(6, 6)), nn.Parameter(torch.zeros(6, 6))
    right, left = (GaLoreAdamW([weight], lr=0.1, rank=2, update_interval_steps=2) for weight in (new, old))
    left_basis = torch.linalg.svd(gradients[0])[0][:, :2].contiguous()
    left.state[old] = {"step": torch.zeros(()), "projector": left_basis}
    for gradient in gradients:
        for weight, optimizer in ((new, right), (old, left)):
            weight.grad = gradient.clone()
            optimizer.step()
    assert right.state[new]["projector"].shape == right.state[new]["exp_avg"].T.shape == (2, 6)
    assert left.state[old]["projector"].shape == left.state[old]["exp_avg"].T.shape == (6, 2)
    assert not torch.equal(left.state[old]["projector"], left_basis)
    assert not torch.allclose(new, old, atol=1e-3)


def test_a_state_from_before_the_side_was_a_setting_loads_with_the_side_of_that_time() -> None:
    weight = nn.Parameter(torch.ones(6, 6))
    old, new = (GaLoreAdamW([weight], lr=0.1, rank=2) for _ in range(2))
    weight.grad = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    old.step()
    saved = old.state_dict()
    del saved["param_groups"][0]["square_side"]
    new.load_state_dict(saved)
    new.step()
    assert new.param_groups[0]["square_side"] == "right"


# -------------------------------------------------------------------------------- gradients without a subspace


def not_converging(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("linalg.svd: the input matrix is ill-conditioned (error code: 5)")  # type: ignore[reportPrivateImportUsage]


def test_a_zero_gradient_keeps_the_projector_and_its_reason_is_told_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = GaLoreAdamW([weight], lr=0.1, rank=2, update_interval_steps=2)
    seen = []
    for gradient in (torch.randn(4, 6, generator=generator), *(torch.zeros(4, 6) for _ in range(4))):
        weight.grad = gradient
        optimizer.step()
        seen.append(optimizer.state[weight]["projector"].clone())
    assert all(torch.equal(basis, seen[0]) for basis in seen)
    assert optimizer.pop_skipped() == [(weight, "its gradient is zero")]
    assert optimizer.pop_skipped() == []
    weight.grad = torch.randn(4, 6, generator=generator)
    optimizer.step()  # step 5: no new projector is due
    assert torch.equal(optimizer.state[weight]["projector"], seen[0])
    optimizer.step()
    assert not torch.equal(optimizer.state[weight]["projector"], seen[0])


def test_a_decomposition_that_does_not_converge_keeps_the_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = GaLoreAdamW([weight], lr=0.1, rank=2, update_interval_steps=1)
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    basis, before = optimizer.state[weight]["projector"].clone(), weight.detach().clone()
    monkeypatch.setattr(torch.linalg, "svd", not_converging)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["projector"], basis)
    assert not torch.equal(weight, before)
    ((_, reason),) = optimizer.pop_skipped()
    assert reason == "the singular value decomposition of its gradient did not converge"


def test_a_matrix_without_a_projector_waits_for_a_gradient_that_gives_one() -> None:
    weight, other = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = GaLoreAdamW([weight, other], lr=0.1, rank=2, weight_decay=0.5)
    for _ in range(2):
        weight.grad, other.grad = torch.zeros(4, 6), torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    assert torch.equal(weight, torch.ones(4, 6)), "no weight decay either"
    assert optimizer.state[weight].keys() == {"step"}
    assert not torch.equal(other, torch.ones(4, 6))
    weight.grad = other.grad
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    assert optimizer.state[weight]["projector"].shape == (4, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_gradient_or_a_norm_that_is_not_finite_gives_a_reason(value: float) -> None:
    with pytest.raises(NoSubspaceError, match="not finite"):
        projector(torch.full((4, 6), value), 2)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_a_singular_gradient_gives_an_orthonormal_basis(shape: tuple[int, int]) -> None:
    """Its decomposition exists: the basis holds the whole gradient, and the other directions are arbitrary."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    basis = projector(low, 3)
    if shape[0] >= shape[1]:
        assert torch.allclose(low @ basis.T @ basis, low, atol=1e-5)
        assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-5)
    else:
        assert torch.allclose(basis @ basis.T @ low, low, atol=1e-5)
        assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)


def test_full_rank_projection_with_scale_one_moves_like_adam_in_the_rotated_basis() -> None:
    gradient = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    weight.grad = gradient
    GaLoreAdamW([weight], lr=0.1, rank=3, scale=1.0).step()
    assert torch.allclose(weight.diagonal(), torch.full((3,), -0.1, dtype=torch.float64), atol=1e-6)


def test_the_projector_spans_the_leading_subspace() -> None:
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(8, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    left = projector(low, 2)
    assert torch.allclose(left @ left.T @ low, low, atol=1e-4)
    right = projector(low.T.contiguous(), 2)
    assert torch.allclose(low.T @ right.T @ right, low.T, atol=1e-4)


def test_the_projector_changes_only_at_its_interval_and_moments_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = GaLoreAdamW([weight], lr=0.1, rank=2, update_interval_steps=3)
    seen = []
    for _ in range(7):
        weight.grad = torch.randn(4, 6, generator=generator)
        optimizer.step()
        seen.append(optimizer.state[weight]["projector"].clone())
    changes = [step for step in range(1, 7) if not torch.equal(seen[step], seen[step - 1])]
    assert changes == [3, 6]
    assert optimizer.state[weight]["step"] == 7


def test_all_state_is_tensors_and_loads_with_weights_only(tmp_path: Path) -> None:
    weights = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(3))]

    def made() -> GaLoreAdamW:
        return GaLoreAdamW([{"params": weights[:1], "rank": 2}, {"params": weights[1:]}], lr=0.1)

    optimizer = made()
    for weight in weights:
        weight.grad = torch.rand_like(weight)
    optimizer.step()
    assert all(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored = made()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for weight in weights:
        for name, value in optimizer.state[weight].items():
            assert torch.equal(restored.state[weight][name], value)


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_a_rank_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"rank=4 .*{re.escape(str(shape))}; .*lower the rank"):
        GaLoreAdamW([nn.Parameter(torch.zeros(shape))], lr=0.1, rank=4)


def test_bf16_matrices_are_projected_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer = GaLoreAdamW([weight], lr=0.1, rank=2)
    optimizer.step()
    assert optimizer.state[weight]["projector"].dtype == torch.bfloat16
    assert torch.isfinite(weight).all()
