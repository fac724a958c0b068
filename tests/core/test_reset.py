import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import REPOSITORY
from torch import Tensor, nn

from relora.core.lowrank import ReLoRAConfig, low_rank_layers, merge_and_reinit, wrap
from relora.core.reset import prune_mask_at_random, prune_mask_by_magnitude, reset_optimizer

LAWS = settings(derandomize=True, deadline=None, max_examples=150)
PRUNING_MODES = pytest.mark.parametrize("mode", ["zero", "random", "magnitude"])
BOTH_MOMENTS = pytest.mark.parametrize("moments", ["joint", "independent"])

State = dict[str, dict[str, Any]]

DRAW: dict[str, Any] = {"seed": 0, "restart": 1}
"""The seed and the restart of a random mask."""


class Toy(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 2 * width)])
        self.head = nn.Linear(2 * width, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def wrapped_toy(dtype: torch.dtype = torch.float32, rank: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap(Toy().to(dtype), ReLoRAConfig(rank=rank, target_modules=["0", "1"]))


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def trained(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adamw,
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A wrapped model and its optimizer after some updates, with no zero in any moment of a factor."""
    model = wrapped_toy(dtype)
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    tokens = torch.arange(7)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()
        optimizer.step()
    for state in factor_states(state_of(model, optimizer)).values():
        for moment in moments_of(state).values():
            assert moment.count_nonzero() == moment.numel()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """A copy of the optimizer's state by parameter name."""
    return {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def factor_states(state: State) -> State:
    return {name: values for name, values in state.items() if name.endswith(("lora_A", "lora_B"))}


def moments_of(values: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if key != "step"}


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name][key]) for name, values in left.items() for key, value in values.items()
    )


def zeros_of(state: State, key: str) -> Tensor:
    return torch.cat([(values[key] == 0).flatten() for values in factor_states(state).values()])


def zeroed_share(state: State) -> float:
    moments = [moment for values in factor_states(state).values() for moment in moments_of(values).values()]
    return sum(int((moment == 0).sum()) for moment in moments) / sum(moment.numel() for moment in moments)


def smallest(values: list[float], ratio: Fraction) -> set[int]:
    """Indices of the floor(ratio * n) smallest |value|, the first ones where they tie, by sorting."""
    order = sorted(range(len(values)), key=lambda index: (abs(values[index]), index))
    return set(order[: math.floor(ratio * len(values))])


# ------------------------------------------------------------------------------------------------ masks by magnitude

VALUES = st.lists(
    st.integers(-3, 3).map(float) | st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60
)
RATIOS = st.integers(0, 1000).map(lambda thousandths: Fraction(thousandths, 1000))


@LAWS
@given(values=VALUES, ratio=RATIOS)
def test_magnitude_prunes_the_smallest_entries_and_the_first_of_equal_ones(
    values: list[float], ratio: Fraction
) -> None:
    mask = prune_mask_by_magnitude(torch.tensor(values), float(ratio))
    assert set(mask.nonzero().flatten().tolist()) == smallest(values, ratio)


@pytest.mark.parametrize("constant", [0.0, -2.5, 1e-20])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99, 1.0])
def test_a_constant_tensor_loses_the_requested_share_and_not_everything(constant: float, ratio: float) -> None:
    mask = prune_mask_by_magnitude(torch.full((20, 10), constant), ratio)
    assert mask.shape == (20, 10)
    assert int(mask.sum()) == round(200 * ratio)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_magnitude_counts_exactly_in_every_storage_type(dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 3000).to(dtype)
    mask = prune_mask_by_magnitude(values, 0.999)
    assert int(mask.sum()) == 2997
    assert values[mask].abs().max() <= values[~mask].abs().min()


@pytest.mark.parametrize("hundredths", [29, 57, 58])
def test_magnitude_is_exact_if_the_product_is_just_below_a_whole_number(hundredths: int) -> None:
    assert hundredths / 100 * 100 < hundredths
    assert int(prune_mask_by_magnitude(torch.arange(100.0), hundredths / 100).sum()) == hundredths


def test_magnitude_is_exact_above_sixteen_million_elements() -> None:
    size = 2**24 + 1000
    values = torch.rand(size, generator=torch.Generator().manual_seed(0))
    mask = prune_mask_by_magnitude(values, 0.75)
    assert int(mask.sum()) == math.floor(0.75 * size)
    assert values[mask].max() <= values[~mask].min()


