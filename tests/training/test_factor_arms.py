"""Arms whose layers take the place of the targeted matrices: trainings against float64 formulas, begin and restarts."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from plain_training import Values, in_float64, train_plainly
from torch import Tensor, nn
from torch.func import functional_call
from trainers import VOCAB, WITHOUT_METHOD, Recorder, assert_equal_states, trainer_of

from relora.config.compose import compose
from relora.config.run import RunConfig
from relora.core.factorised import FactorisedLinear
from relora.core.sparse import SparseLowRankLinear
from relora.training.model import build
from relora.training.trainer import Trainer, TrainingError

pytestmark = pytest.mark.slow

RATES = ["optimizer.learning_rate=5e-3", "optimizer.embedding_learning_rate=2e-3"]
RESTARTS = ["method.restart_interval_steps=10", "schedule.restart_warmup_steps=3"]
FACTOR_ENDINGS = (".A", ".B", ".V")


def config_of(*overrides: str) -> RunConfig:
    return compose([*WITHOUT_METHOD, *RATES, "trainer.total_steps=30", *overrides])


def rate_of(name: str) -> float:
    """Embeddings, head and norms have a rate of their own."""
    return 5e-3 if name.endswith(FACTOR_ENDINGS) else 2e-3


def said(trainer: Trainer) -> list[str]:
    assert isinstance(trainer.tracker, Recorder)
    return trainer.tracker.said


def fresh_weights(config: RunConfig) -> tuple[nn.Module, Values]:
    """A model in float64 and its initial weights, before any method."""
    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0).double()
    return model, {name: value.detach().clone() for name, value in model.named_parameters()}


def mean_loss(model: nn.Module, weights: Values, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens of -log p(target)."""
    logits = functional_call(model, weights, kwargs={"input_ids": inputs}).logits
    return -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U S^1/2 and S^1/2 V^T of the largest singular values."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]


def refactorised(values: Values) -> Values:
    """arXiv 2505.22922: the singular value decomposition of each product, shared out equally."""
    new = dict(values)
    for name in values:
        if name.endswith(".B"):
            other = name.removesuffix("B") + "A"
            new[name], new[other] = truncated(values[name] @ values[other], values[name].shape[1])
    return new


# ------------------------------------------------------------------------------------------------------- lowrank


@pytest.mark.parametrize("restarts", [(), (10, 20)])
def test_lowrank_equals_a_plain_implementation_in_float64(restarts: tuple[int, ...], tmp_path: Path) -> None:
    config = config_of("method=lowrank", "method.rank=6", *(RESTARTS if restarts else []))
    trainer = in_float64(trainer_of(config, tmp_path))
    trainer.train()

    model, weights = fresh_weights(config)
    linears = list(config.model.shape(VOCAB).linears())
    for name in linears:
        weights[f"{name}.B"], weights[f"{name}.A"] = truncated(weights.pop(f"{name}.weight"), 6)

    def loss_of(values: Values, inputs: Tensor, targets: Tensor) -> Tensor:
        composed = {name: value for name, value in values.items() if not name.endswith(FACTOR_ENDINGS)}
        composed |= {f"{name}.weight": values[f"{name}.B"] @ values[f"{name}.A"] for name in linears}
        return mean_loss(model, composed, inputs, targets)

    plain = train_plainly(trainer, weights, loss_of, rate_of, restart=refactorised, restarts=restarts)
    trained = dict(trainer.model.named_parameters())
    assert len(trained) == len(plain)
    for name, value in plain.items():
        if name.endswith(".B"):
            layer = trainer.model.get_submodule(name.removesuffix(".B"))
            assert isinstance(layer, FactorisedLinear)
            # The signs of singular vectors are free: the products and the balance are not.
            product = value @ plain[name.removesuffix("B") + "A"]
            assert torch.allclose(layer.factor_B @ layer.factor_A, product, atol=2e-5, rtol=1e-4), name
            assert torch.allclose(layer.factor_B.abs(), value.abs(), atol=2e-5, rtol=1e-4), name
        elif not name.endswith(".A"):
            assert torch.allclose(trained[name], value, atol=2e-5, rtol=1e-4), name


def test_a_restart_of_lowrank_keeps_the_function_and_forgets_every_moment(tmp_path: Path) -> None:
    config = config_of("method=lowrank", "method.rank=6", *RESTARTS)
    trainer = trainer_of(config, tmp_path)
    seen: list[tuple[float, float, int, int]] = []
    restart = trainer.restart

    def watched(step: int) -> None:
        before = len(trainer.optimizer.state), trainer.validate(step).loss
        restart(step)
        seen.append((before[1], trainer.validate(step).loss, before[0], len(trainer.optimizer.state)))
        for layer in (each for each in trainer.model.modules() if isinstance(each, FactorisedLinear)):
            b, a = layer.factor_B.detach(), layer.factor_A.detach()
            assert torch.allclose(b.T @ b, a @ a.T, atol=1e-5)

    trainer.restart = watched  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == 2
    count = sum(parameter.requires_grad for parameter in trainer.model.parameters())
    for before, after, states, left in seen:
        assert after == pytest.approx(before, abs=1e-5)
        assert (states, left) == (count, 0)
    ages = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert ages == {10.0}, "embeddings and norms start anew too"
    rows = trainer.tracker.rows  # type: ignore[attr-defined]
    assert [step for step, row in rows.items() if "restart/number" in row] == [10, 20]
    # The first update after a restart has the rate 0, then a third and two thirds of the cosine after the re-warm-up.
    rates = [rows[step]["train/lr"] for step in (11, 12, 13, 14)]
    assert rates == pytest.approx([0, rates[3] / 3, 2 * rates[3] / 3, rates[3]])
    assert rows[10]["restart/rounding_change"] < 1e-6
    assert rows[10]["restart/reset_tensors"] == count
    assert sum("refactorised the products" in line for line in said(trainer)) == 2


