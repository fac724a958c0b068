"""benchmarks/defects: each defect has the effect that docs/defects.md says."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import REPOSITORY, TINY
from torch import Tensor, nn

from relora.common import plugins
from relora.common.errors import ConfigError
from relora.config.compose import compose
from relora.core.lowrank import LowRankLinear
from relora.methods.relora import OptimizerReset
from relora.studies.compare import labels_of
from relora.studies.sweeps import expand
from relora.training.job import launch

RANK, ALPHA, SIZE, RATE = 4, 2.0, 16, 1e-3
RUN: Any = SimpleNamespace(trainer=SimpleNamespace(seed=0))
X = torch.randn(32, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package is installed: its files are on the path, with the metadata that pip writes."""
    metadata = tmp_path / "site" / "relora_defects-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: relora-defects\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[relora.methods]\ndefective = relora_defects:Defective\n")
    monkeypatch.syspath_prepend(str(metadata.parent))
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks" / "defects"))
    plugins._installed.cache_clear()
    yield
    plugins._installed.cache_clear()


class Toy:
    """One wrapped matrix, the method, and Adam."""

    def __init__(self, *defects: str, trainable_scaling: bool = False, mode: str = "magnitude") -> None:
        from relora_defects import Defective

        torch.manual_seed(0)
        self.model = nn.ModuleDict({"proj": nn.Linear(SIZE, SIZE, bias=False)})
        self.method = Defective(
            name="defective",
            rank=RANK,
            alpha=ALPHA,
            target_modules=["proj"],
            reset_interval_steps=5,
            trainable_scaling=trainable_scaling,
            optimizer_reset=OptimizerReset(mode=mode),
            defects=list(defects),
        )
        self.method.begin(self.model, RUN)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=RATE, betas=(0.9, 0.999))

    @property
    def layer(self) -> LowRankLinear:
        layer = self.model["proj"]
        assert isinstance(layer, LowRankLinear)
        return layer

    def out(self) -> Tensor:
        return self.layer(X)

    def gradients(self) -> list[Tensor]:
        self.optimizer.zero_grad()
        (self.out() - X.roll(1, 0)).square().mean().backward()
        return [p.grad.clone() for p in self.parameters if p.grad is not None]

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.gradients()
            self.optimizer.step()

    def restart(self) -> Any:
        return self.method.restart(self.model, self.optimizer, RUN, 1)


def test_with_two_zero_factors_nothing_is_trained_until_the_first_restart() -> None:
    toy = Toy("zero_factors")
    assert all(not gradient.any() for gradient in toy.gradients())
    toy.train(10)
    assert not toy.layer.lora_A.any()
    assert not toy.layer.lora_B.any()
    toy.restart()
    assert any(gradient.any() for gradient in toy.gradients())
    assert any(gradient.any() for gradient in Toy().gradients()), "correct ReLoRA trains B from the first step on"


def test_a_merge_without_the_scale_moves_the_output_by_the_predicted_amount() -> None:
    for defects, factor in (((), 0.0), (("unscaled_merge",), 1 - ALPHA / RANK)):
        toy = Toy(*defects)
        toy.train(20)
        before, product = toy.out().detach(), (toy.layer.lora_B @ toy.layer.lora_A).detach()
        toy.restart()
        jump = toy.out().detach() - before
        torch.testing.assert_close(jump, factor * X @ product.T, atol=1e-6, rtol=1e-4)
        assert product.norm() > 1e-3


def test_masks_drawn_apart_make_an_update_far_above_the_learning_rate() -> None:
    largest = {}
    for defects in ((), ("independent_masks",)):
        toy = Toy(*defects)
        toy.train(50)
        toy.restart()
        first, second = (
            torch.cat([toy.optimizer.state[p][name].flatten() for p in (toy.layer.lora_A, toy.layer.lora_B)])
            for name in ("exp_avg", "exp_avg_sq")
        )
        lost = ((first != 0) & (second == 0)).sum() / (first != 0).sum()
        assert lost > 0.5 if defects else lost == 0
        steps = {toy.optimizer.state[p]["step"].item() for p in (toy.layer.lora_A, toy.layer.lora_B)}
        assert steps == ({50.0} if defects else {0.0})
        before = toy.layer.lora_B.detach().clone(), toy.layer.lora_A.detach().clone()
        toy.train(1)
        moved = [(toy.layer.lora_B - before[0]).abs().max(), (toy.layer.lora_A - before[1]).abs().max()]
        largest[defects] = max(moved).item() / RATE
    assert largest[()] < 10
    assert largest["independent_masks",] > 30


