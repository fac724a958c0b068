"""The ways on the merged weight against the plain way. test_lowrank.py compares the plain way with the formula."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from relora.budget.cost import FACTORED, PLAIN, PROJECTED
from relora.core.exact_ways import refresh
from relora.core.lowrank import LowRankLinear, ReLoRAConfig, merge_and_reinit, wrap, wrapped_layers
from relora.core.merged import MergedLinear, materialise

LAWS = settings(derandomize=True, deadline=None, max_examples=40)
WAYS = [FACTORED, PROJECTED]
BF16 = torch.bfloat16


def layer(
    inputs: int = 6, outputs: int = 9, *, rank: int = 3, dtype: torch.dtype = torch.float64, **settings: Any
) -> LowRankLinear:
    """All parameters non-zero and drawn from one seed."""
    bias = settings.pop("bias", True)
    made = LowRankLinear(
        nn.Linear(inputs, outputs, bias=bias, dtype=dtype), ReLoRAConfig(rank=rank, target_modules=["any"], **settings)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return made


def inputs_of(made: LowRankLinear, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(*shape, made.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def results(made: LowRankLinear, x: Tensor, through: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output and every gradient of a loss that weighs each output differently."""
    for tensor in (x, *made.parameters()):
        tensor.grad = None
    output = made(x) if through is None else through(made, x)
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * drawn.to(BF16)).double().sum().backward()
    grads = {name: p.grad for name, p in [("x", x), *made.named_parameters()] if p.grad is not None}
    return {"output": output.detach(), **{name: grad.clone() for name, grad in grads.items()}}


def refreshed(made: LowRankLinear, way: str, *, resident: bool, dtype: torch.dtype | None = None) -> LowRankLinear:
    made.refresh(way, resident=resident, dtype=dtype or made.weight.dtype)
    return made


