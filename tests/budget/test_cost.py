from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from small import REPOSITORY
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from relora.budget.cost import (
    FACTORED,
    PLAIN,
    PROJECTED,
    STORAGE_BYTES,
    Cost,
    cheapest_way,
    control_shape,
    cost,
    module_matches,
    way_multiply_adds,
)
from relora.config.groups import ModelConfig
from relora.core.exact_ways import refresh
from relora.core.lowrank import ReLoRAConfig, merge_and_reinit, wrap
from relora.training.model import llama_config

CONF = REPOSITORY / "conf" / "model"
VOCAB_SIZE = 32_100
RANK = 128
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH, SEQUENCE_LENGTH = 2, 48


class Size(NamedTuple):
    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    full_millions: float | None = None
    trainable_millions: float | None = None
    """With factors of rank 128 in every linear layer of the decoder."""
    kv_heads: int | None = None
    positions: int = 1024


SIZES = {
    "9m": Size(128, 352, 4, 4),
    "20m": Size(256, 688, 4, 4),
    "35m": Size(384, 1024, 8, 6),
    "60m": Size(512, 1376, 8, 8, 58.18, 42.87),
    "130m": Size(768, 2048, 12, 12, 134.26, 71.74),
    "250m": Size(768, 2560, 16, 24, 247.52, 98.89),
    "350m": Size(1024, 2736, 16, 24, 368.17, 125.61),
    "1b": Size(2048, 5461, 32, 24, 1339.49, 251.12),
    "7b": Size(4096, 11008, 32, 32),
}
GROUPED = {
    "pico_tiny": Size(96, 384, 12, 12, kv_heads=4, positions=2048),
    "pico_small": Size(384, 1536, 12, 12, kv_heads=4, positions=2048),
}
"""Models in which several heads of queries share a head of keys and values."""
PUBLISHED = {name: size for name, size in SIZES.items() if size.full_millions is not None}

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "low_rank": {"rank": RANK, "target_modules": ALL_LINEARS},
    "trainable_scaling": {"rank": RANK, "target_modules": ALL_LINEARS, "trainable_scaling": True},
    "rank_16": {"rank": 16, "target_modules": ALL_LINEARS},
    "some_modules": {"rank": 32, "target_modules": ("q_proj", "self_attn.v_proj", "down_proj")},
    "some_layers": {"rank": 16, "target_modules": r"model\.layers\.[01]\.mlp\..*", "trainable_scaling": True},
}
CASES = [(size, arm) for size in SIZES for arm in ("full", "low_rank")]
CASES += [("9m", arm) for arm in ARMS if ("9m", arm) not in CASES]
CASES += [(size, arm) for size in GROUPED for arm in ("full", "rank_16")]


def conf_of(size: str) -> ModelConfig:
    name = size if size in GROUPED else f"llama_{size}"
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(values, dict)
    return ModelConfig(**{str(name): value for name, value in values.items()})


def real_model(config: ModelConfig, arm: dict[str, Any], *, device: str, vocab_size: int = VOCAB_SIZE) -> nn.Module:
    """What transformers builds, with attention as the matrix products that the FLOP counter sees."""
    hf_config = llama_config(config, config.shape(vocab_size))
    hf_config._attn_implementation = "eager"
    with torch.device(device):
        model = LlamaForCausalLM(hf_config)
    return wrap(model, ReLoRAConfig(**arm)) if arm else model


def cost_of(config: ModelConfig, arm: dict[str, Any], *, vocab_size: int = VOCAB_SIZE, precision: str = "fp32") -> Cost:
    return cost(config.shape(vocab_size), sequence_length_tokens=SEQUENCE_LENGTH, precision=precision, **arm)


def training_forward(model: nn.Module, device: str, vocab_size: int) -> Tensor:
    tokens_BxT = torch.zeros(BATCH, SEQUENCE_LENGTH, dtype=torch.long, device=device)
    if device != "meta":
        tokens_BxT.random_(vocab_size, generator=torch.Generator().manual_seed(0))
    mask_Bx1xTxT = torch.zeros(BATCH, 1, SEQUENCE_LENGTH, SEQUENCE_LENGTH, device=device)
    return model(input_ids=tokens_BxT, attention_mask=mask_Bx1xTxT, use_cache=False).logits


