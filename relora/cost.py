"""What a model and a method cost: parameters, FLOPs and bytes as plain arithmetic, without torch.

Everything that must know a size before anything is built asks here: config checks, the summary of a run, plans. Tests
hold these numbers equal to the real model, optimizer and FLOP counter.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

STORAGE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}
"""Bytes of one stored weight, gradient or optimizer-state element, by `trainer.precision`."""

ADAM_MOMENTS = 2
ADAM_STEP_BYTES = 4
"""AdamW keeps two moments of the parameter's shape and one fp32 step count per parameter tensor."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama-style decoder with an untied head and no biases."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocab_size: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """The decoder's linear layers, by module name: (in_features, out_features)."""
        hidden, inter = self.hidden_size, self.intermediate_size
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, hidden),
            "self_attn.v_proj": (hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inter),
            "mlp.up_proj": (hidden, inter),
            "mlp.down_proj": (inter, hidden),
        }
        return {f"model.layers.{layer}.{name}": shape for layer in range(self.layers) for name, shape in block.items()}

    def full_rank_parameters(self) -> dict[str, int]:
        """Parameters that every method trains at full rank, by name: embeddings, head and norms."""
        norms = {
            f"model.layers.{layer}.{name}": self.hidden_size
            for layer in range(self.layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        table = self.vocab_size * self.hidden_size
        return {"model.embed_tokens": table, "lm_head": table, "model.norm": self.hidden_size, **norms}

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.full_rank_parameters().values()) + sum(i * o for i, o in self.linears().values())


CONTROL_ASPECT_TOLERANCE = 0.08
CONTROL_COUNT_TOLERANCE = 0.01


def control_shape(shape: LlamaShape, trainable_parameters: int) -> LlamaShape:
    """A smaller full-rank model that trains `trainable_parameters`: the paper's "control" baseline.

    Its aspect (hidden size over layers) stays within 8% of `shape`'s, the intermediate size takes up the slack, and of
    the shapes that meet the count within 1% the one whose intermediate size is nearest to `shape`'s proportion is
    taken. Raises ValueError with the reason where there is none.
    """
    if trainable_parameters >= shape.parameters:
        raise ValueError(
            f"the method trains {trainable_parameters:,} parameters, full rank {shape.parameters:,}: "
            "there is no smaller model to compare with; lower method.rank"
        )
    aspect, proportion = shape.hidden_size / shape.layers, shape.intermediate_size / shape.hidden_size
    head_size = shape.hidden_size // shape.heads
    best: tuple[float, LlamaShape] | None = None
    for layers in range(1, shape.layers + 1):
        for hidden in range(8, shape.hidden_size + 1, 8):
            if abs(hidden / layers / aspect - 1) > CONTROL_ASPECT_TOLERANCE:
                continue
            heads = [
                n
                for n in range(1, hidden // 2 + 1)
                if hidden % (2 * n) == 0 and head_size / 2 <= hidden / n <= 2 * head_size
            ]
            if not heads:
                continue
            candidate = LlamaShape(
                hidden_size=hidden,
                intermediate_size=0,
                layers=layers,
                heads=min(heads, key=lambda n: abs(hidden / n - head_size)),
                vocab_size=shape.vocab_size,
            )
            room = trainable_parameters - candidate.parameters
            intermediate = max(8, round(room / (3 * hidden * layers) / 8) * 8)
            candidate = replace(candidate, intermediate_size=intermediate)
            if abs(candidate.parameters / trainable_parameters - 1) > CONTROL_COUNT_TOLERANCE:
                continue
            distance = abs(math.log(intermediate / hidden / proportion))
            if best is None or distance < best[0]:
                best = distance, candidate
    if best is None:
        raise ValueError(
            f"no full-rank model of {trainable_parameters:,} parameters has the aspect of {shape} within "
            f"{CONTROL_ASPECT_TOLERANCE:.0%}"
        )
    return best[1]


def module_matches(name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether the module `name` is targeted: a regular expression matches it whole, or a listed name is its ending.

    An ending is whole components: "proj" does not match "q_proj", "self_attn.q_proj" matches in every layer.
    """
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in target_modules)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model x method takes. FLOPs count a multiply-add as two and attention as a full (non-causal) square."""

    parameters: int
    """Of the model that leaves the run: factors are merged into it and not counted."""
    trainable_parameters: int
    forward_flops_per_token: int
    training_flops_per_token: int
    """Forward and backward of one token; no optimizer, no merge."""
    merge_flops: int
    """One merge of every wrapped matrix."""
    projection_flops: int
    """GaLore's, in one update: to the subspace and back, and its share of the decompositions."""
    weight_bytes: int
    """Factors included."""
    gradient_bytes: int
    optimizer_bytes: int
    """AdamW's state."""

    def flops_per_update(self, tokens: int) -> int:
        """Training FLOPs of one update on `tokens` tokens."""
        return self.training_flops_per_token * tokens + self.projection_flops


