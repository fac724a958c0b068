"""Each optimizer: its formula, the bytes of its state, its resets, and a resumed run to the bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import most_allocated_bytes
from torch import Tensor, nn
from trainers import config_of, stop_after, trainer_of

from relora.budget.cost import MATRICES, REST, Trained
from relora.common.errors import ConfigError, Interrupted
from relora.config.compose import compose
from relora.config.frozen import freeze, thaw
from relora.config.run import RunConfig
from relora.core.lowrank import ReLoRAConfig, merge_and_reinit, wrap
from relora.core.reset import reset_optimizer
from relora.methods.base import parameter_groups
from relora.optimizers.muon import Muon
from relora.training.trainer import Trainer

CODES = ("optimizer=adamw_8bit", "method.optimizer_reset.mode=zero")
CHOICES: dict[str, tuple[str, ...]] = {
    "muon": ("optimizer=muon",),
    "adamw_8bit": (*CODES, "model.hidden_size=128", "model.heads=2"),
}


def bytes_of_state(trainer: Trainer) -> int:
    """A tensor that several parameters share counts once."""
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(held.values())


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_a_run_resumes_to_the_bit(choice: str, tmp_path: Path) -> None:
    config = config_of(*CHOICES[choice], "optimizer.learning_rate=1e-3")
    whole = trainer_of(config, tmp_path / "whole")
    whole.train()
    for updates in (5, 4):
        with pytest.raises(Interrupted):
            trainer_of(config, tmp_path / "parts", stop=stop_after(updates)).train()
    resumed = trainer_of(config, tmp_path / "parts")
    assert resumed.first_step == 9
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    states = [trainer.optimizer.state_dict() for trainer in (resumed, whole)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, state in states[1]["state"].items():
        for name, value in state.items():
            resumed_value = states[0]["state"][number][name]
            assert type(resumed_value) is type(value)
            if isinstance(value, Tensor):
                assert torch.equal(resumed_value, value), (number, name)
            elif not isinstance(value, dict):
                assert resumed_value == value, (number, name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_optimizer_state_takes_as_many_bytes_as_the_plan_says(choice: str, method: str, tmp_path: Path) -> None:
    given = [text for text in CHOICES[choice] if not text.startswith("method.")]
    config = compose([*SMALL, *given, f"method={method}", *(["method.rank=4"] if method == "lora" else [])])
    trainer = trainer_of(config, tmp_path)
    trainer.train()
    assert bytes_of_state(trainer) == trainer.reporter.method_cost.optimizer_bytes


SMALL = [
    *("model.hidden_size=32", "model.intermediate_size=48", "model.layers=2", "model.heads=2"),
    *("schedule.warmup_steps=0", "trainer.total_steps=2", "trainer.sequences_per_step=2", "trainer.device=cpu"),
    *("data.sequence_length_tokens=16", "data.vocab_size=300", "optimizer.embedding_learning_rate=null"),
    "method.warm_start_steps=0",
]


@pytest.mark.parametrize("shape", [(512, 512), (1376, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_muon_takes_as_many_bytes_as_the_plan_says(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = nn.Parameter(torch.randn(*shape, dtype=dtype))
    muon = Muon(learning_rate=1e-3)
    optimizer = muon.build([{"params": [matrix], "role": MATRICES, "weight_decay": 0.0}, {"params": [], "role": REST}])
    matrix.grad = torch.randn_like(matrix)
    optimizer.step()
    planned = muon.step_bytes([Trained(MATRICES, *shape)], matrix.element_size())
    measured = most_allocated_bytes(optimizer.step)
    # A matrix product takes up to one bf16 square as scratch: as much as that on some CPUs, little on others.
    assert planned - 2 * min(shape) ** 2 <= 1.05 * measured
    assert planned >= 0.95 * measured


def orthogonalised(momentum: Tensor) -> Tensor:
    """Five iterations of Newton and Schulz with the coefficients of Jordan et al., in bf16."""
    x = momentum.bfloat16()
    x = x.T if momentum.shape[0] > momentum.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if momentum.shape[0] > momentum.shape[1] else x).float()


def test_muon_updates_matrices_by_its_formula_and_the_rest_by_adamw(tmp_path: Path) -> None:
    config = compose([*SMALL, "method=full", "optimizer=muon", "optimizer.weight_decay=0.1"])
    trainer = trainer_of(config, tmp_path)
    plain = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    start, momenta = dict(plain), dict[str, Tensor]()
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    torch.manual_seed(0)
    for step in range(1, 4):
        for group in trainer.optimizer.param_groups:
            group["lr"] = 1e-2
        for name, parameter in trainer.model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            if name.startswith("model.layers.") and parameter.ndim == 2:
                momenta[name] = 0.95 * momenta.get(name, torch.zeros_like(gradient)) + 0.05 * gradient
                looked_ahead = 0.05 * gradient + 0.95 * momenta[name]
                rate = 1e-2 * 0.2 * math.sqrt(max(gradient.shape))
                plain[name] = plain[name] * (1 - 1e-3) - rate * orthogonalised(looked_ahead)
            else:
                first, second = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                moments[name] = first, second
                scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
                plain[name] = plain[name] - 1e-2 * first / (1 - 0.9**step) / scale
        trainer.optimizer.step()
    for name, parameter in trainer.model.named_parameters():
        error = (parameter.detach() - plain[name]).norm() / (plain[name] - start[name]).norm()
        # The five iterations are in bf16, and each one rounds at 0.4%.
        assert error < (5e-2 if name in momenta else 1e-5), name


@pytest.mark.slow
def test_muon_gives_the_same_weights_if_it_updates_in_backward(tmp_path: Path) -> None:
    weights: list[dict[str, Tensor]] = []
    for way in ("true", "false"):
        given = ["optimizer=muon", "optimizer.max_grad_norm=null", f"trainer.update_in_backward={way}"]
        trainer = trainer_of(config_of(*given), tmp_path / way)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


# ------------------------------------------------------------------------------------------------------- restarts


def stepped(optimizer_of: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = wrap(nn.Sequential(nn.Linear(96, 64)), ReLoRAConfig(rank=64, target_modules=["0"]))
    optimizer = optimizer_of([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(3):
        model(torch.randn(8, 96)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def eight_bits(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(parameters, lr=1e-3)


@pytest.mark.parametrize("mode", ["random", "magnitude"])
def test_codes_are_never_pruned_as_values(mode: str) -> None:
    model, optimizer = stepped(eight_bits)
    before = {id(p): {k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for p, s in optimizer.state.items()}
    with pytest.raises(TypeError, match="uint8 codes"):
        reset_optimizer(optimizer, model, mode=mode, pruning_ratio=0.9, seed=0, restart=1)
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[key], value) for key, value in before[id(parameter)].items())


def test_codes_that_are_reset_to_zero_start_again() -> None:
    model, optimizer = stepped(eight_bits)
    fresh_model, fresh = stepped(eight_bits)
    for each, of in ((model, optimizer), (fresh_model, fresh)):
        merge_and_reinit(each, seed=0, restart=1)
        if of is fresh:
            fresh = eight_bits([parameter for parameter in each.parameters() if parameter.requires_grad])
    assert reset_optimizer(optimizer, model, mode="zero") == 1.0
    for own, other in zip(model.parameters(), fresh_model.parameters(), strict=True):
        own.data.copy_(other.data)
        gradient = torch.randn_like(own)
        own.grad, other.grad = gradient, gradient.clone()
    optimizer.step()
    fresh.step()
    for own, other in zip(model.parameters(), fresh_model.parameters(), strict=True):
        if own.ndim == 2 and own.requires_grad:  # the bias keeps its state
            assert torch.equal(own, other)


@pytest.mark.parametrize("mode", ["magnitude", "random"])
def test_a_reset_that_prunes_is_refused_with_codes_when_a_run_is_composed(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"mode={mode} .*=adamw_8bit .*use method\.optimizer_reset\.mode=zero"):
        compose(["optimizer=adamw_8bit", f"method.optimizer_reset.mode={mode}"])
    assert compose(["optimizer=adamw_8bit", "method.optimizer_reset.mode=zero"]).optimizer.name == "adamw_8bit"
    assert compose(["optimizer=adamw_8bit", "method=lora"]).optimizer.name == "adamw_8bit"


def test_galore_refuses_another_optimizer() -> None:
    with pytest.raises(ConfigError, match="use optimizer=adamw"):
        compose(["method=galore", "optimizer=muon"])


# --------------------------------------------------------------------------------------------------- missing packages


def test_without_bitsandbytes_the_error_gives_the_install_command_and_old_runs_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*CODES])
    freeze(config, tmp_path / "config.yaml")
    monkeypatch.setattr("relora.optimizers.adamw_8bit.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'relora\[8bit\]'"):
        compose([*CODES])
    assert thaw(tmp_path / "config.yaml") == config


def test_an_older_torch_has_no_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora.optimizers.muon.version", lambda name: "2.8.1+cpu")
    with pytest.raises(ConfigError, match=r"needs torch 2\.9"):
        compose(["optimizer=muon"])
    monkeypatch.setattr("relora.optimizers.muon.version", lambda name: "2.10.0")
    assert compose(["optimizer=muon"]).optimizer.name == "muon"


# ------------------------------------------------------------------------------------------------------ rates by role


@pytest.mark.slow
def test_learning_rates_depend_on_the_role(tmp_path: Path) -> None:
    given = ["optimizer.learning_rate=1e-2", "optimizer.embedding_learning_rate=3e-2", "method.b_rate_ratio=4"]
    config = config_of(*given, "method.warm_start_steps=0", "method.target_modules=[q_proj]")
    trainer = trainer_of(config, tmp_path)
    trainer.train()
    rates = rates_of(trainer.model, config)
    assert {rates[name] for name in rates if name.endswith(".lora_A") or "k_proj" in name} == {1e-2}
    assert {rates[name] for name in rates if name.endswith(".lora_B")} == {4e-2}
    assert {rates[name] for name in rates if "embed_tokens" in name or "norm" in name} == {3e-2}
    assert [group["base_learning_rate"] for group in trainer.optimizer.param_groups] == [1e-2, 3e-2, 4e-2]


def rates_of(model: nn.Module, config: RunConfig) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = config.method.parameter_groups(model, config)
    return {names[id(each)]: group["base_learning_rate"] for group in groups for each in group["params"]}


@pytest.mark.slow
def test_one_rate_for_both_factors_gives_one_group(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("method.warm_start_steps=0"), tmp_path)
    trainer.method.begin(trainer.model, trainer.config)
    groups = parameter_groups(trainer.model, trainer.config, 1e-2)
    assert [group["role"] for group in groups] == ["matrices", "rest"]
    assert config_of().config_hash == config_of("method.b_rate_ratio=1").config_hash
    assert config_of().config_hash != config_of("method.b_rate_ratio=2").config_hash