def bytes_of(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


# ---------------------------------------------------------------------------------------------------- model sizes


@pytest.mark.parametrize("size", [*SIZES, *GROUPED])
def test_the_configured_sizes_are_those_of_the_published_table(size: str) -> None:
    expected = {**SIZES, **GROUPED}[size]
    assert asdict(conf_of(size)) == {
        "name": size if size in GROUPED else f"llama_{size}",
        "hidden_size": expected.hidden_size,
        "intermediate_size": expected.intermediate_size,
        "layers": expected.layers,
        "heads": expected.heads,
        "kv_heads": expected.kv_heads,
        "vocab_size": None,
        "max_position_embeddings": expected.positions,
        "rms_norm_eps": 1e-6,
    }


def test_every_configured_model_is_tested_here() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {f"llama_{size}" for size in [*SIZES, "tiny"]} | set(GROUPED)


def test_the_tiny_model_has_the_body_of_the_smallest_size() -> None:
    assert {**asdict(conf_of("tiny")), "name": "llama_9m"} == asdict(conf_of("9m"))


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones_to_two_decimals(size: str) -> None:
    expected, low_rank = PUBLISHED[size], cost_of(conf_of(size), ARMS["low_rank"])
    assert round(low_rank.parameters / 1e6, 2) == expected.full_millions
    assert round(low_rank.trainable_parameters / 1e6, 2) == expected.trainable_millions


# ------------------------------------------------------------------------------------ arithmetic against real models


@pytest.mark.parametrize("size", [*SIZES, *GROUPED, "tiny"])
def test_layer_names_and_shapes_are_those_of_the_real_model(size: str) -> None:
    shape = conf_of(size).shape(VOCAB_SIZE)
    model = real_model(conf_of(size), ARMS["full"], device="meta")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    del linears["lm_head"]
    assert shape.linears() == {name: (module.in_features, module.out_features) for name, module in linears.items()}
    others = {name.removesuffix(".weight"): p.numel() for name, p in model.named_parameters()}
    assert shape.full_rank_parameters() == {name: numel for name, numel in others.items() if name not in linears}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "arm"), CASES)
