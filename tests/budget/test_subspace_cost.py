"""The cost of methods with Adam in a subspace, against real optimizers, and against the figures of the papers."""

import pytest
import torch
from small import TINY
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relora.budget.cost import STORAGE_BYTES, Cost
from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.training.model import build

WITHOUT_METHOD = tuple(item for item in TINY if not item.startswith("method"))
VOCAB_SIZE = 64
ARMS = {
    "galore": ["method=galore", "method.rank=4"],
    "galore of some": ["method=galore", "method.rank=8", "method.target_modules=[q_proj,down_proj]"],
    "fira": ["method=fira", "method.rank=4"],
    "fira without limit": ["method=fira", "method.rank=4", "method.growth_limit=null"],
    "apollo": ["method=apollo", "method.rank=4"],
    "apollo_mini of some": ["method=apollo_mini", "method.target_modules=[q_proj,down_proj]"],
}


def run_of(arm: list[str], *overrides: str) -> RunConfig:
    return compose([*WITHOUT_METHOD, *arm, *overrides])


def stepped(run: RunConfig) -> tuple[torch.optim.Optimizer, int]:
    """The method's optimizer after two steps with random gradients, and the FLOPs of the second step."""
    model: nn.Module = build(run.model, run.trained_shape(VOCAB_SIZE), end_of_text_id=0, seed=0)
    if run.trainer.precision == "bf16":
        model = model.bfloat16()
    run.method.begin(model, run)
    optimizer = run.method.build_optimizer(model, run)
    generator, flops = torch.Generator().manual_seed(0), 0
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        flops = counter.get_total_flops()
    return optimizer, flops


@pytest.mark.parametrize("precision", STORAGE_BYTES)
@pytest.mark.parametrize("arm", ARMS)
def test_the_bytes_of_the_state_are_those_of_a_real_step(arm: str, precision: str) -> None:
    run = run_of(ARMS[arm], f"trainer.precision={precision}")
    optimizer, _ = stepped(run)
    state = [value for values in optimizer.state.values() for value in values.values()]
    real = sum(value.numel() * value.element_size() for value in state)
    assert run.cost(VOCAB_SIZE).optimizer_bytes == real


@pytest.mark.parametrize("arm", ARMS)
def test_the_flops_of_a_step_without_a_new_projector_are_those_that_torch_counts(arm: str) -> None:
    """An interval so long that the share of the decompositions is below one FLOP in all."""
    run = run_of([*ARMS[arm], f"method.update_interval_steps={10**11}"])
    assert stepped(run)[1] == run.cost(VOCAB_SIZE).optimizer_flops


def test_a_step_has_its_share_of_the_decompositions() -> None:
    costs: list[Cost] = [
        run_of([*ARMS["galore"], f"method.update_interval_steps={interval}"]).cost(VOCAB_SIZE)
        for interval in (1, 10, 10**11)
    ]
    every, tenth, never = (each.optimizer_flops for each in costs)
    assert every - never == pytest.approx(10 * (tenth - never), rel=1e-3)
    # 2 layers: 4 matrices of 32 x 32 and 3 of 48 x 32.
    assert every - never == 2 * (4 * 26 * 32**3 + 3 * (6 * 48 * 32**2 + 20 * 32**3))
