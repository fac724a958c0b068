"""The cost of a model and a method: parameters, FLOPs and bytes as plain arithmetic, without torch.

Config checks, the summary of a run and plans get sizes here before a model is built. Tests check that these numbers
equal those of the real model, optimizer and FLOP counter.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from relora.budget.replaced import Replaced

STORAGE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}
"""Bytes of one stored weight, gradient or optimizer-state element, by `trainer.precision`."""

COMPUTE_BYTES = {"fp32": 4, "bf16_autocast": 2, "bf16": 2}
"""Bytes of one element of the operands of matrix products, by `trainer.precision`."""

ADAM_MOMENTS = 2
ADAM_STEP_BYTES = 4
"""AdamW keeps two moments of the parameter's shape and one fp32 step count per parameter tensor."""

FACTORS, MATRICES, SCALES, VALUES, REST = "factors", "matrices", "scales", "values", "rest"
"""Roles of parameters: factors, decoder matrices, trained scales, sparse values; embeddings, head, norms, biases."""


@dataclass(frozen=True)
class Trained:
    """The role and the size of a trained parameter tensor."""

    role: str
    rows: int
    columns: int = 1

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.rows * self.columns


class OptimizerCost(Protocol):
    """The cost of an optimizer beyond weights and gradients. `element_bytes` is the size of one stored element."""

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the bytes of the optimizer's state."""
        ...

    def step_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the peak bytes of temporary memory in an optimizer step."""
        ...

    def step_flops(self, trained: Sequence[Trained]) -> int:
        """Return the FLOPs of the matrix products in an optimizer step."""
        ...


class AdamWCost:
    """The cost of AdamW: two moments and a step count per tensor. Torch's fused step needs no temporary memory."""

    def state_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return the bytes of moments and step counts."""
        return ADAM_MOMENTS * element_bytes * sum(each.numel for each in trained) + ADAM_STEP_BYTES * len(trained)

    def step_bytes(self, trained: Sequence[Trained], element_bytes: int) -> int:
        """Return 0: the step needs no temporary memory."""
        return 0

    def step_flops(self, trained: Sequence[Trained]) -> int:
        """Return 0: the step has no matrix products."""
        return 0


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama-style decoder with an untied head and no biases.

    Each of the `kv_heads` heads of keys and values serves heads / kv_heads heads of queries.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int

    @property
    def kv_size(self) -> int:
        """The size of the keys, and of the values, of one token: kv_heads heads of hidden_size / heads."""
        return self.hidden_size // self.heads * self.kv_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (in_features, out_features) of the decoder's linear layers, by module name."""
        hidden, inter, kv = self.hidden_size, self.intermediate_size, self.kv_size
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inter),
            "mlp.up_proj": (hidden, inter),
            "mlp.down_proj": (inter, hidden),
        }
        return {f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in block.items()}

    def full_rank_parameters(self) -> dict[str, int]:
        """Return the sizes of the modules that every method trains at full rank: embeddings, head and norms."""
        norms = {
            f"model.layers.{layer}.{name}": self.hidden_size
            for layer in range(self.layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        table = self.vocab_size * self.hidden_size
        return {"model.embed_tokens": table, "lm_head": table, "model.norm": self.hidden_size, **norms}

    @property
    def parameters(self) -> int:
        """The number of all parameters: two tables, a final norm, and per layer two norms and seven matrices."""
        hidden, inter = self.hidden_size, self.intermediate_size
        layer = 2 * hidden * hidden + 2 * hidden * self.kv_size + 3 * hidden * inter + 2 * hidden
        return 2 * self.vocab_size * hidden + hidden + self.layers * layer


PLAIN, FACTORED, PROJECTED = "plain", "factored", "projected"
"""The exact ways to compute a low-rank linear layer.

- plain: without the merged weight W + sBA.
- factored: on the merged weight, with the factors' gradients through x A^T and g B.
- projected: on the merged weight, with the factors' gradients projected from the gradient of the whole matrix.
"""
MERGED_WEIGHTS = ("resident", "rebuilt", "never")


def way_multiply_adds(
    in_features: int, out_features: int, rank: int, *, merged_weight: str, tokens_per_micro_step: int, micro_steps: int
) -> dict[str, int]:
    """Count the multiply-adds of one low-rank linear layer in one optimizer step, forward and backward.

    With in = i, out = o and rank = r, forming W + sBA takes rio. A resident W + sBA is formed once per optimizer step.
    A rebuilt one is formed in each pass of each micro-step. Projecting the gradient of the whole matrix takes 2rio per
    micro-step.

    The keys of the result are the ways. With merged_weight="never", only the plain way is possible.
    """
    whole, skinny = in_features * out_features, rank * (in_features + out_features)
    tokens = tokens_per_micro_step * micro_steps
    ways = {PLAIN: tokens * (2 * whole + 3 * skinny)}
    if merged_weight != "never":
        formed = rank * whole * (1 if merged_weight == "resident" else 2 * micro_steps)
        ways[FACTORED] = tokens * (2 * whole + 2 * skinny) + formed
        ways[PROJECTED] = tokens * 3 * whole + 2 * rank * whole * micro_steps + formed
    return ways


MANY_TOKENS = 2**20


@lru_cache(maxsize=1024)
def cheapest_way(
    in_features: int,
    out_features: int,
    rank: int,
    *,
    merged_weight: str = "resident",
    tokens_per_micro_step: int | None = None,
    micro_steps: int = 1,
) -> str:
    """Return the way with the fewest multiply-adds. Of equal ways, prefer factored, then projected, then plain.

    In benchmarks, the plain way took the most time at equal multiply-adds (docs/performance.md).
    `tokens_per_micro_step` None means `MANY_TOKENS`.
    """
    ways = way_multiply_adds(
        in_features,
        out_features,
        rank,
        merged_weight=merged_weight,
        tokens_per_micro_step=tokens_per_micro_step or MANY_TOKENS,
        micro_steps=micro_steps,
    )
    return min((way for way in (FACTORED, PROJECTED, PLAIN) if way in ways), key=lambda way: ways[way])


CONTROL_ASPECT_TOLERANCE = 0.08
CONTROL_COUNT_TOLERANCE = 0.01


def control_shape(shape: LlamaShape, trainable_parameters: int) -> LlamaShape:
    """Return a smaller full-rank model with `trainable_parameters` parameters: the paper's "control" baseline.

    Its aspect (hidden size divided by layers) is within 8% of the aspect of `shape`. The intermediate size is chosen so
    that the number of parameters is right within 1%. Of all such models, the result is the one whose ratio of
    intermediate to hidden size is nearest to that of `shape`. As many heads of queries share keys and values as there.
    Raises ValueError if there is no such model.
    """
    if trainable_parameters >= shape.parameters:
        raise ValueError(
            f"the method trains {trainable_parameters:,} parameters, and full rank trains {shape.parameters:,}, so "
            "there is no smaller model to compare with; lower method.rank"
        )
    aspect, proportion = shape.hidden_size / shape.layers, shape.intermediate_size / shape.hidden_size
    head_size, group = shape.hidden_size // shape.heads, shape.heads // shape.kv_heads
    best: tuple[float, LlamaShape] | None = None
    for layers in range(1, shape.layers + 1):
        near = layers * aspect / 8
        lowest = max(1, math.floor(near * (1 - CONTROL_ASPECT_TOLERANCE)))
        highest = min(shape.hidden_size // 8, math.ceil(near * (1 + CONTROL_ASPECT_TOLERANCE)))
        for hidden in range(8 * lowest, 8 * highest + 1, 8):
            if abs(hidden / layers / aspect - 1) > CONTROL_ASPECT_TOLERANCE:
                continue
            matrices, attention = 3 * hidden * layers, 2 * hidden * hidden + 2 * hidden * hidden // group
            fixed = 2 * shape.vocab_size * hidden + hidden + layers * (attention + 2 * hidden)
            intermediate = max(8, round((trainable_parameters - fixed) / matrices / 8) * 8)
            if abs((fixed + matrices * intermediate) / trainable_parameters - 1) > CONTROL_COUNT_TOLERANCE:
                continue
            distance = abs(math.log(intermediate / hidden / proportion))
            if best is not None and distance >= best[0]:
                continue
            heads = _heads(hidden, head_size, group)
            if heads is not None:
                sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "layers": layers}
                best = distance, replace(shape, **sizes, heads=heads, kv_heads=heads // group)
    if best is None:
        raise ValueError(
            f"no full-rank model with {trainable_parameters:,} parameters has the hidden size per layer of {shape} "
            f"within {CONTROL_ASPECT_TOLERANCE:.0%}"
        )
    return best[1]


def _heads(hidden_size: int, head_size: int, group: int) -> int | None:
    """Return the fewest heads with an even size nearest to `head_size`, within a factor of 2, or None if impossible.

    Their number is a multiple of `group`.
    """
    low, high = max(2, math.ceil(head_size / 2)), min(hidden_size, 2 * head_size)
    sizes = [size for size in range(high, low - 1, -1) if size % 2 == 0 and hidden_size % (size * group) == 0]
    return hidden_size // min(sizes, key=lambda size: abs(size - head_size)) if sizes else None


def module_matches(name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether `target_modules` targets the module `name`.

    A regular expression must match the whole name. A name in a list must be the ending of `name` and consist of whole
    components: "proj" does not match "q_proj", and "self_attn.q_proj" matches in every layer.
    """
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in target_modules)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a model with a method. A multiply-add is two FLOPs. Attention counts as a full, non-causal square."""

    parameters: int
    """Parameters of the exported model. Factors are merged into it and do not count."""
    trainable_parameters: int
    wrapped: tuple[tuple[int, int], ...]
    """(in_features, out_features) of every matrix that has factors."""
    rank: int
    """Rank of the factors, or 0 without factors."""
    mergeable: bool
    """Whether a pass may use W + sBA. With dropout it may not."""
    unwrapped_flops_per_token: int
    """FLOPs of one token, forward and backward, without the wrapped matrices and the optimizer.

    Those of replaced layers that do not depend on the number of tokens are missing too.
    """
    merge_flops: int
    """FLOPs of one restart: a merge of all wrapped matrices, or what a replaced layer does."""
    optimizer_flops: int
    """FLOPs of the matrix products in one step of the optimizer. 0 for AdamW, which has none."""
    weight_bytes: int
    """Bytes of all weights, factors included."""
    trainable_scaling: bool
    computed_bytes: int
    """Bytes of one element of the operands of matrix products, such as W + sBA."""
    gradient_bytes: int
    largest_gradient_bytes: int
    """Bytes of the gradient of the largest parameter."""
    optimizer_bytes: int
    """Bytes of the optimizer's state."""
    optimizer_step_bytes: int
    """Peak bytes of temporary memory in the optimizer's step. 0 for fused AdamW."""
    replaced: tuple["Replaced", ...] = ()
    """The cost of each layer that takes the place of a matrix, in the order of the model."""

    def ways(self, merged_weight: str, *, tokens_per_micro_step: int, micro_steps: int) -> tuple[str, ...]:
        """Return the way to compute each wrapped matrix. `cheapest_way` has the arguments."""
        return tuple(
            cheapest_way(
                *shape,
                self.rank,
                merged_weight=merged_weight if self.mergeable else "never",
                tokens_per_micro_step=tokens_per_micro_step,
                micro_steps=micro_steps,
            )
            for shape in self.wrapped
        )

    def merged_weight_bytes(self, *, tokens_per_micro_step: int, micro_steps: int) -> int:
        """Return the bytes of all resident W + sBA, which are those of matrices that are not computed the plain way."""
        ways = self.ways("resident", tokens_per_micro_step=tokens_per_micro_step, micro_steps=micro_steps)
        merged = (i * o for (i, o), way in zip(self.wrapped, ways, strict=True) if way != PLAIN)
        return self.computed_bytes * sum(merged)

    def flops_per_update(self, tokens: int, *, merged_weight: str = "resident", micro_steps: int = 1) -> int:
        """Return the training FLOPs of one optimizer step, with every wrapped matrix computed by its cheapest way.

        `tokens` and `micro_steps` are the numbers in one step. The defaults give the exact minimum of the method: W +
        sBA is formed once, if it may be formed.
        """
        if not self.mergeable:
            merged_weight = "never"
        ways = (
            way_multiply_adds(
                *shape,
                self.rank,
                merged_weight=merged_weight,
                tokens_per_micro_step=tokens // micro_steps,
                micro_steps=micro_steps,
            )
            for shape in self.wrapped
        )
        wrapped_flops = 2 * sum(min(each.values()) for each in ways)
        formed_flops = micro_steps * sum(each.flops_per_micro_step for each in self.replaced)
        return self.unwrapped_flops_per_token * tokens + wrapped_flops + formed_flops + self.optimizer_flops


def cost(
    shape: LlamaShape,
    *,
    sequence_length_tokens: int,
    precision: str = "fp32",
    rank: int | None = None,
    target_modules: str | Sequence[str] = (),
    trainable_scaling: bool = False,
    mergeable: bool = True,
    replaced: "Mapping[str, Replaced] | None" = None,
    optimizer: OptimizerCost | None = None,
) -> Cost:
    """Return the cost of training a model at full rank, with low-rank factors, or with other layers for its matrices.

    Per token, a trained linear layer of i x o takes 2io FLOPs forward and 4io backward. `way_multiply_adds` counts a
    wrapped one. Attention takes 4 * sequence * hidden per layer forward (scores and mixture) and twice that backward.

    Args:
        precision: A key of `STORAGE_BYTES`.
        rank: The rank of the factors. None means full rank.
        target_modules: The matrices that get factors (`module_matches`).
        trainable_scaling: Whether each wrapped matrix has a trained scale.
        mergeable: Whether a pass may use W + sBA.
        replaced: The matrices, by name, that other layers replace. They have no `rank` and no `target_modules`.
        optimizer: The cost of the optimizer. None means AdamW.
    """
    linears, others = shape.linears(), replaced or {}
    wrapped = {name for name in linears if rank is not None and module_matches(name, target_modules)}
    weights = {name: i * o for name, (i, o) in linears.items()}
    trained = [Trained(REST, numel) for numel in shape.full_rank_parameters().values()]
    trained += [Trained(MATRICES, o, i) for name, (i, o) in linears.items() if name not in wrapped | others.keys()]
    factors: list[Trained] = []
    for name in wrapped:
        i, o = linears[name]
        assert rank is not None
        factors += [Trained(FACTORS, rank, i), Trained(FACTORS, o, rank)]
        factors += [Trained(SCALES, 1)] if trainable_scaling else []
    factors += [tensor for each in others.values() for tensor in each.trained]
    trained += factors

    parameters, trainable = shape.parameters, sum(each.numel for each in trained)
    own = optimizer or AdamWCost()

    head_flops = 2 * shape.vocab_size * shape.hidden_size
    attention_flops = 4 * sequence_length_tokens * shape.hidden_size * shape.layers
    unwrapped = 2 * sum(n for name, n in weights.items() if name not in wrapped | others.keys())
    replaced_flops = sum(each.flops_per_token for each in others.values())
    # The matrices that are not in memory, and tensors that are and have no gradient.
    absent = sum(weights[name] for name in others)
    fixed_bytes = sum(each.fixed_bytes for each in others.values())

    element_bytes = STORAGE_BYTES[precision]
    return Cost(
        parameters=parameters,
        trainable_parameters=trainable,
        wrapped=tuple(linears[name] for name in linears if name in wrapped),
        rank=rank or 0,
        mergeable=mergeable,
        unwrapped_flops_per_token=3 * (unwrapped + head_flops + attention_flops) + replaced_flops,
        merge_flops=sum(each.restart_flops for each in others.values())
        if rank is None
        else sum(2 * rank * weights[name] for name in wrapped),
        weight_bytes=(parameters - absent + sum(each.numel for each in factors)) * element_bytes + fixed_bytes,
        trainable_scaling=trainable_scaling,
        computed_bytes=COMPUTE_BYTES[precision],
        gradient_bytes=trainable * element_bytes,
        largest_gradient_bytes=max(each.numel for each in trained) * element_bytes,
        optimizer_flops=own.step_flops(trained),
        optimizer_step_bytes=own.step_bytes(trained, element_bytes),
        optimizer_bytes=own.state_bytes(trained, element_bytes),
        replaced=tuple(others[name] for name in linears if name in others),
    )


def break_even_rank(
    shape: LlamaShape,
    *,
    sequence_length_tokens: int,
    target_modules: str | Sequence[str],
    tokens_per_update: int,
    merged_weight: str = "resident",
    micro_steps: int = 1,
) -> int:
    """Return the highest rank at which an optimizer step takes fewer FLOPs than at full rank, or 0 if there is none.

    `tokens_per_update` and `micro_steps` are the numbers in one step. The other arguments are those of `cost`.
    """

    def flops(rank: int | None) -> int:
        made = cost(shape, sequence_length_tokens=sequence_length_tokens, rank=rank, target_modules=target_modules)
        return made.flops_per_update(tokens_per_update, merged_weight=merged_weight, micro_steps=micro_steps)

    highest = min(min(each) for name, each in shape.linears().items() if module_matches(name, target_modules))
    return bisect_left(range(1, highest + 1), flops(None), key=flops)