def test_parameters_flops_and_bytes_are_those_of_the_real_model(size: str, arm: str) -> None:
    expected = cost_of(conf_of(size), ARMS[arm])
    model = real_model(conf_of(size), ARMS[arm], device="meta")
    tokens = BATCH * SEQUENCE_LENGTH
    with FlopCounterMode(display=False) as forward:
        output = training_forward(model, "meta", VOCAB_SIZE)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    parameters = dict(model.named_parameters())
    added = [p for name, p in parameters.items() if name.endswith(("lora_A", "lora_B", "scaling"))]
    assert expected.parameters == sum(p.numel() for p in parameters.values()) - sum(p.numel() for p in added)
    assert expected.trainable_parameters == sum(p.numel() for p in trainable(model))
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert expected.flops_per_update(tokens, merged_weight="never") == counted
    assert expected.weight_bytes == bytes_of(list(parameters.values()))
    assert expected.gradient_bytes == bytes_of([p.grad for p in parameters.values()])
    optimizer = torch.optim.AdamW(trainable(model), foreach=False)
    optimizer.step()
    assert expected.optimizer_bytes == bytes_of(state_tensors(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arm", ARMS)
def test_bytes_are_those_of_a_real_model_after_a_real_step(arm: str, dtype: torch.dtype) -> None:
    config, vocab_size = conf_of("tiny"), 512
    precision = "fp32" if dtype == torch.float32 else "bf16"
    expected = cost_of(config, ARMS[arm], vocab_size=vocab_size, precision=precision)
    model = real_model(config, ARMS[arm], device="cpu", vocab_size=vocab_size).to(dtype)
    optimizer = torch.optim.AdamW(trainable(model), fused=True)
    training_forward(model, "cpu", vocab_size).float().logsumexp(-1).sum().backward()
    optimizer.step()
    assert expected.weight_bytes == bytes_of(list(model.parameters()))
    assert expected.gradient_bytes == bytes_of([p.grad for p in model.parameters()])
    assert expected.optimizer_bytes == bytes_of(state_tensors(optimizer))


@pytest.mark.parametrize("arm", ARMS)
def test_merge_flops_are_those_of_a_real_merge(arm: str) -> None:
    config, vocab_size = conf_of("tiny"), 512
    model = real_model(config, ARMS[arm], device="cpu", vocab_size=vocab_size)
    with FlopCounterMode(display=False) as counter:
        if ARMS[arm]:
            merge_and_reinit(model, seed=0, restart=1)
    assert cost_of(config, ARMS[arm], vocab_size=vocab_size).merge_flops == counter.get_total_flops()


def test_autocast_stores_what_fp32_stores_and_bf16_half_of_it() -> None:
    costs = {precision: cost_of(conf_of("60m"), ARMS["low_rank"], precision=precision) for precision in STORAGE_BYTES}
    assert costs["bf16_autocast"] == replace(costs["fp32"], computed_bytes=costs["bf16"].computed_bytes)
    merged = {name: each.merged_weight_bytes(tokens_per_micro_step=4096, micro_steps=1) for name, each in costs.items()}
    assert merged["bf16"] * 2 == merged["bf16_autocast"] * 2 == merged["fp32"] == 4 * 25_296_896
    assert costs["bf16"].weight_bytes * 2 == costs["fp32"].weight_bytes
    assert costs["bf16"].gradient_bytes * 2 == costs["fp32"].gradient_bytes
    assert costs["bf16"].flops_per_update(96) == costs["fp32"].flops_per_update(96)


@pytest.mark.slow
@pytest.mark.parametrize("tokens_at_a_time", [8, 48, 96])
@pytest.mark.parametrize("merged_weight", ["resident", "rebuilt"])
@pytest.mark.parametrize("arm", [name for name in ARMS if name != "full"])
def test_flops_on_the_merged_weight_are_those_of_the_real_model(
    arm: str, merged_weight: str, tokens_at_a_time: int
) -> None:
    config, vocab_size = conf_of("tiny"), 512
    model = real_model(config, ARMS[arm], device="cpu", vocab_size=vocab_size)
    micro_steps = BATCH * SEQUENCE_LENGTH // tokens_at_a_time
    tokens_BxT = torch.zeros(1, tokens_at_a_time, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        refresh(model, merged_weight=merged_weight, tokens_per_micro_step=tokens_at_a_time, micro_steps=micro_steps)
        for _ in range(micro_steps):
            model(input_ids=tokens_BxT, use_cache=False).logits.sum().backward()
    expected = cost(config.shape(vocab_size), sequence_length_tokens=tokens_at_a_time, **ARMS[arm])
    assert counter.get_total_flops() == expected.flops_per_update(
        BATCH * SEQUENCE_LENGTH, merged_weight=merged_weight, micro_steps=micro_steps
    )


@pytest.mark.parametrize(("rank", "way"), [(8, FACTORED), (31, FACTORED), (33, PROJECTED), (64, PROJECTED)])
def test_above_a_quarter_of_a_square_matrix_the_whole_gradient_is_projected(rank: int, way: str) -> None:
    assert cheapest_way(128, 128, rank) == way
    assert cheapest_way(128, 128, rank, merged_weight="never") == PLAIN


def test_few_tokens_do_not_pay_for_a_merged_weight() -> None:
    # A layer of 2048 x 2048 at rank 128, 512 tokens an update.
    assert cheapest_way(2048, 2048, 128, tokens_per_micro_step=512) == PLAIN
    assert cheapest_way(2048, 2048, 128, tokens_per_micro_step=512, micro_steps=3) == FACTORED
    assert cheapest_way(2048, 2048, 128, tokens_per_micro_step=512, micro_steps=3, merged_weight="rebuilt") == PLAIN


def test_of_equally_cheap_ways_the_plain_way_is_taken_last() -> None:
    shape, settings = (1024, 1024, 128), {"merged_weight": "rebuilt", "tokens_per_micro_step": 1024}
    ways = way_multiply_adds(*shape, micro_steps=1, **settings)  # type: ignore[arg-type]
    assert ways[PLAIN] == ways[FACTORED] < ways[PROJECTED]
    assert cheapest_way(*shape, **settings) == FACTORED  # type: ignore[arg-type]


def test_targets_without_a_rank_are_full_rank() -> None:
    config = conf_of("60m")
    assert cost_of(config, {"target_modules": ALL_LINEARS}) == cost_of(config, {})


# --------------------------------------------------------------------------------------------- names of the targets


@pytest.mark.parametrize(
    ("target_modules", "matches"),
    [
        (["q_proj"], True),
        (["self_attn.q_proj"], True),
        (["model.layers.0.self_attn.q_proj"], True),
        (["k_proj", "q_proj"], True),
        (("q_proj",), True),
        (["proj"], False),
        (["_proj"], False),
        (["attn.q_proj"], False),
        (["q_pro"], False),
        (["self_attn"], False),
        (["model.layers.1.self_attn.q_proj"], False),
        (["q.proj"], False),
        ([".*q_proj"], False),
        ([""], False),
        ([], False),
        (r".*\.q_proj", True),
        (r"model\.layers\.\d+\.self_attn\.(q|v)_proj", True),
        ("q_proj", False),
        (r".*\.q_pro", False),
        (r"model\.layers\.1.*", False),
        ("", False),
    ],
)
def test_a_target_is_a_regular_expression_or_an_ending_of_whole_components(
    target_modules: str | Sequence[str], matches: bool
) -> None:
    assert module_matches("model.layers.0.self_attn.q_proj", target_modules) is matches


@pytest.mark.parametrize("vocab_size", [2048, VOCAB_SIZE])
@pytest.mark.parametrize("rank", [8, 32, 128])
@pytest.mark.parametrize("size", SIZES)
def test_a_control_model_has_the_trainable_count_and_the_aspect(size: str, rank: int, vocab_size: int) -> None:
    shape = conf_of(size).shape(vocab_size)
    matched = cost(
        shape, sequence_length_tokens=SEQUENCE_LENGTH, rank=rank, target_modules=["q_proj", "o_proj", "down_proj"]
    ).trainable_parameters
    if matched >= shape.parameters:
        with pytest.raises(ValueError, match="there is no smaller model"):
            control_shape(shape, matched)
        return
    control = control_shape(shape, matched)
    assert control.parameters == pytest.approx(matched, rel=0.01)
    assert control.hidden_size / control.layers == pytest.approx(shape.hidden_size / shape.layers, rel=0.08)
    assert control.hidden_size % (2 * control.heads) == 0
    assert control.intermediate_size > 0


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("size", GROUPED)
def test_a_control_model_shares_keys_and_values_as_the_model_does(size: str, rank: int) -> None:
    shape = conf_of(size).shape(50304)
    matched = cost(shape, sequence_length_tokens=64, rank=rank, target_modules=ALL_LINEARS).trainable_parameters
    control = control_shape(shape, matched)
    assert control.parameters == pytest.approx(matched, rel=0.01)
    assert control.heads == 3 * control.kv_heads
    assert control.hidden_size % (2 * control.heads) == 0


def test_a_method_that_trains_more_than_full_rank_has_no_control() -> None:
    shape = conf_of("9m").shape(VOCAB_SIZE)
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    matched = cost(shape, sequence_length_tokens=64, rank=128, target_modules=everything).trainable_parameters
    with pytest.raises(ValueError, match=r"9,480,320 parameters.* 9,021,568,.*lower method\.rank"):
        control_shape(shape, matched)
