import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import TINY
from torch import Tensor, nn
from trainers import OutOfMemory, Recorder, assert_equal_states, config_of, stop_after, trainer_of

from relora.common.errors import RunError
from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.core.inbackward import UpdateInBackward
from relora.training.distributed import World
from relora.training.model import build
from relora.training.trainer import Interrupted, TrainingError

pytestmark = pytest.mark.slow


IN_BACKWARD = ("trainer.update_in_backward=true",)


def net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def batch(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), updates=st.integers(1, 4))
def test_the_updates_are_those_of_torch_to_the_bit(seed: int, updates: int) -> None:
    plain, ours = net(seed), net(seed)
    optimizer, in_backward = adam(plain), UpdateInBackward(adam(ours))
    for number in range(updates):
        for model in (plain, ours):
            model(batch(number)).square().sum().backward()
        gradients = [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten().double() for gradient in gradients]))
        assert in_backward.pop_norm().item() == pytest.approx(norm.item(), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.grad is None


def test_at_most_one_gradient_exists_at_a_time() -> None:
    model, most = net(0), 0
    optimizer = adam(model)
    UpdateInBackward(optimizer)

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in model.parameters()))

    optimizer.register_step_pre_hook(count)
    model(batch(0)).sum().backward()
    assert most == 1


def test_a_gradient_that_is_not_finite_leaves_its_parameter_unchanged() -> None:
    model = net(0)
    in_backward = UpdateInBackward(adam(model))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    next(model.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    model(batch(0)).square().sum().backward()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [False, True, True, True, True]
    assert in_backward.pop_norm().isnan()


def test_after_its_removal_gradients_are_kept() -> None:
    model = net(0)
    UpdateInBackward(adam(model)).remove()
    model(batch(0)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------- in a run


def unclipped(*overrides: str) -> RunConfig:
    return config_of("optimizer.max_grad_norm=null", *overrides)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.activation_checkpointing=true"],
        ["method.merged_weight=rebuilt"],
        ["method.merged_weight=never"],
        ["method.trainable_scaling=true"],
        ["method.dropout=0.5"],
    ],
)
def test_a_run_is_the_same_to_the_bit(overrides: list[str], precision: str, tmp_path: Path) -> None:
    overrides = [f"trainer.precision={precision}", *overrides]
    plain = trainer_of(unclipped(*overrides), tmp_path / "plain")
    ours = trainer_of(unclipped(*overrides, *IN_BACKWARD), tmp_path / "ours")
    plain.train()
    ours.train()
    assert plain.config.config_hash == ours.config.config_hash
    assert_equal_states(plain, ours)
    norms = [[trainer.tracker.rows[step]["train/grad_norm"] for step in range(1, 15)] for trainer in (plain, ours)]  # type: ignore[attr-defined]
    assert norms[0] == norms[1]


@pytest.mark.parametrize("method", ["full", "galore", "fira", "apollo", "lowrank", "sltrain", "cola"])
def test_a_run_of_another_method_is_the_same_to_the_bit(method: str, tmp_path: Path) -> None:
    tiny = [item for item in TINY if not item.startswith("method")]
    own = [] if method == "full" else ["method.rank=4"]
    own += ["method.restart_interval_steps=4"] if method in ("lowrank", "sltrain") else []
    overrides = [*tiny, f"method={method}", *own, "optimizer.max_grad_norm=null"]
    plain = trainer_of(compose(overrides), tmp_path / "plain")
    ours = trainer_of(compose([*overrides, *IN_BACKWARD]), tmp_path / "ours")
    plain.train()
    ours.train()
    assert_equal_states(plain, ours)


def test_a_run_resumes_to_the_bit_with_or_without_update_in_backward(tmp_path: Path) -> None:
    whole = trainer_of(unclipped(*IN_BACKWARD), tmp_path / "whole")
    whole.train()
    for updates, overrides in ((1, IN_BACKWARD), (9, IN_BACKWARD), (9, ())):
        folder = tmp_path / f"{updates} {len(overrides)}"
        with pytest.raises(Interrupted):
            trainer_of(unclipped(*IN_BACKWARD), folder, stop=stop_after(updates)).train()
        rest = trainer_of(unclipped(*overrides), folder)
        rest.train()
        assert_equal_states(whole, rest)


@pytest.mark.filterwarnings("ignore")  # torch warns while it traces
def test_a_compiled_run_is_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora.training.model.COMPILER", "aot_eager")
    torch.compiler.reset()
    plain = trainer_of(unclipped("trainer.compile=true"), tmp_path / "plain")
    ours = trainer_of(unclipped("trainer.compile=true", *IN_BACKWARD), tmp_path / "ours")
    plain.train()
    ours.train()
    assert_equal_states(plain, ours)


def test_after_training_a_backward_pass_updates_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(unclipped(*IN_BACKWARD), tmp_path)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.forward_backward(0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is not None for parameter in trainer.model.parameters() if parameter.requires_grad)


def test_a_diverging_run_ends_and_says_what_was_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(unclipped("trainer.max_consecutive_skipped_updates=2", *IN_BACKWARD), tmp_path)
    with torch.no_grad():
        trainer.model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(TrainingError, match=r"diverged: 2 updates .*lower optimizer\.learning_rate"):
        trainer.train()
    assert isinstance(trainer.tracker, Recorder)
    assert re.search(r"step \d+: loss .*no parameter .*is updated", trainer.tracker.said[0])


def test_out_of_memory_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    config = unclipped(*IN_BACKWARD)
    model = OutOfMemory(build(config.model, config.trained_shape(64), end_of_text_id=0, seed=0), 2, "cuda")
    with pytest.raises(TrainingError, match=r"4 sequences at a time.*use .*trainer\.update_in_backward=false"):
        trainer_of(config, tmp_path, model=model).train()


def test_a_run_with_fewer_sequences_at_a_time_cannot_resume_in_backward(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer_of(unclipped("trainer.sequences_per_micro_step=2"), tmp_path, stop=stop_after(3)).train()
    with pytest.raises(TrainingError, match=r"2 sequences at a time.*update_in_backward=true.* 4 .*set it to false"):
        trainer_of(unclipped(*IN_BACKWARD), tmp_path)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"update_in_backward=true .*one process, .* 2,.*set it to false"):
        trainer_of(unclipped(*IN_BACKWARD), tmp_path, world=World(rank=0, size=2))
