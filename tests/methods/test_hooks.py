"""The hooks of a method that the trainer calls, and their order."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn
from trainers import WITHOUT_METHOD, Recorder, stop_after, trainer_of

from relora.common.errors import ConfigError, Interrupted
from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.methods.lora import LoRA

LORA = ("method=lora", "method.rank=4", "method.warm_start_steps=3")
SEEN: list[tuple[str, int]] = []


@dataclass(kw_only=True, slots=True)
class Watcher(LoRA):
    """It records the calls of its hooks, and doubles the gradients before they are clipped."""

    def before_update(self, model: nn.Module, run: RunConfig, step: int) -> None:
        SEEN.append(("before", step))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2

    def after_update(self, model: nn.Module, run: RunConfig, step: int) -> None:
        assert all(parameter.grad is None for parameter in model.parameters())
        SEEN.append(("after", step))


@pytest.mark.slow
def test_the_hooks_of_a_method_are_called_around_each_of_its_updates(tmp_path: Path) -> None:
    SEEN.clear()
    lora = compose([*WITHOUT_METHOD, *LORA])
    assert isinstance(lora.method, LoRA)
    fields = {item.name: getattr(lora.method, item.name) for item in dataclasses.fields(lora.method)}
    config = dataclasses.replace(lora, method=Watcher(**fields))
    recorder = Recorder()
    with pytest.raises(Interrupted):
        trainer_of(config, tmp_path, stop=stop_after(8), tracker=recorder).train()
    trainer_of(config, tmp_path, tracker=recorder).train()
    steps = range(config.method.warm_start_steps, config.total_steps)
    assert [(when, step) for step in steps for when in ("before", "after")] == SEEN
    plain = Recorder()
    trainer_of(lora, tmp_path / "plain", tracker=plain).train()
    # At the first update of the method, the weights are equal. The norm is computed after the hook.
    first = lora.method.warm_start_steps + 1
    norms = [each.rows[first]["train/grad_norm"] for each in (recorder, plain)]
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-5)


def test_a_method_that_needs_all_gradients_cannot_update_in_backward() -> None:
    config = compose([*WITHOUT_METHOD, *LORA, "trainer.update_in_backward=true", "optimizer.max_grad_norm=null"])
    with pytest.raises(ConfigError, match="before_update"):
        dataclasses.replace(config, method=Watcher(name="lora", rank=4))