def test_magnitude_reads_a_transposed_tensor_entry_by_entry() -> None:
    values = torch.arange(12.0).view(3, 4).T
    assert torch.equal(prune_mask_by_magnitude(values, 0.5), values < 6)


# --------------------------------------------------------------------------------------------------- masks at random


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99, 0.999, 1.0])
def test_random_prunes_about_the_requested_share(ratio: float) -> None:
    size = 200_000
    pruned = int(prune_mask_at_random(torch.empty(400, 500), ratio, "key").sum())
    assert abs(pruned - ratio * size) <= 5 * math.sqrt(ratio * (1 - ratio) * size)


def test_random_does_not_zero_everything_in_bf16() -> None:
    values = torch.ones(1000, 1000, dtype=torch.bfloat16)
    kept = 1_000_000 - int(prune_mask_at_random(values, 0.999, "key").sum())
    assert 800 < kept < 1200
    assert torch.equal(prune_mask_at_random(values, 0.999, "key"), prune_mask_at_random(values.float(), 0.999, "key"))


def test_random_draws_on_the_cpu_with_any_default_device() -> None:
    values = torch.ones(50)
    expected = prune_mask_at_random(values, 0.5, "key")
    with torch.device("meta"):
        mask = prune_mask_at_random(values, 0.5, "key")
    assert torch.equal(mask, expected)


# ---------------------------------------------------------------------------------------------------- changed state


@BOTH_MOMENTS
@PRUNING_MODES
def test_the_state_of_the_factors_is_pruned_and_all_other_state_keeps_every_bit(mode: str, moments: str) -> None:
    model, optimizer = trained()
    before = state_of(model, optimizer)
    reset_optimizer(optimizer, model, mode=mode, pruning_ratio=0.9, moments=moments, **DRAW)
    after = state_of(model, optimizer)
    factors = factor_states(before)
    assert len(factors) == 4
    assert len(before) > len(factors)
    assert same(
        {name: values for name, values in before.items() if name not in factors},
        {name: values for name, values in after.items() if name not in factors},
    )
    for name, values in factors.items():
        for key, moment in moments_of(values).items():
            zeroed = after[name][key] == 0
            assert zeroed.any()
            assert torch.equal(after[name][key], moment.masked_fill(zeroed, 0))


def test_parameters_are_not_touched() -> None:
    model, optimizer = trained()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reset_optimizer(optimizer, model, mode="zero")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_mode_none_touches_nothing_and_returns_zero() -> None:
    model, optimizer = trained()
    before = state_of(model, optimizer)
    assert reset_optimizer(optimizer, model, mode="none", pruning_ratio=1.0) == 0.0
    assert same(state_of(model, optimizer), before)


@PRUNING_MODES
def test_parameters_without_state_are_not_changed(mode: str) -> None:
    model = wrapped_toy()
    optimizer = adamw(list(model.parameters()))
    assert reset_optimizer(optimizer, model, mode=mode, **DRAW) == 0.0
    assert len(optimizer.state) == 0


def test_factors_that_never_had_a_gradient_do_not_count() -> None:
    model, optimizer = trained()
    _, first = next(low_rank_layers(model))
    del optimizer.state[first.lora_A]
    assert reset_optimizer(optimizer, model, mode="zero") == 1.0
    assert first.lora_A not in optimizer.state
    assert zeroed_share(state_of(model, optimizer)) == 1.0