@pytest.mark.parametrize("warm", [0, 4])
def test_lowrank_begins_as_the_best_approximation_and_says_what_it_keeps(warm: int, tmp_path: Path) -> None:
    config = config_of("method=lowrank", "method.rank=6", f"method.warm_start_steps={warm}")
    trainer = trainer_of(config, tmp_path)
    before: Values = {}
    begin = trainer.begin_method

    def watched(step: int) -> None:
        before.update({name: value.detach().double() for name, value in trainer.model.named_parameters()})
        begin(step)
        for name, layer in trainer.model.named_modules():
            if isinstance(layer, FactorisedLinear):
                b, a = truncated(before[f"{name}.weight"], 6)
                assert torch.allclose((layer.factor_B @ layer.factor_A).double(), b @ a, atol=1e-6)

    trainer.begin_method = watched  # type: ignore[method-assign]
    trainer.train()
    linears = config.model.shape(VOCAB).linears()
    squares = [(torch.linalg.svdvals(before[f"{name}.weight"]) ** 2).tolist() for name in linears]
    share = (sum(sum(each[:6]) for each in squares) / sum(sum(each) for each in squares)) ** 0.5
    (line,) = [each for each in said(trainer) if "lowrank begins" in each]
    assert line.startswith(f"step {warm}: " + ("the warm start ends, " if warm else ""))
    assert f"the factors keep {share:.1%} of |W|" in line


def test_factors_that_overflow_end_the_run_with_a_remedy(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("method=lowrank", "method.rank=6", *RESTARTS), tmp_path)
    trainer.begin_method(0)
    layer = next(each for each in trainer.model.modules() if isinstance(each, FactorisedLinear))
    with torch.no_grad():
        layer.factor_A[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"at restart 1 the factors of .* are not finite; lower optimizer"):
        trainer.restart(10)


# ------------------------------------------------------------------------------------------------------- sltrain


@pytest.mark.parametrize("method", ["lowrank", "sltrain", "cola"])
def test_a_warm_start_that_diverged_ends_with_a_remedy(method: str, tmp_path: Path) -> None:
    config = config_of(f"method={method}", "method.rank=4", "method.warm_start_steps=3")
    trainer = trainer_of(config, tmp_path)
    with torch.no_grad():
        trainer.model.get_parameter("model.layers.0.self_attn.q_proj.weight").fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"cannot begin: .*q_proj failed.*method\.warm_start_learning_rate"):
        trainer.begin_method(3)


@pytest.mark.parametrize("restarts", [(), (10, 20)])
def test_sltrain_equals_a_plain_implementation_in_float64(restarts: tuple[int, ...], tmp_path: Path) -> None:
    """The plain form copies the draws of A, of the support and of the values, and computes all else itself."""
    arm = ["method=sltrain", "method.rank=6", "method.density=0.1", "method.alpha=3"]
    config = config_of(*arm, *(RESTARTS if restarts else []))
    trainer = in_float64(trainer_of(config, tmp_path))
    model, weights = fresh_weights(config)
    positions: dict[str, list[int]] = {}
    begin = trainer.begin_method

    def noted(step: int) -> None:
        begin(step)
        for name, layer in trainer.model.named_modules():
            if isinstance(layer, SparseLowRankLinear):
                positions[name] = layer.support.tolist()
                drawn = (layer.factor_B, layer.factor_A, layer.sparse_values)
                for ending, value in zip((".B", ".A", ".V"), drawn, strict=True):
                    weights[name + ending] = value.detach().clone()

    trainer.begin_method = noted  # type: ignore[method-assign]
    trainer.train()

    linears = list(config.model.shape(VOCAB).linears())
    assert list(positions) == linears
    for name in linears:
        del weights[f"{name}.weight"]

    def weight_of(name: str, values: Values) -> Tensor:
        product = 3 / 6 * values[f"{name}.B"] @ values[f"{name}.A"]
        sparse = torch.zeros(product.numel(), dtype=torch.float64)
        return product + sparse.index_put((torch.tensor(positions[name]),), values[f"{name}.V"]).view_as(product)

    def loss_of(values: Values, inputs: Tensor, targets: Tensor) -> Tensor:
        composed = {name: value for name, value in values.items() if not name.endswith(FACTOR_ENDINGS)}
        return mean_loss(
            model, composed | {f"{name}.weight": weight_of(name, values) for name in linears}, inputs, targets
        )

    plain = train_plainly(trainer, weights, loss_of, rate_of, restart=refactorised, restarts=restarts)
    trained = dict(trainer.model.named_parameters())
    assert len(trained) == len(plain)
    for name in linears:
        layer = trainer.model.get_submodule(name)
        assert isinstance(layer, SparseLowRankLinear)
        assert torch.allclose(layer.sparse_values, plain[f"{name}.V"], atol=2e-5, rtol=1e-4), name
        assert torch.allclose(layer.product(), weight_of(name, plain), atol=2e-5, rtol=1e-4), name
    for name in set(trained) & set(plain):
        assert torch.allclose(trained[name], plain[name], atol=2e-5, rtol=1e-4), name


