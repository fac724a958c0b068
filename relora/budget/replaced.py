"""The cost of layers that take the place of a decoder matrix, as plain arithmetic without torch."""

from dataclasses import dataclass

from relora.budget.cost import FACTORS, VALUES, Trained

INT32_POSITIONS = 2**31
"""The most entries of a matrix whose positions an int32 can hold."""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """The cost of the layer in the place of one matrix of in x out. A multiply-add is two FLOPs."""

    in_features: int
    out_features: int
    trained: tuple[Trained, ...]
    """The trained tensors of the layer."""
    flops_per_token: int
    """FLOPs of the matrix products for one token, forward and backward."""
    flops_per_micro_step: int = 0
    """FLOPs of the matrix products in each micro-step, for any number of tokens."""
    restart_flops: int = 0
    fixed_bytes: int = 0
    """Bytes of tensors that are kept and not trained, such as indices."""
    kept_numel: int = 0
    """Elements per token that the layer keeps for the backward pass, besides its input."""
    checkpointed_numel: int = 0
    """The part of `kept_numel` that is kept also with trainer.activation_checkpointing."""
    copied_numel: int = 0
    """Elements of the weights of which autocast keeps a copy."""
    formed_numel: int = 0
    """Elements of the largest tensor that a pass forms and frees again."""


def factors_of(in_features: int, out_features: int, rank: int) -> tuple[Trained, Trained]:
    """Return A (rank x in) and B (out x rank)."""
    return Trained(FACTORS, rank, in_features), Trained(FACTORS, out_features, rank)


def factorised(in_features: int, out_features: int, rank: int, *, is_activated: bool = False) -> Replaced:
    """Return the cost of B A x, or of B f(A x) if it `is_activated`: 2r(i+o) FLOPs forward and twice that backward.

    For the backward pass, the layer keeps A x, and f(A x) too. A restart is that of `refactorisation_flops`.
    """
    numel = rank * (in_features + out_features)
    return Replaced(
        in_features=in_features,
        out_features=out_features,
        trained=factors_of(in_features, out_features, rank),
        flops_per_token=6 * numel,
        restart_flops=0 if is_activated else refactorisation_flops(in_features, out_features, rank),
        kept_numel=2 * rank if is_activated else rank,
        checkpointed_numel=rank if is_activated else 0,
        copied_numel=numel,
    )


def support_numel(in_features: int, out_features: int, density: float) -> int:
    """Return the number of sparse values of a matrix: the share `density` of its entries, at least one."""
    return max(1, round(density * in_features * out_features))


def sparse_plus_low_rank(in_features: int, out_features: int, rank: int, *, density: float) -> Replaced:
    """Return the cost of ((alpha/r) B A + S) x (relora.core.sparse).

    W = (alpha/r) B A + S is formed in the forward and in the backward pass of each micro-step (2rio each), and its
    gradient is multiplied with both factors (4rio). Each token takes 6io, as at full rank. The positions of S are kept.
    """
    numel, count = in_features * out_features, support_numel(in_features, out_features, density)
    return Replaced(
        in_features=in_features,
        out_features=out_features,
        trained=(*factors_of(in_features, out_features, rank), Trained(VALUES, count)),
        flops_per_token=6 * numel,
        flops_per_micro_step=8 * rank * numel,
        restart_flops=refactorisation_flops(in_features, out_features, rank),
        fixed_bytes=count * (4 if numel <= INT32_POSITIONS else 8),
        formed_numel=numel,
    )


def refactorisation_flops(in_features: int, out_features: int, rank: int) -> int:
    """Return the FLOPs of one refactorisation of B A (relora.core.factorised).

    It decomposes B and A by QR, multiplies the two triangles, decomposes the product by its singular values and
    multiplies back. The comparison of the old and the new product, for the report, takes 4rio. QR of m x n with its Q
    takes 4mn^2 - 4n^3/3 FLOPs, and a singular value decomposition of n x n 26n^3 (Golub and Van Loan, Matrix
    Computations).
    """
    decompositions = sum(4 * side * rank**2 - 4 * rank**3 // 3 for side in (in_features, out_features)) + 26 * rank**3
    return decompositions + refactorisation_product_flops(in_features, out_features, rank)


def refactorisation_product_flops(in_features: int, out_features: int, rank: int) -> int:
    """Return the part of `refactorisation_flops` that matrix products take."""
    return 2 * rank**3 + 2 * rank**2 * (in_features + out_features) + 4 * rank * in_features * out_features