# ------------------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH_MOMENTS
def test_zero_zeroes_every_moment_of_the_factors(moments: str, dtype: torch.dtype) -> None:
    model, optimizer = trained(dtype=dtype)
    assert reset_optimizer(optimizer, model, mode="zero", pruning_ratio=0.0, moments=moments) == 1.0
    assert zeroed_share(state_of(model, optimizer)) == 1.0


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.9, 0.99, 1.0])
def test_joint_magnitude_prunes_both_moments_where_the_first_is_smallest(ratio: float) -> None:
    model, optimizer = trained()
    before = factor_states(state_of(model, optimizer))
    reset_optimizer(optimizer, model, mode="magnitude", pruning_ratio=ratio, moments="joint")
    after = state_of(model, optimizer)
    for name, values in before.items():
        expected = smallest(values["exp_avg"].flatten().tolist(), Fraction(str(ratio)))
        for key in ("exp_avg", "exp_avg_sq"):
            assert set((after[name][key].flatten() == 0).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_independent_magnitude_prunes_each_moment_by_its_own_size(ratio: float) -> None:
    model, optimizer = trained()
    before = factor_states(state_of(model, optimizer))
    reset_optimizer(optimizer, model, mode="magnitude", pruning_ratio=ratio, moments="independent")
    after = state_of(model, optimizer)
    for name, values in before.items():
        for key in ("exp_avg", "exp_avg_sq"):
            expected = smallest(values[key].flatten().tolist(), Fraction(str(ratio)))
            assert set((after[name][key].flatten() == 0).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("mode", ["random", "magnitude"])
def test_joint_masks_agree_between_the_moments_and_independent_ones_differ(mode: str) -> None:
    zeros: dict[str, tuple[Tensor, Tensor]] = {}
    for moments in ("joint", "independent"):
        model, optimizer = trained()
        reset_optimizer(optimizer, model, mode=mode, pruning_ratio=0.6, moments=moments, **DRAW)
        state = state_of(model, optimizer)
        zeros[moments] = zeros_of(state, "exp_avg"), zeros_of(state, "exp_avg_sq")
    first, second = zeros["joint"]
    assert torch.equal(first, second)
    first, second = zeros["independent"]
    assert (~first & second).any()
    assert (first & ~second).any()


def test_joint_masks_cover_the_third_moment_of_amsgrad() -> None:
    model, optimizer = trained(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True))
    assert reset_optimizer(optimizer, model, mode="magnitude", pruning_ratio=0.5) == 0.5
    state = state_of(model, optimizer)
    assert torch.equal(zeros_of(state, "exp_avg"), zeros_of(state, "max_exp_avg_sq"))


@BOTH_MOMENTS
@pytest.mark.parametrize("ratio", [0.1, 0.9, 0.99])
@pytest.mark.parametrize("mode", ["random", "magnitude"])
def test_the_returned_fraction_is_the_share_of_the_factors_state_that_is_zero(
    mode: str, ratio: float, moments: str
) -> None:
    model, optimizer = trained()
    fraction = reset_optimizer(optimizer, model, mode=mode, pruning_ratio=ratio, moments=moments, **DRAW)
    assert fraction == zeroed_share(state_of(model, optimizer))
    assert fraction == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("mode", ["random", "magnitude"])
def test_bf16_state_is_pruned_by_the_requested_share(mode: str) -> None:
    model, optimizer = trained(dtype=torch.bfloat16)
    fraction = reset_optimizer(optimizer, model, mode=mode, pruning_ratio=0.9, **DRAW)
    assert fraction == zeroed_share(state_of(model, optimizer))
    assert fraction == pytest.approx(0.9, abs=0.05)


@PRUNING_MODES
def test_the_momentum_of_sgd_is_pruned(mode: str) -> None:
    model, optimizer = trained(lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9))
    fraction = reset_optimizer(optimizer, model, mode=mode, pruning_ratio=0.75, **DRAW)
    assert fraction == zeroed_share(state_of(model, optimizer))
    assert fraction == pytest.approx(1.0 if mode == "zero" else 0.75, abs=0.07)


# ------------------------------------------------------------------------------------------------------- random keys


def randomly_reset(moments: str, *, seed: int, restart: int) -> Tensor:
    model, optimizer = trained()
    reset_optimizer(optimizer, model, mode="random", pruning_ratio=0.5, moments=moments, seed=seed, restart=restart)
    state = state_of(model, optimizer)
    return torch.cat([zeros_of(state, "exp_avg"), zeros_of(state, "exp_avg_sq")])