def closest(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        scale = value.double().norm().clamp(min=1e-30)
        assert (found[name].double() - value.double()).norm() <= tolerance * scale, name


def is_plain(made: LowRankLinear, x: Tensor) -> bool:
    return "MergedLinear" not in type(made(x).grad_fn).__name__


# ------------------------------------------------------------------------------------------------- the same results


@LAWS
@given(
    features=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    bias=st.booleans(),
    trainable_scaling=st.booleans(),
    alpha=st.floats(0.1, 20.0),
    way=st.sampled_from(WAYS),
    resident=st.booleans(),
)
def test_output_and_gradients_are_those_of_the_plain_way(
    features: tuple[int, int, int],
    shape: list[int],
    bias: bool,
    trainable_scaling: bool,
    alpha: float,
    way: str,
    resident: bool,
) -> None:
    inputs, outputs, _ = features
    made = layer(inputs, outputs, rank=min(features), bias=bias, trainable_scaling=trainable_scaling, alpha=alpha)
    x = inputs_of(made, *shape)
    expected = results(made, x)
    assert {"x", "lora_A", "lora_B", *(["scaling"] if trainable_scaling else [])} <= expected.keys()
    closest(results(refreshed(made, way, resident=resident), x), expected, 1e-12)
    assert not is_plain(made, x)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_numerically_right(way: str) -> None:
    made = layer(trainable_scaling=True)
    x = inputs_of(made, 2, 3)

    def output(x: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
        return MergedLinear.apply(x, None, made.weight, bias, lora_A, lora_B, scaling, way == PROJECTED)

    assert isinstance(made.scaling, nn.Parameter)
    assert torch.autograd.gradcheck(output, (x, made.bias, made.lora_A, made.lora_B, made.scaling))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", [torch.float32, BF16])
def test_bf16_computes_to_its_precision_whether_it_is_stored_or_autocast(
    stored: torch.dtype, way: str, resident: bool
) -> None:
    made = layer(48, 64, rank=8, dtype=stored)
    x = inputs_of(made, 4, 8, dtype=stored)
    exact = layer(48, 64, rank=8)
    exact.load_state_dict({name: value.double() for name, value in made.state_dict().items()})
    expected = results(exact, x.detach().double().requires_grad_())

    def autocast(made: LowRankLinear, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=stored != BF16):
            return made(x)

    found = results(refreshed(made, way, resident=resident, dtype=BF16), x, autocast)
    assert found["output"].dtype == BF16
    assert {found[name].dtype for name in ("x", "lora_A", "lora_B", "bias")} == {stored}
    for name, value in expected.items():
        error = ((found[name].double() - value).norm() / value.norm()).item()
        assert error <= 0.01, name


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_changes_no_bit(way: str, resident: bool) -> None:
    made = refreshed(layer(), way, resident=resident)
    x = inputs_of(made, 2, 3)
    expected = results(made, x)
    again = results(made, x, lambda made, x: checkpoint(made, x, use_reentrant=False))
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("way", WAYS)
def test_gradients_accumulate_over_micro_steps(way: str) -> None:
    made = layer()
    x = inputs_of(made, 6)
    expected = results(made, x)
    refreshed(made, way, resident=True)
    parts = results(made, x, lambda made, x: torch.cat([made(part) for part in x.split(2)]))
    closest(parts, expected, 1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch warns while it traces
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_layer_computes_the_same(way: str) -> None:
    made = refreshed(layer(), way, resident=True)
    x = inputs_of(made, 2, 3)
    expected = results(made, x)
    torch.compiler.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    closest(results(made, x, lambda _, x: compiled(x)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_large_weight_is_merged_in_pieces_to_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layer(24, 40, rank=4, dtype=torch.float32)
    arguments = (made.weight, made.lora_A, made.lora_B, made.scaling)
    whole = materialise(*arguments, out=None, dtype=dtype)
    monkeypatch.setattr("relora.core.merged.ROWS_NUMEL", 24 * 7)
    torch.testing.assert_close(materialise(*arguments, out=None, dtype=dtype), whole)
    exact = made.weight.double() + 0.25 * made.lora_B.double() @ made.lora_A.double()
    torch.testing.assert_close(whole, exact.to(dtype))
    before = made.weight.clone()
    norms = made.merge()
    torch.testing.assert_close(made.weight.data, exact.float())
    expected = [before.double().norm(), (exact - before.double()).norm()]
    torch.testing.assert_close(norms[:2], torch.stack(expected), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------ never stale


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    return wrap(model, ReLoRAConfig(rank=2, target_modules=["0", "2"]))


def formula(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a copy, which was never refreshed."""
    return copy.deepcopy(model)(x)


STEPS: dict[str, Callable[[nn.Module], None]] = {
    "fused": lambda model: step(model, fused=True),
    "foreach": lambda model: step(model, foreach=True),
    "loop": lambda model: step(model, foreach=False),
    "merge": lambda model: merge_and_reinit(model, seed=1, restart=1) and None,
    "load": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}) and None,
    "in place": lambda model: in_place(model),
    "converted": lambda model: model.double().float() and in_place(model),
}


def step(model: nn.Module, **implementation: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **implementation)
    model(torch.ones(3, 12)).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    wrapped_layers(model)["0"].lora_B.add_(1.0)


@pytest.mark.parametrize("merged_weight", ["resident", "rebuilt"])
@pytest.mark.parametrize("change", STEPS)
def test_after_a_change_the_old_merged_weight_is_not_used(change: str, merged_weight: str) -> None:
    model, x = small_model(), torch.linspace(-1, 1, 24).view(2, 12)
    for _ in range(2):
        refresh(model, merged_weight=merged_weight)
        before = model(x)
        assert "MergedLinear" in type(model(x).grad_fn).__name__
        STEPS[change](model)
        torch.testing.assert_close(model(x), formula(model, x))
        assert change == "merge" or not torch.allclose(model(x), before, rtol=1e-3)
    refresh(model, merged_weight=merged_weight)
    assert "MergedLinear" in type(model(x).grad_fn).__name__
    torch.testing.assert_close(model(x), formula(model, x))


def test_the_step_of_another_models_optimizer_changes_nothing() -> None:
    model, x = small_model(), torch.ones(2, 12)
    refresh(model)
    step(small_model(), fused=True)
    assert "MergedLinear" in type(model(x).grad_fn).__name__


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_noticed_if_its_gradients_are_removed_at_once(fused: bool) -> None:
    model, x = small_model(), torch.linspace(-1, 1, 24).view(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    optimizer.register_step_post_hook(lambda stepped, *_: stepped.zero_grad())
    refresh(model)
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model(x), formula(model, x))


def test_a_step_with_gradients_from_a_closure_is_noticed() -> None:
    model, x = small_model(), torch.linspace(-1, 1, 24).view(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    refresh(model)

    def closure() -> float:
        loss = model(x).square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), formula(model, x))


def test_a_model_that_is_refreshed_in_inference_mode_trains_afterwards() -> None:
    model = small_model()
    with torch.inference_mode():
        refresh(model)
    step(model)
    assert all(layer.lora_B.grad is not None for layer in wrapped_layers(model).values())


def test_a_copy_takes_the_plain_way_until_it_is_refreshed() -> None:
    made = refreshed(layer(), FACTORED, resident=True)
    x = inputs_of(made, 2)
    assert is_plain(copy.deepcopy(made), x)
    assert not is_plain(made, x)


def test_dropout_in_training_and_another_dtype_take_the_plain_way() -> None:
    made = refreshed(layer(dropout=0.5, dtype=torch.float32), FACTORED, resident=True)
    x = inputs_of(made, 2, dtype=torch.float32)
    assert is_plain(made, x)
    assert not is_plain(made.eval(), x)
    with torch.autocast("cpu", dtype=BF16):
        assert is_plain(made, x)


def test_refresh_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no low-rank layers"):
        refresh(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"merged_weight='always' .*resident, rebuilt, never"):
        refresh(small_model(), merged_weight="always")


# ----------------------------------------------------------------------------------------------------------- memory


def saved_numel(compute: Callable[[], Tensor]) -> int:
    """Elements that autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute().sum()
    return sum(kept.values())


def test_no_more_activations_are_kept_than_at_full_rank() -> None:
    tokens, inputs, outputs, rank = 50, 24, 40, 8
    made = layer(inputs, outputs, rank=rank, bias=False)
    x = inputs_of(made, tokens)
    linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    full = saved_numel(lambda: linear(x))
    assert full == tokens * inputs + inputs * outputs
    factors = rank * (inputs + outputs)
    assert saved_numel(lambda: made(x)) >= full + factors + tokens * rank
    for way in WAYS:
        resident, rebuilt = (refreshed(copy.deepcopy(made), way, resident=each) for each in (True, False))
        assert saved_numel(lambda layer=resident: layer(x)) == full + factors
        assert saved_numel(lambda layer=rebuilt: layer(x)) == full + factors
        assert rebuilt._merged is None


def test_the_plain_way_keeps_no_merged_weight() -> None:
    made = refreshed(layer(), FACTORED, resident=True)
    refreshed(made, PLAIN, resident=True)
    assert made._merged is None


# ----------------------------------------------------------------------------------------------- found in a review


@pytest.mark.parametrize("way", WAYS)
def test_under_autocast_a_rebuilt_weight_equals_the_resident_one_to_the_bit(way: str) -> None:
    made = layer(48, 64, rank=8, dtype=torch.float32)
    x = inputs_of(made, 4, dtype=torch.float32)
    outputs = []
    for resident in (True, False):
        refreshed(made, way, resident=resident, dtype=BF16)
        with torch.autocast("cpu", dtype=BF16):
            outputs.append(made(x).detach())
    assert torch.equal(*outputs)


def test_weights_of_another_model_do_not_use_the_merged_weights_of_this_one() -> None:
    one, other = small_model(), small_model()
    in_place(one)
    in_place(other)
    in_place(one)
    with torch.no_grad():
        wrapped_layers(other)["2"].lora_B.add_(0.5)
        wrapped_layers(one)["2"].lora_B.add_(0.0)
        wrapped_layers(other)["0"].lora_B.add_(2.0)
    x = torch.linspace(-1, 1, 24).view(2, 12)
    refresh(one)
    torch.testing.assert_close(torch.func.functional_call(one, dict(other.named_parameters()), x), formula(other, x))


def test_a_weight_that_is_trained_again_gets_its_gradient() -> None:
    made = refreshed(layer(), FACTORED, resident=True)
    made.requires_grad_(True)
    made(inputs_of(made, 2)).sum().backward()
    assert made.weight.grad is not None