@pytest.mark.parametrize("mode", ["zero", "magnitude"])
def test_a_scale_that_is_reset_to_zero_stops_all_gradients(mode: str) -> None:
    toy = Toy("dead_scale", trainable_scaling=True, mode=mode)
    toy.train(10)
    toy.restart()
    assert all(not gradient.any() for gradient in toy.gradients())
    toy.train(10)
    moves_again = mode != "zero"  # the moments that survive move the factors without a gradient
    assert toy.layer.lora_B.any() == moves_again
    assert bool(toy.layer.scaling != 0.0) == moves_again
    correct = Toy(trainable_scaling=True, mode=mode)
    correct.train(10)
    correct.restart()
    assert any(gradient.any() for gradient in correct.gradients())


def test_a_merge_in_bf16_loses_what_is_below_the_last_bit() -> None:
    toy = Toy("bf16_merge")
    assert torch.equal(toy.layer.weight, toy.layer.weight.bfloat16().float())
    toy.train(3)
    old = toy.layer.weight.detach().double().clone()
    update = ALPHA / RANK * toy.layer.lora_B.detach().double() @ toy.layer.lora_A.detach().double()
    done = toy.restart()
    stored = toy.layer.weight.detach().double()
    assert torch.equal(stored, (old + update).float().bfloat16().double())
    lost = (old + update - stored).norm() / update.norm()
    assert done.metrics["rounding_loss"] == pytest.approx(lost.item(), rel=1e-3)
    assert lost > 0.3, "an update of this size is mostly lost"
    assert "bf16 lost" in done.message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.defects=[zero_factor]", "method.defects=zero_factor"),
        ("method.defects=[dead_scale]", "method.trainable_scaling=true"),
        ("method.defects=[dead_scale,unscaled_merge]", "cannot be combined"),
    ],
)
def test_a_wrong_choice_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(["method=defective", override])
    assert message in str(raised.value)


def test_the_order_of_the_names_does_not_matter() -> None:
    first, second = (
        compose(["method=defective", f"method.defects=[{names}]"])
        for names in ("zero_factors,bf16_merge", "bf16_merge,zero_factors")
    )
    assert first.config_hash == second.config_hash
    assert first.config_hash != compose(["method=relora"]).config_hash


@pytest.mark.slow
def test_the_sweep_has_every_defect_with_and_without_a_warm_start_and_three_seeds() -> None:
    from relora_defects import DEFECTS

    sweep = expand(["sweeps=defects", "experiments=laptop/small"])
    assert sweep.question.startswith("What does each defect")
    defective = [config for config in sweep.runs if config.method.name == "defective"]
    alone: dict[tuple[str, int], set[int]] = {}
    for config in defective:
        for name in config.method.defects:  # type: ignore[attr-defined]
            alone.setdefault((name, config.method.warm_start_steps), set()).add(config.trainer.seed)
    assert alone == {(name, steps): {0, 1, 2} for name in DEFECTS for steps in (0, 80)}
    rates = {(config.optimizer.learning_rate, config.optimizer.embedding_learning_rate) for config in defective}
    assert rates == {(1.0e-2, 4.0e-2)}, "those of ReLoRA's preset"
    names = set(labels_of(sweep.runs).values())
    assert any("defects=zero_factors+independent_masks" in name for name in names)


@pytest.mark.slow
def test_a_run_with_defects_is_trained_and_reported(text: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "method=defective", "method.defects=[zero_factors,bf16_merge]", "data=text", "tracker=jsonl"]
    overrides += [f"data.path={text}", f"runs_dir={tmp_path / 'runs'}"]
    status = launch(compose(overrides), overrides)
    assert (status.state, status.message) == ("finished", "")
    assert status.summary["restarts"] == 2