def cost(
    shape: LlamaShape,
    *,
    sequence_length_tokens: int,
    precision: str = "fp32",
    rank: int | None = None,
    target_modules: str | Sequence[str] = (),
    trainable_scaling: bool = False,
    galore_rank: int | None = None,
    galore_interval_steps: int = 1,
) -> Cost:
    """The cost of training `shape` at full rank (`rank=None`) or with factors of `rank` in `target_modules`.

    With `galore_rank` the targeted matrices are trained whole and their optimizer state is low-rank: two moments of
    r x max(i, o) and a projector of r x min(i, o).

    Per token, a trained linear of i x o takes 2io forward and 4io backward. A frozen one takes 2io and 2io (its weight
    needs no gradient) and its factors 2r(i+o) and 4r(i+o). Attention takes 4 * sequence * hidden per layer forward
    (scores and mixture) and twice that backward. A singular value decomposition of m x n, m >= n, takes
    6mn^2 + 20n^3 (Golub and Van Loan, Matrix Computations, R-SVD).
    """
    linears = shape.linears()
    wrapped = {name for name in linears if rank is not None and module_matches(name, target_modules)}
    weights = {name: i * o for name, (i, o) in linears.items()}
    trained_numel = [*shape.full_rank_parameters().values(), *(n for name, n in weights.items() if name not in wrapped)]
    factors_numel: list[int] = []
    for name in wrapped:
        i, o = linears[name]
        assert rank is not None
        factors_numel += [rank * i, rank * o] + ([1] if trainable_scaling else [])

    parameters = shape.parameters
    trainable = sum(trained_numel) + sum(factors_numel)

    head_flops = 2 * shape.vocab_size * shape.hidden_size
    attention_flops = 4 * sequence_length_tokens * shape.hidden_size * shape.layers
    forward = 2 * sum(weights.values()) + head_flops + attention_flops
    backward = 2 * forward - 2 * sum(weights[name] for name in wrapped)
    for name in wrapped:
        i, o = linears[name]
        assert rank is not None
        forward += 2 * rank * (i + o)
        backward += 4 * rank * (i + o)

    projected = {name for name in linears if galore_rank is not None and module_matches(name, target_modules)}
    projection_flops, state_numel = 0.0, ADAM_MOMENTS * trainable
    for name in projected:
        assert galore_rank is not None
        short, long = sorted(linears[name])
        decomposition = 6 * long * short**2 + 20 * short**3
        projection_flops += 4 * galore_rank * short * long + decomposition / galore_interval_steps
        state_numel += galore_rank * (short + ADAM_MOMENTS * long) - ADAM_MOMENTS * short * long

    element_bytes = STORAGE_BYTES[precision]
    trained_tensors = len(trained_numel) + len(factors_numel)
    return Cost(
        parameters=parameters,
        trainable_parameters=trainable,
        forward_flops_per_token=forward,
        training_flops_per_token=forward + backward,
        merge_flops=0 if rank is None else sum(2 * rank * weights[name] for name in wrapped),
        weight_bytes=(parameters + sum(factors_numel)) * element_bytes,
        gradient_bytes=trainable * element_bytes,
        projection_flops=round(projection_flops),
        optimizer_bytes=state_numel * element_bytes + ADAM_STEP_BYTES * trained_tensors,
    )