@BOTH_MOMENTS
def test_random_depends_only_on_seed_and_restart(moments: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = randomly_reset(moments, seed=3, restart=2)
        torch.manual_seed(2)
        generator_state = torch.get_rng_state()
        second = randomly_reset(moments, seed=3, restart=2)
        assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.equal(first, second)
    assert not torch.equal(first, randomly_reset(moments, seed=4, restart=2))
    assert not torch.equal(first, randomly_reset(moments, seed=3, restart=3))


def test_random_masks_differ_between_factors() -> None:
    model, optimizer = trained()
    reset_optimizer(optimizer, model, mode="random", pruning_ratio=0.5, **DRAW)
    (_, first), (_, second) = low_rank_layers(model)
    assert first.lora_A.shape == second.lora_A.shape
    masks = [optimizer.state[layer.lora_A]["exp_avg"] == 0 for layer in (first, second)]
    assert not torch.equal(masks[0], masks[1])


# ------------------------------------------------------------------------------------------------------- step count


@PRUNING_MODES
@pytest.mark.parametrize("reset_step", [True, False])
def test_the_step_count_of_the_factors_starts_again_if_requested(mode: str, reset_step: bool) -> None:
    model, optimizer = trained(steps=4)
    reset_optimizer(optimizer, model, mode=mode, reset_step=reset_step, **DRAW)
    for name, values in state_of(model, optimizer).items():
        is_factor = name.endswith(("lora_A", "lora_B"))
        assert values["step"].item() == (0 if is_factor and reset_step else 4)


def test_a_step_count_that_is_a_plain_number_starts_again_too() -> None:
    model, optimizer = trained()
    _, layer = next(low_rank_layers(model))
    for factor in (layer.lora_A, layer.lora_B):
        optimizer.state[factor]["step"] = 17
    reset_optimizer(optimizer, model, mode="zero", reset_step=False)
    assert optimizer.state[layer.lora_A]["step"] == optimizer.state[layer.lora_B]["step"] == 17
    reset_optimizer(optimizer, model, mode="zero")
    assert optimizer.state[layer.lora_A]["step"] == optimizer.state[layer.lora_B]["step"] == 0


def updates_after_reset(
    gradient: Callable[[Tensor], Tensor], *, updates: int, steps_before: int, **reset: Any
) -> list[float]:
    """The largest update of any entry of a factor, in units of the learning rate, for each update after a reset."""
    model = wrap(
        nn.ModuleDict({"layer": nn.Linear(64, 64, bias=False)}), ReLoRAConfig(rank=32, target_modules=["layer"])
    )
    _, layer = next(low_rank_layers(model))
    factors = [layer.lora_A, layer.lora_B]
    learning_rate = 1e-4
    optimizer = torch.optim.AdamW(factors, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    sizes: list[float] = []
    for step in range(steps_before + updates):
        if step == steps_before:
            merge_and_reinit(model, seed=0, restart=1)
            reset_optimizer(optimizer, model, **DRAW, **reset)
        before = [factor.detach().clone() for factor in factors]
        for factor in factors:
            factor.grad = gradient(factor)
        optimizer.step()
        moved = max((new.detach() - old).abs().max().item() for new, old in zip(factors, before, strict=True))
        sizes.append(moved / learning_rate)
    return sizes[steps_before:]


def test_with_a_kept_step_count_updates_are_three_to_six_times_the_learning_rate() -> None:
    sizes = updates_after_reset(torch.ones_like, updates=20, steps_before=4000, mode="zero", reset_step=False)
    assert sizes[0] == pytest.approx(3.13, abs=0.05)
    assert max(sizes) == pytest.approx(6.5, abs=0.1)


def test_with_a_reset_step_count_no_update_exceeds_the_learning_rate() -> None:
    sizes = updates_after_reset(torch.ones_like, updates=20, steps_before=4000, mode="zero")
    assert sizes == pytest.approx([1.0] * 20, abs=0.01)


def noise(seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator)


@pytest.mark.parametrize("mode", ["magnitude", "random"])
def test_independent_masks_give_enormous_updates_and_joint_ones_do_not(mode: str) -> None:
    settings = {"mode": mode, "pruning_ratio": 0.9}
    independent = updates_after_reset(noise(0), updates=1, steps_before=300, moments="independent", **settings)
    joint = updates_after_reset(noise(0), updates=1, steps_before=300, moments="joint", **settings)
    assert independent[0] > 100
    assert joint[0] < 2


# ----------------------------------------------------------------------------------------------------------- errors


@PRUNING_MODES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_integer_codes_are_refused_and_named(mode: str, dtype: torch.dtype, key: str) -> None:
    model, optimizer = trained()
    _, layer = next(low_rank_layers(model))
    state = optimizer.state[layer.lora_B]
    state[key] = torch.full_like(state[key], 3, dtype=dtype)
    with pytest.raises(TypeError, match=rf"'{key}' of layers\.0\.lora_B holds {dtype}"):
        reset_optimizer(optimizer, model, mode=mode, reset_step=False, **DRAW)
    assert (state[key] == 3).all()
    assert reset_optimizer(optimizer, model, mode="none") == 0.0
    # The whole state is removed, so nothing is pruned as a value.
    assert reset_optimizer(optimizer, model, mode="zero") == 1.0
    assert optimizer.state[layer.lora_B] == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mode": "quantile"}, "mode='quantile'"),
        ({"mode": ""}, "mode=''"),
        ({"moments": "separate"}, "moments='separate'"),
        ({"pruning_ratio": -0.01}, "pruning_ratio=-0.01"),
        ({"pruning_ratio": 1.01}, "pruning_ratio=1.01"),
        ({"pruning_ratio": math.nan}, "pruning_ratio=nan"),
        ({"mode": "none", "pruning_ratio": 99.0}, "pruning_ratio=99"),
        ({"mode": "random"}, "seed and restart is not given"),
        ({"mode": "random", "seed": 0}, ", and restart is not given; pass .*restart="),
        ({"mode": "random", "restart": 1}, "and seed is not given"),
    ],
)
def test_arguments_outside_their_range_are_errors_and_touch_nothing(arguments: dict[str, Any], named: str) -> None:
    model, optimizer = trained()
    before = state_of(model, optimizer)
    with pytest.raises(ValueError, match=named):
        reset_optimizer(optimizer, model, **arguments)
    assert same(state_of(model, optimizer), before)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4)), ReLoRAConfig(rank=2, target_modules=["0"]))
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"none of the model's factors; .*after wrap"):
        reset_optimizer(other, model)