def test_sltrain_says_what_it_keeps_of_a_warm_start_only(tmp_path: Path) -> None:
    lines = []
    for warm in (0, 4):
        config = config_of("method=sltrain", "method.rank=6", f"method.warm_start_steps={warm}")
        trainer = trainer_of(config, tmp_path / str(warm))
        trainer.train()
        lines.append([line for line in said(trainer) if "sltrain begins" in line])
    assert lines[0] == []
    assert re.match(
        r"step 4: the warm start ends, sltrain begins: the factors and sparse values keep \d\d\.\d% of", lines[1][0]
    )


def test_sparse_values_have_the_rate_and_the_decay_of_the_factors(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("method=sltrain", "method.rank=6", "optimizer.weight_decay=0.5"), tmp_path)
    trainer.begin_method(0)
    settings = {
        parameter: (group["base_learning_rate"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in trainer.model.named_parameters():
        in_layer = name.endswith(("factor_A", "factor_B", "sparse_values"))
        assert settings[parameter] == ((5e-3, 0.5) if in_layer else (2e-3, 0.0)), name


# ---------------------------------------------------------------------------------------------------------- cola


class PlainCoLA(nn.Module):
    """B f(A x) with f(z) = z / (1 + exp(-z)), written out."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.A.T
        return (z / (1 + torch.exp(-z))) @ self.B.T


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("warm", [0, 4])
def test_cola_equals_a_plain_implementation_in_float64(warm: int, checkpointing: str, tmp_path: Path) -> None:
    """The plain form begins with the first factors of the trainer's model, and computes all else itself."""
    config = config_of(
        *("method=cola", "method.rank=6", f"method.warm_start_steps={warm}"),
        f"trainer.activation_checkpointing={checkpointing}",
    )
    trainer = in_float64(trainer_of(config, tmp_path))
    model, _ = fresh_weights(config)
    weights: Values = {}
    begin = trainer.begin_method

    def noted(step: int) -> None:
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        begin(step)
        assert step == warm
        for name, value in trainer.model.named_parameters():
            weights[name.replace("factor_", "")] = value.detach().clone()
        for name in config.model.shape(VOCAB).linears():
            if warm:
                b, a = truncated(before[f"{name}.weight"], 6)
                assert torch.allclose(weights[f"{name}.B"] @ weights[f"{name}.A"] / 2, b @ a, atol=1e-7)
            parent, _, attribute = name.rpartition(".")
            plain = PlainCoLA(weights[f"{name}.A"].clone(), weights[f"{name}.B"].clone())
            setattr(model.get_submodule(parent), attribute, plain)

    trainer.begin_method = noted  # type: ignore[method-assign]
    trainer.train()
    loss_of = partial(mean_loss, model)
    plain = train_plainly(trainer, weights, loss_of, rate_of, from_step=warm)
    trained = dict(trainer.model.named_parameters())
    assert len(trained) == len(plain)
    for name, value in trained.items():
        assert torch.allclose(value, plain[name.replace("factor_", "")], atol=2e-5, rtol=1e-4), name
    (said_once,) = [line for line in said(trainer) if "cola begins" in line] or [""]
    assert ("of the matrices that they replace, to first order" in said_once) == (warm > 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_cola_m_is_cola_to_the_bit(precision: str, tmp_path: Path) -> None:
    ends = []
    for number, setting in enumerate(("false", "true")):
        arm = ["method=cola", "method.rank=6", f"trainer.precision={precision}", "trainer.total_steps=8"]
        config = config_of(*arm, f"trainer.activation_checkpointing={setting}")
        trainer = trainer_of(config, tmp_path / str(number))
        trainer.train()
        ends.append(trainer)
    assert ends[0].config.config_hash == ends[1].config.config_hash
    assert_equal_states(*ends)


@pytest.mark.filterwarnings("ignore")  # warnings of torch while it traces
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("method", ["lowrank", "sltrain", "cola"])
def test_a_compiled_run_trains_equally(
    method: str, checkpointing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relora.training.model.COMPILER", "aot_eager")
    torch.compiler.reset()
    losses = []
    for setting in ("false", "true"):
        arm = [f"method={method}", "method.rank=6", "trainer.total_steps=5"]
        config = config_of(*arm, f"trainer.activation_checkpointing={checkpointing}", f"trainer.compile={setting}")
        losses.append(trainer_of(config, tmp_path / setting).train().loss)
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
