import copy
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from relora.config.groups import ModelConfig
from relora.core.lowrank import (
    LowRankLinear,
    MergeReport,
    ReLoRAConfig,
    low_rank_layers,
    merge_and_reinit,
    unwrap,
    wrap,
)
from relora.training.model import build, logits

LAWS = settings(derandomize=True, deadline=None, max_examples=40)
TARGETS = ["q_proj", "mlp.up"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down"](torch.tanh(self.mlp["up"](torch.tanh(self.q_proj(x)))))


class Toy(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 10]])


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy().to(dtype)


def config(rank: int = 4, **settings: Any) -> ReLoRAConfig:
    return ReLoRAConfig(rank=rank, **{"target_modules": TARGETS, **settings})


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def low_rank_linear(
    inputs: int, outputs: int, *, seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32, **settings: Any
) -> LowRankLinear:
    """A layer with a non-zero weight, bias and factors."""
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    layer = LowRankLinear(linear, config(**settings))
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            if parameter.ndim:
                parameter.copy_(normal(*parameter.shape, seed=100 * seed + number))
    return layer


def fill_factors(model: nn.Module, *, seed: int, scale: float = 1.0) -> None:
    with torch.no_grad():
        for number, (_, layer) in enumerate(low_rank_layers(model)):
            layer.lora_A.copy_(normal(*layer.lora_A.shape, seed=2 * (1000 * seed + number), scale=scale))
            layer.lora_B.copy_(normal(*layer.lora_B.shape, seed=2 * (1000 * seed + number) + 1, scale=scale))


def scale_of(layer: LowRankLinear) -> float:
    return layer.scaling.item() if isinstance(layer.scaling, nn.Parameter) else layer.scaling