def test_an_unwrapped_model_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="no low-rank layers"):
        reset_optimizer(torch.optim.AdamW(model.parameters()), model)


def test_quantised_state_is_refused_before_anything_is_pruned() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ReLoRAConfig(rank=2, target_modules=["0", "1"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    first, last = model.get_parameter("0.lora_B"), model.get_parameter("1.lora_B")
    before = optimizer.state[first]["exp_avg"].clone()
    optimizer.state[last]["exp_avg"] = torch.zeros(last.shape, dtype=torch.uint8)
    with pytest.raises(TypeError, match="codes"):
        reset_optimizer(optimizer, model, mode="magnitude")
    assert torch.equal(optimizer.state[first]["exp_avg"], before)
    assert before.abs().sum() > 0


def with_trained_scale(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model after some updates, its optimizer, and the optimizer's state of the scale."""
    config = ReLoRAConfig(rank=2, target_modules=["0"], trainable_scaling=True)
    model = wrap(nn.Sequential(nn.Linear(4, 4)), config)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.get_parameter("0.scaling")]
    assert state["exp_avg"] != 0
    return model, optimizer, state


def test_a_trained_scale_is_reset_together_with_its_factors() -> None:
    model, optimizer, state = with_trained_scale(adamw)
    assert reset_optimizer(optimizer, model, mode="zero") == 1.0
    assert (state["exp_avg"], state["exp_avg_sq"], state["step"]) == (0, 0, 0)


@PRUNING_MODES
def test_the_step_count_of_a_trained_scale_is_no_moment(mode: str) -> None:
    """The step count and the scale both have an empty shape."""
    model, optimizer, state = with_trained_scale(adamw)
    fraction = reset_optimizer(optimizer, model, mode=mode, pruning_ratio=0.9, reset_step=False, **DRAW)
    assert state["step"] == 3
    states = [optimizer.state[model.get_parameter(f"0.{name}")] for name in ("lora_A", "lora_B", "scaling")]
    moments = [each[key] for each in states for key in ("exp_avg", "exp_avg_sq")]
    zeros = sum(int((moment == 0).sum()) for moment in moments)
    assert fraction == zeros / sum(moment.numel() for moment in moments) == zeros / (2 * (8 + 8 + 1))


def test_the_counts_of_nadam_start_again_and_are_no_moments() -> None:
    model, optimizer, state = with_trained_scale(lambda parameters: torch.optim.NAdam(parameters, lr=1e-2))
    before = state["mu_product"].clone()
    assert 0 < before < 1
    assert reset_optimizer(optimizer, model, mode="zero", reset_step=False) == 1.0
    assert (state["step"], state["mu_product"]) == (3, before)
    reset_optimizer(optimizer, model, mode="zero")
    assert (state["step"], state["mu_product"], state["exp_avg"]) == (0, 1, 0)


def test_the_pruned_count_is_exact_if_floats_would_be_off_by_one() -> None:
    values = torch.arange(1.0, 101.0)
    assert int(prune_mask_by_magnitude(values, 0.29).sum()) == 29


# ------------------------------------------------------------------------------------------------ the README's loop


def test_the_example_of_the_readme_runs_unchanged() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        model = nn.ModuleDict({name: nn.Linear(128, 128, bias=False) for name in names})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    space: dict[str, Any] = {"torch": torch, "model": model, "seed": 3}
    exec(example, space)
    assert space["clock"].restarts_before(20_000) == 9
    assert all(type(module) is nn.Linear for module in model.children())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
