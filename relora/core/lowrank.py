"""The low-rank layer and its operations: wrap, merge and re-initialise, unwrap. Needs torch only.

Lialin et al. 2023 (arXiv 2307.05695), section 3: y = x W^T + b + (alpha/rank) B A drop(x) with W frozen. A restart
merges the product B A into W and draws a new A. The sum of many low-rank updates can therefore have a high rank.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora.budget.cost import module_matches
from relora.core.choices import REINITS, SCALING
from relora.core.exact_ways import ExactWays
from relora.core.keyed import keyed_generator
from relora.core.merged import row_chunks, wide_dtype

M = TypeVar("M", bound=nn.Module)


@dataclass(kw_only=True)
class ReLoRAConfig:
    """The linear layers that get factors, and the kind of these factors.

    Args:
        rank: Inner dimension r of B (out x r) and A (r x in), at most min(in, out).
        target_modules: A regular expression that matches whole module names, or a list of their endings.
        alpha: The product B A is scaled by alpha/rank. None means 0.25 * rank, the paper's 32/128.
        dropout: Dropout probability on the input of A, in training mode.
        reinit: How A is drawn: "kaiming" (uniform, a = sqrt 5) or "orthogonal" (orthogonal rows of the same norm).
        trainable_scaling: The scale becomes a parameter of each layer. Every merge sets it back to alpha/rank.

    Raises:
        ValueError: A value is outside its allowed range.
    """

    rank: int
    target_modules: str | Sequence[str]
    alpha: float | None = None
    dropout: float = 0.0
    reinit: str = "kaiming"
    trainable_scaling: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a whole number of at least 1")
        self._check_targets()
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha} must be positive and finite (None: 0.25 * rank)")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.reinit not in REINITS:
            raise ValueError(f"reinit={self.reinit!r} is not one of {', '.join(REINITS)}")

    def _check_targets(self) -> None:
        targets = self.target_modules
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(
                    f"target_modules={targets!r} is not a regular expression: {error}; "
                    "correct it, or give a list of module-name endings"
                ) from error
        elif not isinstance(targets, Sequence) or not all(isinstance(ending, str) for ending in targets):
            raise ValueError(
                f"target_modules={targets!r} must be a regular expression that matches whole module names, or a list "
                'of their endings, for example ["q_proj", "v_proj"]'
            )

    @property
    def scaling(self) -> float:
        """alpha / rank, or the default where alpha is None."""
        return SCALING if self.alpha is None else self.alpha / self.rank


class LowRankLinear(ExactWays):
    """A frozen linear layer plus trainable factors: y = x W^T + b + scaling * drop(x) A^T B^T.

    weight is out x in and frozen. bias is out and trainable, or None. Both are the wrapped layer's own parameters and
    keep their names in the state dict. lora_A is rank x in. lora_B is out x rank, and zero after every
    (re-)initialisation. Wrapping and merging therefore do not change the output, and B still gets a gradient.

    The layer computes the plain formula above, unless `refresh` has chosen a cheaper exact way. If that way keeps a
    merged weight, the layer returns to the plain formula when this weight is out of date: after a step of a torch
    optimizer on the layer, a merge, a load or a change in place. Compiled code does not notice a change in place.
    """

    def __init__(self, linear: nn.Linear, config: ReLoRAConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.reinit = config.rank, config.reinit
        self.initial_scaling = config.scaling
        linear.weight.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(self.rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, self.rank))
        self.scaling: nn.Parameter | float = self.initial_scaling
        if config.trainable_scaling:
            self.scaling = nn.Parameter(self.weight.new_tensor(self.initial_scaling))
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output: ... x in -> ... x out."""
        if (faster := self._faster(x)) is not None:
            return faster
        low_rank = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scaling * low_rank

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    @torch.no_grad()
    def initialise(self, *, seed: int, restart: int, name: str) -> None:
        """Draw A from (seed, restart, name), set B to 0, and set a trained scale back to alpha/rank.

        A is drawn on the CPU in fp32, with its own generator. Every replica and every resumed run therefore draws the
        same A, on any device and for any storage type.

        Args:
            seed: The seed of the run.
            restart: The number of the restart; 0 for the first draw.
            name: The module's name in the model.
        """
        self.outdate()
        generator = keyed_generator(f"factor/{seed}/{restart}/{name}")
        a = torch.empty(self.rank, self.in_features, device="cpu")
        if self.reinit == "orthogonal":
            # Kaiming with a = sqrt 5 has variance 1/(3 in), so its rows have the norm 1/sqrt 3.
            nn.init.orthogonal_(a, gain=1 / math.sqrt(3), generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A.copy_(a)
        self.lora_B.zero_()
        if isinstance(self.scaling, nn.Parameter):
            self.scaling.fill_(self.initial_scaling)

    @torch.no_grad()
    def merge(self) -> Tensor:
        """Add scaling * B A to W in place. A and B keep their values.

        The sum is computed in fp32 or wider for every storage type.

        Returns:
            The three norms of `MergeNorms` (weight, delta, lost), as a tensor on the layer's device. The host does not
            wait for the device here.
        """
        self.outdate()
        wide = wide_dtype(self.weight.dtype)
        a, b = self.lora_A.to(wide), self.lora_B.to(wide) * self.scaling
        squares = torch.zeros(3, dtype=torch.float64, device=self.weight.device)
        for rows in row_chunks(self.weight):
            old = self.weight[rows].to(wide, copy=True)
            delta = b[rows] @ a
            self.weight[rows] = old + delta
            lost = delta - (self.weight[rows].to(wide) - old)
            squares += torch.stack([part.norm().double() ** 2 for part in (old, delta, lost)])
        return squares.sqrt()


@dataclass(frozen=True, kw_only=True)
class MergeNorms:
    """Frobenius norms of one merge: W before the merge, the update scaling * B A, and the update's rounding error."""

    weight: float
    delta: float
    lost: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The norms of a merge of a whole model, by module name."""

    modules: dict[str, MergeNorms] = field(repr=False)

    def _total(self, part: str) -> float:
        return math.sqrt(sum(getattr(norms, part) ** 2 for norms in self.modules.values()))

    @property
    def relative_update(self) -> float:
        """The size of the update, |dW| / |W|, over all wrapped matrices."""
        weight = self._total("weight")
        return self._total("delta") / weight if weight > 0 else 0.0

    @property
    def rounding_loss(self) -> float:
        """The share of the update that the storage type could not represent: |dW - stored dW| / |dW|."""
        delta = self._total("delta")
        return self._total("lost") / delta if delta > 0 else 0.0


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Iterate over (name, layer) of every low-rank layer, in the order of the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def wrapped_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the low-rank layers of `model` by name. Raises ValueError if the model is not wrapped."""
    layers = dict(low_rank_layers(model))
    if not layers:
        raise ValueError("the model has no low-rank layers; call wrap(model, ReLoRAConfig(...)) first")
    return layers


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module `name` of `model`, in the same mode: training or evaluation."""
    module.train(model.get_submodule(name).training)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def wrap(model: M, config: ReLoRAConfig, *, seed: int = 0) -> M:
    """Freeze the targeted linear layers of `model` in place and give them factors. The rest stays trainable.

    The output does not change. An optimizer created before this call holds weights that are now frozen: create a new
    one.

    Args:
        model: The model to change.
        config: Which layers get factors, and of which kind.
        seed: The seed of the first draw of each A.

    Returns:
        The same model.

    Raises:
        ValueError: Nothing matches, a listed ending matches no linear layer, the model is already wrapped, the rank
            exceeds min(in, out) of a target, a target is a subclass of nn.Linear, or a target shares its weight with
            another module.
    """
    if any(True for _ in low_rank_layers(model)):
        raise ValueError("the model is wrapped already; call unwrap(model) first")
    targets = targeted_linears(model, config.target_modules, rank=config.rank)
    for name, linear in targets.items():
        layer = LowRankLinear(linear, config)
        layer.initialise(seed=seed, restart=0, name=name)
        replace_module(model, name, layer)
    return model


def targeted_linears(model: nn.Module, target_modules: str | Sequence[str], *, rank: int) -> dict[str, nn.Linear]:
    """Return the linear layers of `model` that factors of `rank` can be given to, by name, in the order of the model.

    Raises:
        ValueError: Nothing matches, a listed ending matches no linear layer, the rank exceeds min(in, out) of a target,
            a target is a subclass of nn.Linear, or a target shares its weight with another module.
    """
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.Linear)
    }
    targets = {name: module for name, module in linears.items() if module_matches(name, target_modules)}
    unmatched = [
        ending
        for ending in ([] if isinstance(target_modules, str) else target_modules)
        if not any(module_matches(name, [ending]) for name in linears)
    ]
    if unmatched or not targets:
        raise ValueError(_no_linear(model, sorted(linears), unmatched or target_modules))
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module_name)
    for name, linear in targets.items():
        limit = min(linear.in_features, linear.out_features)
        if rank > limit:
            raise ValueError(f"rank={rank} exceeds min(in, out)={limit} of {name}; lower the rank")
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(linear).__name__}, and its owner may read its weight directly, without the "
                "factors; leave it out of target_modules"
            )
        if len(owners[id(linear.weight)]) > 1:
            raise ValueError(
                f"the weight of {name} is shared by {owners[id(linear.weight)]}; "
                "untie it or leave it out of target_modules"
            )
    return targets


def _no_linear(model: nn.Module, linears: Sequence[str], targets: str | Sequence[str]) -> str:
    """Return the error message for `targets` that match none of the `linears`."""
    endings = sorted({name.rpartition(".")[2] for name in linears})
    text = f"{targets!r} of target_modules matches no nn.Linear; the model's nn.Linear layers are named "
    text += ", ".join(endings) or "none"
    kinds: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if name and module_matches(name, targets):
            kinds.setdefault(type(module).__name__, set()).add(name.rpartition(".")[2])
    text += "".join(f"; of type {kind} are {', '.join(sorted(names))}" for kind, names in sorted(kinds.items()))
    if "Conv1D" in kinds:
        text += (
            "; Conv1D is the linear layer of transformers' GPT-2, which stores its weight transposed (in x out): "
            "replace each one with an nn.Linear of weight conv1d.weight.T and bias conv1d.bias"
        )
    return text


def merge_and_reinit(model: nn.Module, *, seed: int, restart: int) -> MergeReport:
    """Merge every product into its frozen weight, then draw a new A and set B to 0.

    The output does not change, except by rounding.

    Args:
        model: The wrapped model, changed in place.
        seed: The seed of the run. A is drawn from (seed, restart, module name).
        restart: The number of this restart.

    Returns:
        The norms of the merge, which show the size of the update and of the rounding.

    Raises:
        ValueError: The model is not wrapped.
    """
    norms: dict[str, Tensor] = {}
    for name, layer in wrapped_layers(model).items():
        norms[name] = layer.merge()
        layer.initialise(seed=seed, restart=restart, name=name)
    device = next(iter(norms.values())).device
    values = torch.stack([each.to(device) for each in norms.values()]).tolist()
    return MergeReport(
        modules={
            name: MergeNorms(weight=weight, delta=delta, lost=lost)
            for name, (weight, delta, lost) in zip(norms, values, strict=True)
        }
    )


def unwrap(model: M) -> M:
    """Merge every product and restore plain trainable linear layers, in place.

    Returns the same model. Raises ValueError if the model is not wrapped.
    """
    for name, layer in wrapped_layers(model).items():
        layer.merge()
        replace_module(model, name, plain_linear(layer.weight, layer.bias))
    return model


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return a trainable linear layer with these weights. A `weight` (out x in) that is a parameter is not copied."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = (weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)).requires_grad_(True)
    if bias is not None:
        linear.bias = bias
    return linear