def product(layer: LowRankLinear) -> Tensor:
    """scaling * B A in float64."""
    return scale_of(layer) * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one update and keep the gradients."""
    optimizer.zero_grad()
    model(TOKENS).square().sum().backward()
    optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_norm(parameter: nn.Parameter | float) -> float:
    assert isinstance(parameter, nn.Parameter)
    assert parameter.grad is not None
    return parameter.grad.norm().item()


# -------------------------------------------------------------------------------------------------------- forward


@LAWS
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    alpha=st.none() | st.floats(0.1, 40.0),
    bias=st.booleans(),
    trainable_scaling=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_the_output_is_the_formula_in_float64(
    inputs: int,
    outputs: int,
    alpha: float | None,
    bias: bool,
    trainable_scaling: bool,
    dropout: float,
    data: st.DataObject,
) -> None:
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    layer = low_rank_linear(
        inputs,
        outputs,
        rank=rank,
        alpha=alpha,
        bias=bias,
        trainable_scaling=trainable_scaling,
        dropout=dropout,
        dtype=torch.float64,
    ).eval()
    x = normal(2, 3, inputs, seed=7, dtype=torch.float64)
    scale = 0.25 if alpha is None else alpha / rank
    expected = x @ (layer.weight + scale * layer.lora_B @ layer.lora_A).T
    if bias:
        expected = expected + layer.bias
    assert layer(x).shape == (2, 3, outputs)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_agrees_with_float64_to_the_precision_of_the_storage_type(dtype: torch.dtype) -> None:
    layer = low_rank_linear(24, 16, rank=6, alpha=9.0, dtype=dtype)
    x = normal(5, 24, seed=7, dtype=dtype)
    expected = x.double() @ (layer.weight.double() + product(layer)).T + layer.bias.double()
    assert layer(x).dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=tolerance)


def test_dropout_applies_to_the_input_of_the_factors_and_not_to_the_frozen_path() -> None:
    layer = low_rank_linear(16, 12, rank=4, dropout=0.5, dtype=torch.float64).train()
    x = normal(6, 16, seed=7, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        output = layer(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5, training=True)
    assert not torch.equal(dropped, x)
    torch.testing.assert_close(output, F.linear(x, layer.weight, layer.bias) + dropped @ product(layer).T)


def test_gradients_are_those_of_the_merged_weight_through_the_chain_rule() -> None:
    layer = low_rank_linear(7, 5, rank=3, alpha=6.0, dtype=torch.float64, trainable_scaling=True)
    x = normal(4, 7, seed=7, dtype=torch.float64).requires_grad_()
    upstream = normal(4, 5, seed=8, dtype=torch.float64)
    layer(x).backward(upstream)
    by_weight = upstream.T @ x.detach()
    expected = {
        "lora_A": 2.0 * layer.lora_B.T @ by_weight,
        "lora_B": 2.0 * by_weight @ layer.lora_A.T,
        "scaling": (by_weight * (layer.lora_B @ layer.lora_A)).sum(),
        "bias": upstream.sum(0),
    }
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, value.detach())
    torch.testing.assert_close(x.grad, (upstream @ (layer.weight + product(layer))).detach())


# ----------------------------------------------------------------------------------------------------------- wrap


@pytest.mark.parametrize("alpha", [1.0, 14.0])
def test_outputs_and_gradients_are_those_of_peft(alpha: float) -> None:
    ours, theirs = toy(dtype=torch.float64), toy(dtype=torch.float64)
    wrap(ours, config(rank=4, alpha=alpha))
    fill_factors(ours, seed=3)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "up"]), theirs)  # type: ignore[arg-type]
    factors = dict(ours.named_parameters())
    with torch.no_grad():
        for name, layer in theirs.named_modules():
            if isinstance(layer, LoraLayer):
                for factor in ("lora_A", "lora_B"):
                    getattr(layer, factor)["default"].weight.copy_(factors[f"{name}.{factor}"])

    outputs = ours(TOKENS)
    assert torch.allclose(outputs, theirs(TOKENS), rtol=1e-12, atol=1e-12)
    outputs.square().sum().backward()
    theirs(TOKENS).square().sum().backward()
    gradients = {n.removesuffix(".default.weight"): p.grad for n, p in theirs.named_parameters() if ".default." in n}
    assert len(gradients) == 8  # q_proj and up of two blocks, two factors each
    for name, gradient in gradients.items():
        ours_gradient = factors[name].grad
        assert ours_gradient is not None
        assert gradient is not None
        assert torch.allclose(ours_gradient, gradient, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("reinit", ["kaiming", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_wrapping_b_is_zero_and_a_is_not_and_outputs_are_unchanged(reinit: str, dtype: torch.dtype) -> None:
    model = toy(dtype=dtype)
    before = model(TOKENS)
    wrap(model, config(reinit=reinit, alpha=10.0))
    for _, layer in low_rank_layers(model):
        assert layer.lora_B.count_nonzero() == 0
        assert layer.lora_A.count_nonzero() == layer.lora_A.numel()
        assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
        assert scale_of(layer) == 2.5
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_both_factors_train_from_the_first_cycle_on(trainable_scaling: bool) -> None:
    model = wrap(toy(), config(trainable_scaling=trainable_scaling))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    train_step(model, optimizer)
    for _, layer in low_rank_layers(model):
        assert gradient_norm(layer.lora_B) > 0
    train_step(model, optimizer)
    for _, layer in low_rank_layers(model):
        assert gradient_norm(layer.lora_A) > 0
        assert gradient_norm(layer.lora_B) > 0


def test_wrapping_freezes_the_targeted_weights_and_nothing_else() -> None:
    model = wrap(toy(), config())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"blocks.{n}.{name}.weight" for n in (0, 1) for name in TARGETS}
    model(TOKENS).sum().backward()
    assert all(layer.weight.grad is None for _, layer in low_rank_layers(model))


def test_the_wrapped_layer_keeps_the_parameters_of_the_linear_and_their_names() -> None:
    model = toy()
    before = dict(model.named_parameters())
    wrap(model, config())
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {
        f"blocks.{n}.{name}.{factor}" for n in (0, 1) for name in TARGETS for factor in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_and_unwrapping_keep_the_mode(training: bool) -> None:
    model = wrap(toy().train(training), config(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}
    assert {module.training for module in unwrap(model).modules()} == {training}


def test_a_trained_wrapped_model_loads_from_its_state_dict() -> None:
    model = wrap(toy(), config(trainable_scaling=True), seed=1)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    train_step(model, optimizer)
    train_step(model, optimizer)
    other = wrap(toy(seed=9), config(trainable_scaling=True), seed=2)
    assert not torch.equal(other(TOKENS), model(TOKENS))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(TOKENS), model(TOKENS))
    for state in (model, other):
        merge_and_reinit(state, seed=1, restart=1)
    assert torch.equal(other(TOKENS), model(TOKENS))


# -------------------------------------------------------------------------------------------------------- targets


def wrapped_names(target_modules: str | Sequence[str]) -> set[str]:
    return {name for name, _ in low_rank_layers(wrap(toy(), config(target_modules=target_modules)))}


def test_listed_targets_are_endings_of_whole_components() -> None:
    assert wrapped_names(["q_proj"]) == {"blocks.0.q_proj", "blocks.1.q_proj"}
    assert wrapped_names(["mlp.up", "head"]) == {"blocks.0.mlp.up", "blocks.1.mlp.up", "head"}
    assert wrapped_names(["blocks.1.mlp.down"]) == {"blocks.1.mlp.down"}


def test_a_regular_expression_matches_whole_names() -> None:
    assert wrapped_names(r"blocks\.\d\.mlp\..*") == {
        f"blocks.{n}.mlp.{name}" for n in (0, 1) for name in ("up", "down")
    }
    assert wrapped_names(r".*0\.(q_proj|mlp\.up)") == {"blocks.0.q_proj", "blocks.0.mlp.up"}


@pytest.mark.parametrize(
    ("target_modules", "named"),
    [
        (["proj"], "proj"),
        (["p"], "'p'"),
        (["q_proj", "k_proj"], "k_proj"),
        (["q_proj", "embedding"], "embedding"),
        (["q_proj", "mlp"], "mlp"),
        (["q_proj", ".*up"], "up"),
        ([], r"\[\]"),
        ("q_proj", "q_proj"),
        (".*embedding", "embedding"),
        ("", "''"),
    ],
)
def test_a_target_that_matches_no_linear_layer_is_an_error_and_wraps_nothing(
    target_modules: str | Sequence[str], named: str
) -> None:
    model = toy()
    with pytest.raises(ValueError, match=named) as error:
        wrap(model, config(target_modules=target_modules))
    assert "down, head, q_proj, up" in str(error.value)
    assert not list(low_rank_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def gpt2() -> GPT2LMHeadModel:
    """The real GPT-2 of transformers, with random weights."""
    sizes = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=20, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(sizes).eval()


@pytest.mark.parametrize("target_modules", [["c_attn", "c_fc"], ["lm_head", "c_attn", "c_fc"], r".*\.(c_attn|c_fc)"])
def test_the_conv1d_layers_of_gpt2_are_named_and_the_remedy_works(target_modules: str | Sequence[str]) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=r"Conv1D are c_attn, c_fc; .*replace each .*nn\.Linear"):
        wrap(model, config(target_modules=target_modules))
    assert not list(low_rank_layers(model))

    before = model(TOKENS).logits
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.load_state_dict({"weight": module.weight.T, "bias": module.bias})
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)
    wrap(model, config(target_modules=["c_attn", "c_fc"]))
    assert len(list(low_rank_layers(model))) == 4
    torch.testing.assert_close(model(TOKENS).logits, before)


@pytest.mark.parametrize("target_modules", [None, 3, [None], ["q_proj", 7], {"q_proj"}])
def test_targets_that_are_neither_text_nor_a_list_of_text_give_one_clear_error(target_modules: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"target_modules={re.escape(repr(target_modules))} .*list .*endings, .*\[\"q_proj\""
    ):
        config(target_modules=target_modules)


def test_a_wrong_regular_expression_gives_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"target_modules='\(q_proj' .*regular expression.*correct it"):
        config(target_modules="(q_proj")


def test_a_rank_above_the_smaller_side_of_any_target_is_an_error_and_wraps_nothing() -> None:
    model = toy()
    wrap(toy(), config(rank=8, target_modules=["q_proj", "head"]))
    with pytest.raises(ValueError, match=r"rank=9 exceeds min\(in, out\)=8 of head"):
        wrap(model, config(rank=9, target_modules=["head"]))
    with torch.no_grad():
        model.head = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="of head"):
        wrap(model, config(rank=4, target_modules=["q_proj", "head"]))
    assert not list(low_rank_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrapping_twice_is_an_error() -> None:
    model = wrap(toy(), config())
    with pytest.raises(ValueError, match="already"):
        wrap(model, config(target_modules=["head"]))


def test_a_weight_tied_to_another_module_is_an_error_unless_it_is_left_out() -> None:
    model = toy()
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match="shared"):
        wrap(model, config(target_modules=["q_proj", "head"]))
    assert not list(low_rank_layers(model))
    wrap(model, config())
    assert model.embedding.weight.requires_grad


def test_one_linear_layer_under_two_names_is_an_error() -> None:
    model = toy()
    model.register_module("second_head", model.head)
    with pytest.raises(ValueError, match="shared"):
        wrap(model, config(target_modules=["head"]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": -4}, "rank=-4"),
        ({"rank": None}, "rank=None .*whole number"),
        ({"rank": 2.5}, "rank=2.5 .*whole number"),
        ({"alpha": 0.0}, "alpha=0"),
        ({"alpha": -1.0}, "alpha=-1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"reinit": "zero"}, "reinit='zero'"),
    ],
)
def test_settings_outside_their_range_are_errors(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(**settings)


def test_the_scale_is_alpha_over_rank_and_a_quarter_by_default() -> None:
    assert config(rank=128, alpha=32.0).scaling == 0.25
    assert config(rank=8, alpha=32.0).scaling == 4.0
    assert config(rank=8).scaling == config(rank=512).scaling == 0.25


# ---------------------------------------------------------------------------------------------------- draws of A


def drawn(
    seed: int = 0,
    restart: int = 0,
    name: str = "head",
    *,
    inputs: int = 12,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    reinit: str = "kaiming",
) -> Tensor:
    layer = low_rank_linear(inputs, max(10, rank), rank=rank, reinit=reinit, dtype=dtype)
    layer.initialise(seed=seed, restart=restart, name=name)
    return layer.lora_A.detach().clone()


REINITS = pytest.mark.parametrize("reinit", ["kaiming", "orthogonal"])


@REINITS
def test_a_does_not_depend_on_the_global_generator_and_does_not_move_it(reinit: str) -> None:
    with torch.random.fork_rng():
        models = []
        for global_seed in (1, 2):
            model = toy()
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            wrap(model, config(reinit=reinit), seed=3)
            merge_and_reinit(model, seed=3, restart=1)
            assert torch.equal(torch.get_rng_state(), state)
            models.append(model)
    for (_, left), (_, right) in zip(*map(low_rank_layers, models), strict=True):
        assert torch.equal(left.lora_A, right.lora_A)


@REINITS
def test_wrap_draws_a_for_restart_zero_and_a_merge_for_its_own_restart(reinit: str) -> None:
    model = wrap(toy(), config(reinit=reinit), seed=3)
    for restart in (0, 5, 2):
        if restart:
            merge_and_reinit(model, seed=3, restart=restart)
        for name, layer in low_rank_layers(model):
            assert torch.equal(layer.lora_A, drawn(3, restart, name, inputs=layer.in_features, reinit=reinit))


@REINITS
def test_a_does_not_depend_on_the_order_of_the_modules(reinit: str) -> None:
    names = ["a", "b", "c"]
    models = [nn.ModuleDict({name: nn.Linear(8, 8) for name in order}) for order in (names, names[::-1])]
    drawn_by_name = [
        {name: layer.lora_A for name, layer in low_rank_layers(wrap(model, config(target_modules=names)))}
        for model in models
    ]
    for name in names:
        assert torch.equal(drawn_by_name[0][name], drawn_by_name[1][name])


@REINITS
def test_a_is_the_same_in_every_storage_type_up_to_rounding(reinit: str) -> None:
    reference = drawn(reinit=reinit)
    assert torch.equal(drawn(dtype=torch.float64, reinit=reinit), reference.double())
    assert torch.equal(drawn(dtype=torch.bfloat16, reinit=reinit), reference.bfloat16())


def test_a_is_drawn_on_the_cpu_with_any_default_device() -> None:
    model = toy()
    with torch.device("meta"):
        wrap(model, config(), seed=3)
    for name, layer in low_rank_layers(model):
        assert torch.equal(layer.lora_A, drawn(3, 0, name, inputs=layer.in_features))


@REINITS
def test_a_differs_between_seeds_restarts_and_names(reinit: str) -> None:
    keys = itertools.product([0, 1, 11], [0, 1, 11], ["head", "1/head", "blocks.0.q_proj", "blocks.1.q_proj"])
    draws = [drawn(*key, reinit=reinit) for key in keys]
    for left, right in itertools.combinations(draws, 2):
        assert not torch.equal(left, right)


def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs() -> None:
    a = drawn(inputs=256, rank=64)
    assert a.abs().max() <= 1 / 16
    assert a.abs().max() > 0.999 / 16
    assert abs(a.mean().item()) < 0.001
    assert a.square().mean().item() == pytest.approx(1 / (3 * 256), rel=0.02)


def test_orthogonal_has_orthogonal_rows_of_the_norm_that_kaiming_has_on_average() -> None:
    a = drawn(inputs=256, rank=64, reinit="orthogonal").double()
    torch.testing.assert_close(a @ a.T, torch.eye(64, dtype=torch.float64) / 3, rtol=0, atol=1e-6)
    kaiming = drawn(inputs=256, rank=64).norm(dim=1).mean().item()
    assert kaiming == pytest.approx(1 / math.sqrt(3), rel=0.01)


# ---------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("trainable_scaling", [False, True])
@pytest.mark.parametrize("alpha", [None, 4.0, 1.0, 14.0])
def test_a_merge_leaves_outputs_unchanged_at_every_scale(alpha: float | None, trainable_scaling: bool) -> None:
    model = wrap(toy(dtype=torch.float64), config(alpha=alpha, trainable_scaling=trainable_scaling))
    plain = model(TOKENS)
    fill_factors(model, seed=1, scale=0.3)
    for _, layer in low_rank_layers(model):
        if isinstance(layer.scaling, nn.Parameter):
            layer.scaling.data.mul_(1.7)
    before = model(TOKENS)
    assert (before - plain).norm() > 0.01 * plain.norm()
    merge_and_reinit(model, seed=0, restart=1)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 14.0])
def test_a_merge_adds_alpha_over_rank_times_b_a_and_starts_the_factors_again(alpha: float) -> None:
    model = wrap(toy(), config(rank=4, alpha=alpha))
    fill_factors(model, seed=1)
    expected = {
        name: layer.weight.double() + (alpha / 4) * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        for name, layer in low_rank_layers(model)
    }
    biases = {name: copy.deepcopy(layer.bias) for name, layer in low_rank_layers(model)}
    merge_and_reinit(model, seed=0, restart=1)
    for name, layer in low_rank_layers(model):
        torch.testing.assert_close(layer.weight.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert layer.lora_B.count_nonzero() == 0
        assert layer.lora_A.count_nonzero() == layer.lora_A.numel()
        assert scale_of(layer) == alpha / 4
        assert not layer.weight.requires_grad
        if layer.bias is not None:
            assert torch.equal(layer.bias, biases[name])


@LAWS
@given(seed=st.integers(0, 10_000), merges=st.integers(1, 8), rank=st.integers(1, 5), alpha=st.floats(0.5, 20.0))
def test_many_merges_add_up_to_the_sum_of_their_products(seed: int, merges: int, rank: int, alpha: float) -> None:
    layer = low_rank_linear(6, 5, rank=rank, alpha=alpha, seed=seed)
    model = nn.ModuleDict({"layer": layer})
    total = layer.weight.detach().double()
    for restart in range(1, merges + 1):
        fill_factors(model, seed=seed + restart)
        total = total + product(layer)
        report = merge_and_reinit(model, seed=seed, restart=restart)
        assert report.rounding_loss < 1e-5
    torch.testing.assert_close(layer.weight.double(), total, rtol=0, atol=1e-5 * total.abs().max().item())


def test_the_sum_of_merges_has_a_higher_rank_than_one() -> None:
    layer = low_rank_linear(12, 12, rank=2, dtype=torch.float64)
    model, start = nn.ModuleDict({"layer": layer}), layer.weight.detach().clone()
    for restart in (1, 2, 3):
        fill_factors(model, seed=restart)
        merge_and_reinit(model, seed=0, restart=restart)
        assert torch.linalg.matrix_rank(layer.weight - start) == 2 * restart


def test_a_trainable_scale_and_its_factors_get_gradients_after_a_merge() -> None:
    model = wrap(toy(), config(trainable_scaling=True, alpha=6.0))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for _ in range(3):
        train_step(model, optimizer)
    assert all(scale_of(layer) != 1.5 for _, layer in low_rank_layers(model))
    merge_and_reinit(model, seed=0, restart=1)
    for _, layer in low_rank_layers(model):
        assert isinstance(layer.scaling, nn.Parameter)
        assert scale_of(layer) == 1.5
    train_step(model, optimizer)
    train_step(model, optimizer)
    for _, layer in low_rank_layers(model):
        for parameter in (layer.scaling, layer.lora_A, layer.lora_B):
            assert gradient_norm(parameter) > 0


def test_a_merge_of_nothing_wrapped_is_an_error() -> None:
    with pytest.raises(ValueError, match="no low-rank layers"):
        merge_and_reinit(toy(), seed=0, restart=1)
    with pytest.raises(ValueError, match="no low-rank layers"):
        unwrap(toy())


# --------------------------------------------------------------------------------------------- rounding of a merge


def small_update(dtype: torch.dtype) -> tuple[nn.ModuleDict, LowRankLinear]:
    """A layer with a product of 0.14% of its weight."""
    layer = low_rank_linear(64, 48, rank=4, dtype=dtype, bias=False)
    size = 0.0014 * layer.weight.double().norm() / product(layer).norm()
    layer.lora_B.data.mul_(size.item())
    return nn.ModuleDict({"layer": layer}), layer


STORAGE = (torch.float64, torch.float32, torch.bfloat16)


def relative_loss(before: Tensor, delta: Tensor, after: Tensor) -> float:
    return ((delta - (after.double() - before.double())).norm() / delta.norm()).item()


@pytest.mark.parametrize("dtype", STORAGE)
def test_the_reported_norms_are_those_of_the_merge(dtype: torch.dtype) -> None:
    model, layer = small_update(dtype)
    before, delta = layer.weight.detach().clone(), product(layer)
    report = merge_and_reinit(model, seed=0, restart=1)
    assert set(report.modules) == {"layer"}
    assert report.relative_update == pytest.approx((delta.norm() / before.double().norm()).item(), rel=1e-5)
    assert report.relative_update == pytest.approx(0.0014, rel=0.01)
    assert report.rounding_loss == pytest.approx(relative_loss(before, delta, layer.weight), rel=1e-3, abs=1e-4)


def test_bf16_loses_most_of_a_small_update_and_says_so_and_fp32_loses_none() -> None:
    losses = {dtype: merge_and_reinit(small_update(dtype)[0], seed=0, restart=1).rounding_loss for dtype in STORAGE}
    assert losses[torch.bfloat16] > 0.5
    assert losses[torch.float32] < 1e-3
    assert losses[torch.float64] < 1e-12


def test_a_bf16_merge_rounds_once_the_sum_that_is_exact_in_fp32() -> None:
    layer = low_rank_linear(64, 48, rank=8, alpha=3.0, dtype=torch.bfloat16, bias=False)
    exact = layer.weight.double() + product(layer)
    merge_and_reinit(nn.ModuleDict({"layer": layer}), seed=0, restart=1)
    half_a_bf16_spacing = torch.exp2(exact.abs().log2().floor() - 8)
    assert layer.weight.dtype == torch.bfloat16
    assert ((layer.weight.double() - exact).abs() <= 1.001 * half_a_bf16_spacing).all()


def test_a_report_of_a_whole_model_weighs_its_layers_by_their_norms() -> None:
    model = wrap(toy(dtype=torch.bfloat16), config())
    fill_factors(model, seed=1, scale=0.1)
    befores = {name: (layer.weight.detach().clone(), product(layer)) for name, layer in low_rank_layers(model)}
    report = merge_and_reinit(model, seed=0, restart=1)
    weights = torch.cat([before.double().flatten() for before, _ in befores.values()])
    deltas = torch.cat([delta.flatten() for _, delta in befores.values()])
    afters = torch.cat([layer.weight.double().flatten() for _, layer in low_rank_layers(model)])
    assert set(report.modules) == set(befores)
    assert report.relative_update == pytest.approx((deltas.norm() / weights.norm()).item(), rel=1e-5)
    assert report.rounding_loss == pytest.approx(relative_loss(weights, deltas, afters), rel=1e-3)


def test_a_merge_of_zero_factors_reports_zero() -> None:
    model = wrap(toy(), config())
    report = merge_and_reinit(model, seed=0, restart=1)
    assert report.relative_update == report.rounding_loss == 0.0
    assert MergeReport(modules={}).relative_update == MergeReport(modules={}).rounding_loss == 0.0


# --------------------------------------------------------------------------------------------------------- unwrap


@pytest.mark.parametrize("trainable_scaling", [False, True])
def test_unwrapping_gives_plain_linear_layers_with_the_same_outputs(trainable_scaling: bool) -> None:
    original = toy(dtype=torch.float64)
    model = wrap(copy.deepcopy(original), config(alpha=3.0, trainable_scaling=trainable_scaling))
    fill_factors(model, seed=1, scale=0.3)
    before = model(TOKENS)
    assert unwrap(model) is model
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-10, atol=1e-10)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in original.named_modules()
    ]
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in original.parameters()]


def test_an_unwrapped_model_trains_at_full_rank_and_can_be_wrapped_again() -> None:
    model = unwrap(wrap(toy(), config()))
    before = copy.deepcopy(model.state_dict())
    train_step(model, torch.optim.SGD(trainable(model), lr=1e-2))
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(list(low_rank_layers(wrap(model, config(rank=2))))) == 4


# ---------------------------------------------------------------------------------------------------- a real model


def test_a_llama_is_wrapped_trained_merged_and_unwrapped() -> None:
    sizes = ModelConfig(name="toy", hidden_size=16, intermediate_size=24, layers=2, heads=2)
    model = build(sizes, sizes.shape(vocab_size=11), end_of_text_id=0, seed=0)
    names, plain = list(model.state_dict()), logits(model, TOKENS)
    wrap(model, config(rank=4, alpha=12.0, target_modules=["q_proj", "self_attn.v_proj", "down_proj"]))
    assert torch.equal(logits(model, TOKENS), plain)
    assert len(list(low_rank_layers(model))) == 6
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for restart in (1, 2):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(logits(model, TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten()).backward()
            optimizer.step()
        before = logits(model, TOKENS)
        report = merge_and_reinit(model, seed=0, restart=restart)
        assert report.relative_update > 0.01
        torch.testing.assert_close(logits(model, TOKENS), before, rtol=1e-4, atol=1e-5)
    fill_factors(model, seed=1, scale=0.1)
    before = logits(model, TOKENS)
    unwrap(model)
    torch.testing.assert_close(logits(model, TOKENS), before, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert not (before - plain).allclose(torch.zeros(()), atol=1e-3)


def test_a_linear_layer_with_a_weight_that_its_owner_reads_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(
        ValueError, match=r"attention\.out_proj .*NonDynamicallyQuantizableLinear.*leave it out of target_modules"
    ):
        wrap(model, ReLoRAConfig(rank=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_not_a_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha={alpha} .*positive and finite"):
        ReLoRAConfig(rank=1, target_modules=".*", alpha=alpha)
