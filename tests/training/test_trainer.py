import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import TINY
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import (
    VOCAB,
    WITHOUT_METHOD,
    OutOfMemory,
    Recorder,
    assert_equal_states,
    config_of,
    stop_after,
    stop_in_validation,
    trainer_of,
)

from relora.config.compose import compose
from relora.config.peak import USABLE_SHARE, Phases
from relora.config.run import RunConfig
from relora.core.lowrank import LowRankLinear, low_rank_layers
from relora.methods.lora import LoRA
from relora.runs import checkpoint
from relora.runs.metrics import MetricsLog, Progress, read_rows, row_metrics
from relora.training import microsteps
from relora.training.distributed import World
from relora.training.model import build, summed_cross_entropy
from relora.training.trainer import Interrupted, TrainingError

pytestmark = pytest.mark.slow


def bytes_for(config: RunConfig, sequences_at_a_time: int) -> int:
    """The memory into which so many sequences at a time just fit."""
    phases = Phases(config=config, vocab_size=VOCAB)
    return round(phases.peak_bytes(sequences_at_a_time) / USABLE_SHARE) + 1


# ------------------------------------------------------------------------------------------- independent references


def test_full_rank_equals_a_plain_loop(tmp_path: Path) -> None:
    config = compose([override for override in TINY if not override.startswith("method")] + ["method=full"])
    trainer = trainer_of(config, tmp_path)
    trainer.train()

    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, fused=True)
    total, warmup, minimum = 14, 2, 0.1
    for step in range(total):
        inputs, targets, _ = trainer.training.training_batch(step, 4, 0)
        loss = nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = minimum + (1 - minimum) / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        optimizer.param_groups[0]["lr"] = 2.5e-3 * (step / warmup if step < warmup else cosine)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), plain in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=2e-6, rtol=1e-4), name


def test_relora_equals_a_plain_implementation_of_its_cycle(tmp_path: Path, monkeypatch: Any) -> None:
    """The plain form has separate factors, computes W + s B A and Adam itself, and copies only the draws of A."""
    settings = ("method.optimizer_reset.mode=zero", "method.warm_start_steps=0", "optimizer.max_grad_norm=null")
    config = config_of(*settings, "optimizer.learning_rate=5e-3")
    first_draws: dict[int, dict[str, Tensor]] = {}

    class Watcher(Recorder):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            super().log(step, metrics)
            if "restart/number" in metrics:
                first_draws[step] = {n: layer.lora_A.detach().clone() for n, layer in low_rank_layers(trainer.model)}

    trainer = trainer_of(config, tmp_path, tracker=Watcher())
    begin = LoRA.begin

    def begin_and_note(method: LoRA, model: nn.Module, run: RunConfig) -> None:
        begin(method, model, run)
        first_draws[0] = {n: layer.lora_A.detach().clone() for n, layer in low_rank_layers(model)}

    monkeypatch.setattr(LoRA, "begin", begin_and_note)
    trainer.train()

    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)
    values = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    model = model.double()
    linears = list(config.model.shape(VOCAB).linears())
    state: dict[str, tuple[Tensor, Tensor]] = {}
    ages: dict[str, int] = {}
    factors: dict[str, Tensor] = {}
    for step in range(14):
        if step in first_draws:
            for name in linears:
                if step:
                    values[f"{name}.weight"] += 0.25 * factors[f"{name}.B"] @ factors[f"{name}.A"]
                factors[f"{name}.A"] = first_draws[step][name].double()
                factors[f"{name}.B"] = torch.zeros(values[f"{name}.weight"].shape[0], 4, dtype=torch.float64)
                for factor in ("A", "B"):
                    state.pop(f"{name}.{factor}", None)
                    ages.pop(f"{name}.{factor}", None)
        trained = {name: value for name, value in values.items() if name.removesuffix(".weight") not in linears}
        trained |= factors
        trained = {name: value.clone().requires_grad_() for name, value in trained.items()}
        composed = {
            name: trained.get(name, value)
            if name.removesuffix(".weight") not in linears
            else value + 0.25 * trained[name.replace(".weight", ".B")] @ trained[name.replace(".weight", ".A")]
            for name, value in values.items()
        }
        inputs, targets, _ = trainer.training.training_batch(step, 4, 0)
        logits = functional_call(model, composed, kwargs={"input_ids": inputs}).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        rate = 5e-3 * trainer.factor(step)
        for name, gradient in gradients.items():
            m, v = state.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            state[name], ages[name] = (m, v), ages.get(name, 0) + 1
            update = (m / (1 - 0.9 ** ages[name])) / ((v / (1 - 0.999 ** ages[name])).sqrt() + 1e-8)
            (factors if name in factors else values)[name] = trained[name].detach() - rate * update

    for name, layer in low_rank_layers(trainer.model):
        assert torch.allclose(layer.weight.double(), values[f"{name}.weight"], atol=2e-4, rtol=1e-3), name
        assert torch.allclose(layer.lora_B.double(), factors[f"{name}.B"], atol=2e-4, rtol=1e-3), name
    head = trainer.model.get_parameter("lm_head.weight")
    assert torch.allclose(head.double(), values["lm_head.weight"], atol=2e-4, rtol=1e-3)


def test_a_warm_start_is_the_beginning_of_the_full_rank_run(tmp_path: Path) -> None:
    relora = trainer_of(config_of("method.warm_start_learning_rate=2.5e-3"), tmp_path / "..")
    full_overrides = [override for override in TINY if not override.startswith("method")]
    full = trainer_of(compose([*full_overrides, "method=full"]), tmp_path)
    relora.train()
    full.train()
    for step in (1, 2, 3):
        assert relora.tracker.rows[step]["train/loss"] == full.tracker.rows[step]["train/loss"]  # type: ignore[attr-defined]
    assert relora.tracker.rows[5]["train/loss"] != full.tracker.rows[5]["train/loss"]  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------------- the cycle


def test_every_restart_of_the_clock_happens_and_is_logged(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(), tmp_path)
    trainer.train()
    rows = trainer.tracker.rows  # type: ignore[attr-defined]
    assert [step for step, row in rows.items() if "restart/number" in row] == [7, 11]
    assert [rows[step]["restart/number"] for step in (7, 11)] == [1, 2]
    for step in (7, 11):
        assert rows[step]["restart/lr_factor"] == 0.0
        assert rows[step]["restart/relative_update"] > 0
        assert rows[step]["restart/rounding_loss"] < 1e-3
        assert rows[step]["restart/reset_fraction"] == pytest.approx(0.99, abs=0.01)
        assert rows[step + 1]["train/lr"] == 0.0


def test_a_restart_without_re_warm_up_says_that_the_rate_is_not_near_zero(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("schedule.restart_warmup_steps=0"), tmp_path)
    trainer.train()
    restarts = [line for line in trainer.tracker.said if "restart 1" in line]  # type: ignore[attr-defined]
    assert len(restarts) == 1
    assert "not near zero" in restarts[0]


@pytest.mark.parametrize("mode", ["none", "zero", "random", "magnitude"])
@pytest.mark.parametrize("restart_warmup_steps", [0, 2])
@pytest.mark.parametrize("warm_start_steps", [0, 3])
def test_every_cell_of_the_ablation_runs(tmp_path: Path, mode: str, restart_warmup_steps: int, warm_start_steps: int):
    trainer = trainer_of(
        config_of(
            f"method.optimizer_reset.mode={mode}",
            f"schedule.restart_warmup_steps={restart_warmup_steps}",
            f"method.warm_start_steps={warm_start_steps}",
            "trainer.total_steps=10",
        ),
        tmp_path,
    )
    assert math.isfinite(trainer.train().loss)


@pytest.mark.parametrize("overrides", [["method=lora"], ["method.reset_interval_steps=null"]])
def test_a_run_without_a_reset_interval_has_no_restarts(tmp_path: Path, overrides: list[str]) -> None:
    kept = [item for item in TINY if not (overrides == ["method=lora"] and "reset_interval" in item)]
    trainer = trainer_of(compose([*kept, *overrides]), tmp_path)
    trainer.train()
    assert not any("restart/number" in row for row in trainer.tracker.rows.values())  # type: ignore[attr-defined]
    assert any(isinstance(module, LowRankLinear) for module in trainer.model.modules())


def test_the_wrapped_matrices_hold_no_gradient_and_no_optimizer_state(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(), tmp_path)
    trainer.train()
    held = set(trainer.optimizer.state)
    for _, layer in low_rank_layers(trainer.model):
        assert layer.weight.grad is None
        assert layer.weight not in held
    assert len(held) == sum(parameter.requires_grad for parameter in trainer.model.parameters())


def test_the_embedding_learning_rate_is_only_for_weights_that_no_method_wraps(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("optimizer.embedding_learning_rate=1e-12"), tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert torch.allclose(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"], atol=1e-9)
    assert torch.allclose(after["lm_head.weight"], before["lm_head.weight"], atol=1e-9)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(after[name], before[name], atol=1e-6)


def test_a_trained_scale_has_the_learning_rate_of_the_factors_and_no_weight_decay(tmp_path: Path) -> None:
    rates = ("optimizer.learning_rate=1e-3", "optimizer.embedding_learning_rate=1e-1", "optimizer.weight_decay=0.5")
    trainer = trainer_of(config_of("method.trainable_scaling=true", *rates), tmp_path)
    trainer.train()
    rate_of = {
        parameter: (group["base_learning_rate"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for _, layer in low_rank_layers(trainer.model):
        assert rate_of[layer.lora_A] == rate_of[layer.lora_B] == (1e-3, 0.5)
        assert isinstance(layer.scaling, nn.Parameter)
        assert rate_of[layer.scaling] == (1e-3, 0.0)
    assert rate_of[trainer.model.get_parameter("lm_head.weight")] == (1e-1, 0.0)
    assert len(rate_of) == sum(parameter.requires_grad for parameter in trainer.model.parameters())


# ----------------------------------------------------------------------------------------------- batch and precision


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_steps_do_not_change_what_is_learned(tmp_path: Path, micro: int) -> None:
    whole = trainer_of(config_of(), tmp_path)
    parts = trainer_of(
        config_of(f"trainer.sequences_per_micro_step={micro}"), tmp_path, checkpoint_folder=tmp_path / "other"
    )
    whole.train()
    parts.train()
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], atol=2e-4), name


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_every_precision_learns(tmp_path: Path, precision: str) -> None:
    trainer = trainer_of(config_of(f"trainer.precision={precision}", "trainer.total_steps=63"), tmp_path)
    last = trainer.train()
    assert last.loss < trainer.tracker.rows[0]["eval/loss"] - 0.3  # type: ignore[attr-defined]
    stored = {parameter.dtype for parameter in trainer.model.parameters()}
    assert stored == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_gradients_of_micro_steps_are_summed_in_fp32_and_rounded_once(tmp_path: Path, ranks: int) -> None:
    """The reference is the float64 sum of the bf16 gradients of each sequence."""
    settings = ("trainer.precision=bf16", "trainer.sequences_per_step=64")
    single = trainer_of(config_of(*settings, "trainer.sequences_per_micro_step=1"), tmp_path)
    sums: dict[str, Tensor] = {}
    batch = single.training.training_batch(0, 64, 0)
    single.model.train()
    for one, target, _ in batch.split(1):
        (summed_cross_entropy(single.model, one, target) / single.config.tokens_per_step).backward()
        for name, parameter in single.model.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + parameter.grad.double()
            parameter.grad = None

    class Twice(World):
        """Two ranks with equal gradients."""

        def _all_reduce(self, tensor: Tensor) -> None:
            tensor.mul_(2)

    if ranks == 2:
        single.micro.world = Twice(rank=0, size=2)
        single.micro.make_room(single._parameters)
        # Each of the two ranks takes the whole batch.
        single.training.training_batch = lambda *_, **__: batch  # type: ignore[method-assign]
    single.forward_backward(0)
    for name, parameter in single.model.named_parameters():
        gradient, exact = parameter.grad, ranks * sums[name]
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact).norm() < 0.0025 * exact.norm(), name
        half_a_spacing = torch.exp2(exact.abs().clamp(min=1e-30).log2().floor() - 8)
        assert ((gradient.double() - exact).abs() <= 1.01 * half_a_spacing + 1e-9).all(), name


def test_progress_counts_tokens_and_steps(tmp_path: Path) -> None:
    trainer = trainer_of(config_of(), tmp_path)
    trainer.train()
    rows = trainer.tracker.rows  # type: ignore[attr-defined]
    assert rows[14]["progress/tokens"] == 14 * 4 * 16
    assert trainer.tracker.progressed[-1].step == 14  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_running_out_of_memory_halves_the_micro_batch_and_says_so(tmp_path: Path, kind: str) -> None:
    config = config_of("method.target_modules=[q_proj]", "trainer.sequences_per_step=6")
    plain = trainer_of(config, tmp_path)
    plain.train()
    model = OutOfMemory(build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0), 1, kind)
    small = trainer_of(config, tmp_path, model=model, checkpoint_folder=tmp_path / "other")
    small.train()
    assert small.micro.sequences_per_micro_step == 1
    lines = [line for line in small.tracker.said if "out of memory" in line]  # type: ignore[attr-defined]
    assert ["=3 " in lines[0], "=1 " in lines[1], len(lines)] == [True, True, 2]
    assert small.tracker.rows[3]["train/loss"] == pytest.approx(plain.tracker.rows[3]["train/loss"], abs=1e-5)  # type: ignore[attr-defined]


def test_a_micro_step_that_fits_is_chosen_and_equals_one_that_is_set(tmp_path: Path) -> None:
    chosen = trainer_of(config_of(f"plan.device_memory={bytes_for(config_of(), 2)}"), tmp_path)
    (line,) = [line for line in chosen.tracker.said if "sequences at a time" in line]  # type: ignore[attr-defined]
    assert line.startswith("2 of 4 sequences at a time: by the plan they need ")
    chosen.train()
    given = trainer_of(config_of("trainer.sequences_per_micro_step=2"), tmp_path, checkpoint_folder=tmp_path / "other")
    given.train()
    assert_equal_states(chosen, given)


def test_a_device_that_does_not_say_its_memory_gets_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microsteps, "available_bytes", lambda device, held_bytes: None)
    assert trainer_of(config_of(), tmp_path).micro.sequences_per_micro_step == 4


@pytest.mark.parametrize("later", [1, 4])
def test_a_resumed_run_keeps_its_micro_step_whatever_memory_is_free(tmp_path: Path, later: int) -> None:
    """Another micro-step would round differently, and the run would not equal an undisturbed one."""
    first = config_of(f"plan.device_memory={bytes_for(config_of(), 2)}", "trainer.checkpoint_interval_steps=3")
    with pytest.raises(Interrupted):
        trainer_of(first, tmp_path, stop=stop_after(8)).train()
    then = config_of(f"plan.device_memory={bytes_for(config_of(), later)}", "trainer.checkpoint_interval_steps=3")
    resumed = trainer_of(then, tmp_path)
    assert resumed.micro.sequences_per_micro_step == 2
    resumed.train()
    undisturbed = trainer_of(first, tmp_path, checkpoint_folder=tmp_path / "other")
    undisturbed.train()
    assert_equal_states(resumed, undisturbed)


def test_running_out_of_memory_in_a_validation_leaves_dropout_on(tmp_path: Path) -> None:
    config = config_of("method.dropout=0.5")
    model = OutOfMemory(build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0), 4, "cuda")
    trainer = trainer_of(config, tmp_path, model=model)
    modes: list[bool] = []
    trainer.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.limit_of_evaluation = 2
    trainer.train()
    assert trainer.micro.sequences_per_micro_step == 2
    assert modes.count(True) == 14 * 2
    assert trainer.model.training


def test_one_sequence_that_does_not_fit_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    config = config_of()
    model = OutOfMemory(build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0), 0, "cuda")
    options = "trainer.activation_checkpointing=true, method.merged_weight=rebuilt, trainer.precision=bf16"
    with pytest.raises(TrainingError, match=f"; use {options}, .*shorter sequences$"):
        trainer_of(config, tmp_path, model=model).train()


def test_a_setting_that_the_run_has_already_is_no_remedy(tmp_path: Path) -> None:
    config = compose([item for item in TINY if not item.startswith("method")] + ["method=full"])
    model = OutOfMemory(build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0), 0, "cuda")
    with pytest.raises(TrainingError, match=r"use trainer\.activation_checkpointing=true, trainer\.precision=bf16, a "):
        trainer_of(config, tmp_path, model=model).train()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_memory_for_the_merged_weights_is_an_error_with_a_remedy(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        if kind == "cpu":
            torch.empty(1 << 55, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = trainer_of(config_of(), tmp_path)
    monkeypatch.setattr("relora.core.exact_ways.materialise", no_room)
    with pytest.raises(TrainingError, match=r"out of memory .*forward pass; use method\.merged_weight=rebuilt"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------- non-finite


class NotANumber(nn.Module):
    """A model that returns NaN in the given training calls."""

    def __init__(self, model: nn.Module, calls: set[int]) -> None:
        super().__init__()
        self.inner, self.calls, self.call = model, calls, -1

    def forward(self, input_ids: Tensor, **settings):
        output = self.inner(input_ids=input_ids, **settings)
        self.call += self.training
        if self.training and self.call in self.calls:
            output.logits = output.logits * float("nan")
        return output


def test_a_non_finite_update_is_skipped_and_counted_and_shifts_no_rate_or_restart(tmp_path: Path) -> None:
    config = config_of("trainer.validation_interval_steps=1")
    model = NotANumber(build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0), {2, 8})
    trainer = trainer_of(config, tmp_path, model=model)
    plain = trainer_of(config, tmp_path, checkpoint_folder=tmp_path / "other")
    trainer.train()
    plain.train()
    rows, regular = trainer.tracker.rows, plain.tracker.rows  # type: ignore[attr-defined]
    assert math.isnan(rows[3]["train/loss"])
    assert rows[3]["eval/loss"] == rows[2]["eval/loss"]
    assert [rows[step]["train/skipped_updates"] for step in (2, 3, 8, 9, 14)] == [0, 1, 1, 2, 2]
    assert [rows[step]["train/lr"] for step in range(1, 15)] == [regular[step]["train/lr"] for step in range(1, 15)]
    assert [step for step in rows if "restart/number" in rows[step]] == [7, 11]
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_a_run_that_stays_non_finite_ends_with_a_clear_message(tmp_path: Path) -> None:
    config = config_of("trainer.max_consecutive_skipped_updates=3", "trainer.total_steps=30")
    model = NotANumber(build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0), set(range(5, 30)))
    trainer = trainer_of(config, tmp_path, model=model)
    with pytest.raises(TrainingError, match=r"3 updates in a row, up to step 7.*lower optimizer.learning_rate"):
        trainer.train()


def test_a_diverging_learning_rate_ends_the_run(tmp_path: Path) -> None:
    config = config_of("optimizer.learning_rate=1e30", "trainer.max_consecutive_skipped_updates=2")
    with pytest.raises(TrainingError, match="diverged"):
        trainer_of(config, tmp_path).train()


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("step", range(1, 14))
def test_a_run_stopped_after_any_step_continues_to_the_bit(tmp_path: Path, step: int) -> None:
    config = config_of("trainer.checkpoint_interval_steps=100")
    whole = trainer_of(config, tmp_path, checkpoint_folder=tmp_path / "whole")
    whole.train()

    path = tmp_path / "metrics.jsonl"
    with MetricsLog.opened(path, exact=True) as log, pytest.raises(Interrupted):
        trainer_of(config, tmp_path, tracker=log, stop=stop_after(step)).train()
    with MetricsLog.opened(path, exact=True) as log:
        resumed = trainer_of(config, tmp_path, tracker=log)
        assert resumed.first_step == step
        resumed.train()
    assert_equal_states(resumed, whole)
    losses = {row["step"]: row["train/loss"] for row in read_rows(path) if "train/loss" in row}
    assert losses == {
        number: row["train/loss"]
        for number, row in whole.tracker.rows.items()  # type: ignore[attr-defined]
        if "train/loss" in row
    }


@pytest.mark.parametrize(("validation", "step"), [(0, 0), (1, 5), (3, 14)])
def test_a_run_asked_to_stop_in_a_validation_repeats_it_after_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int, step: int
) -> None:
    config = config_of("trainer.checkpoint_interval_steps=100")
    whole = trainer_of(config, tmp_path, checkpoint_folder=tmp_path / "whole")
    whole.train()
    batches_of_each = math.ceil(whole.validation.count / whole.micro.sequences_per_micro_step)
    batches = validation * batches_of_each + 2
    path = tmp_path / "metrics.jsonl"
    with monkeypatch.context() as patch:
        stop, done = stop_in_validation(batches, patch)
        with MetricsLog.opened(path, exact=True) as log, pytest.raises(Interrupted, match=f"test after step {step}"):
            trainer_of(config, tmp_path, tracker=log, stop=stop).train()
        assert len(done) == batches
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step
    with MetricsLog.opened(path, exact=True) as log:
        resumed = trainer_of(config, tmp_path, tracker=log)
        assert resumed.first_step == step
        resumed.train()
    assert_equal_states(resumed, whole)
    losses = {row["step"]: row["eval/loss"] for row in read_rows(path) if "eval/loss" in row}
    rows = whole.tracker.rows.items()  # type: ignore[attr-defined]
    assert losses == {number: row["eval/loss"] for number, row in rows if "eval/loss" in row}


def test_a_run_asked_to_stop_before_a_validation_does_not_begin_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, done = stop_in_validation(10_000, monkeypatch)
    trainer = trainer_of(config_of(), tmp_path, stop=stop_after(5))
    per_validation = math.ceil(trainer.validation.count / trainer.micro.sequences_per_micro_step)
    with pytest.raises(Interrupted, match="test after step 5"):
        trainer.train()
    assert len(done) == per_validation, "only the validation before the first step"
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 5


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=bf16"],
        ["trainer.precision=bf16_autocast"],
        ["method.dropout=0.2"],
        ["method.trainable_scaling=true", "method.reinit=orthogonal"],
        ["method.optimizer_reset.mode=random", "method.optimizer_reset.moments=independent"],
        ["optimizer.weight_decay=0.1", "trainer.sequences_per_micro_step=1"],
    ],
)
def test_every_setting_continues_to_the_bit(tmp_path: Path, overrides: list[str]) -> None:
    config = config_of("trainer.checkpoint_interval_steps=100", *overrides)
    whole = trainer_of(config, tmp_path, checkpoint_folder=tmp_path / "whole")
    whole.train()
    for stop in (4, 4):
        with pytest.raises(Interrupted):
            trainer_of(config, tmp_path, stop=stop_after(stop)).train()
    torch.manual_seed(12345)
    resumed = trainer_of(config, tmp_path)
    assert resumed.first_step == 8
    resumed.train()
    assert_equal_states(resumed, whole)


@pytest.mark.parametrize(
    "arm",
    [
        ["method=full"],
        ["method=full", "method.warm_start_steps=5"],
        ["method=lora", "method.rank=4"],
        ["method=control", "method.rank=2"],
        ["method=galore", "method.rank=4", "method.update_interval_steps=4", "method.target_modules=[q_proj,up_proj]"],
        ["method=galore", "method.rank=4", "method.warm_start_steps=3", "optimizer.weight_decay=0.1"],
        ["method=galore", "method.rank=4", "method.update_interval_steps=4", "method.square_side=left"],
        ["method=fira", "method.rank=4", "method.update_interval_steps=4", "method.warm_start_steps=3"],
        ["method=fira", "method.rank=4", "method.target_modules=[q_proj,up_proj]", "trainer.precision=bf16"],
        ["method=apollo", "method.rank=4", "method.update_interval_steps=4", "method.warm_start_steps=3"],
        ["method=apollo_mini", "method.update_interval_steps=4", "trainer.precision=bf16"],
        ["method=lowrank", "method.rank=4"],
        ["method=lowrank", "method.rank=4", "method.warm_start_steps=3", "method.restart_interval_steps=5"],
        ["method=lowrank", "method.rank=4", "trainer.precision=bf16", "method.restart_interval_steps=8"],
        ["method=lowrank", "method.rank=4", "trainer.precision=bf16_autocast", "optimizer=muon"],
        ["method=cola", "method.rank=4"],
        ["method=cola", "method.rank=4", "method.warm_start_steps=3", "trainer.activation_checkpointing=true"],
        ["method=cola", "method.rank=4", "trainer.precision=bf16"],
        ["method=cola", "method.rank=4", "trainer.precision=bf16_autocast", "optimizer=muon"],
        ["method=sltrain", "method.rank=4"],
        ["method=sltrain", "method.rank=4", "method.warm_start_steps=3", "method.restart_interval_steps=5"],
        ["method=sltrain", "method.rank=4", "trainer.precision=bf16", "method.restart_interval_steps=8"],
        ["method=sltrain", "method.rank=4", "trainer.precision=bf16_autocast", "optimizer=muon"],
    ],
    ids=" ".join,
)
def test_every_arm_learns_and_continues_to_the_bit(tmp_path: Path, arm: list[str]) -> None:
    config = compose([*WITHOUT_METHOD, *arm, "trainer.total_steps=50", "trainer.checkpoint_interval_steps=100"])
    whole = trainer_of(config, tmp_path, checkpoint_folder=tmp_path / "whole")
    last = whole.train()
    assert last.loss < whole.tracker.rows[0]["eval/loss"] - 0.2  # type: ignore[attr-defined]
    for step in (2, 3, 9):
        with pytest.raises(Interrupted):
            trainer_of(config, tmp_path, stop=stop_after(step)).train()
    resumed = trainer_of(config, tmp_path)
    assert resumed.first_step == 14
    resumed.train()
    assert_equal_states(resumed, whole)


def test_the_control_arm_trains_as_many_parameters_as_the_factors_would(tmp_path: Path) -> None:
    control = trainer_of(compose([*WITHOUT_METHOD, "method=control", "method.rank=2"]), tmp_path)
    low_rank = trainer_of(compose([*WITHOUT_METHOD, "method=lora", "method.rank=2"]), tmp_path)
    low_rank.method.begin(low_rank.model, low_rank.config)
    counts = [sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) for trainer in (control, low_rank)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
    assert counts[0] == control.reporter.method_cost.trainable_parameters
    assert control.config.comparison_key == low_rank.config.comparison_key


def test_galore_projects_the_targeted_matrices_and_nothing_else(tmp_path: Path) -> None:
    arm = ["method=galore", "method.rank=4", "method.target_modules=[q_proj]"]
    trainer = trainer_of(compose([*WITHOUT_METHOD, *arm]), tmp_path)
    trainer.train()
    state_bytes = 0
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        assert ("projector" in state) == ("q_proj" in name), name
        state_bytes += sum(value.numel() * value.element_size() for value in state.values())
    assert state_bytes == trainer.reporter.method_cost.optimizer_bytes
    steps = 14 * trainer.reporter.method_cost.flops_per_update(64)
    assert trainer.tracker.rows[14]["progress/flops"] == steps  # type: ignore[attr-defined]


def test_a_gradient_without_a_subspace_is_one_line_for_the_user(tmp_path: Path) -> None:
    """A value projection of zero gives no gradient to the projections of query, key and output."""
    trainer = trainer_of(compose([*WITHOUT_METHOD, "method=galore", "method.rank=4"]), tmp_path)
    layers = [trainer.model.get_submodule(f"model.layers.{layer}.self_attn.v_proj") for layer in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()  # type: ignore[operator, union-attr]
    trainer.train()
    said = [line for line in trainer.tracker.said if "projector" in line]  # type: ignore[attr-defined]
    assert len(said) == 1
    assert said[0].startswith(
        "step 0: galore: no new projector for model.layers.0.self_attn.q_proj and 5 more, because "
    )
    assert "its gradient is zero; a matrix keeps its last projector" in said[0]


def test_replaying_steps_after_the_last_checkpoint_keeps_their_first_rows(tmp_path: Path) -> None:
    config = config_of("trainer.checkpoint_interval_steps=3")
    path = tmp_path / "metrics.jsonl"

    class Killed(Exception):  # noqa: N818
        pass

    class KilledLog(MetricsLog):
        def progress(self, progress: Progress) -> None:
            if progress.step == 8:
                raise Killed

    with KilledLog.opened(path, exact=True) as log, pytest.raises(Killed):
        trainer_of(config, tmp_path, tracker=log).train()
    before = path.read_bytes()
    with MetricsLog.opened(path, exact=True) as log:
        resumed = trainer_of(config, tmp_path, tracker=log)
        assert resumed.first_step == 6
        resumed.train()
    assert path.read_bytes().startswith(before)
    names = [(row["step"], name) for row in read_rows(path) for name in row_metrics(row)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("before", "after", "taken"), [("4", "1", 1), ("1", "4", 1), ("2", "2", 2)])
def test_a_relaunch_takes_the_smaller_of_two_micro_steps(tmp_path: Path, before: str, after: str, taken: int) -> None:
    path, changes = tmp_path / "metrics.jsonl", ("trainer.checkpoint_interval_steps=3",)
    config = config_of(*changes, f"trainer.sequences_per_micro_step={before}")
    with MetricsLog.opened(path, exact=True) as log, pytest.raises(Interrupted):
        trainer_of(config, tmp_path, tracker=log, stop=stop_after(8)).train()
    # The newest checkpoint is lost, as in a crash. The run repeats two steps from step 6, with another micro-step.
    max((tmp_path / "checkpoints").glob("step-*.pt")).unlink()
    first = path.read_bytes()
    with MetricsLog.opened(path, exact=True) as log:
        config = config_of(*changes, f"trainer.sequences_per_micro_step={after}")
        resumed = trainer_of(config, tmp_path, tracker=log)
        assert resumed.micro.sequences_per_micro_step == taken
        resumed.train()
        assert log.exact == (int(before) == taken)
    assert path.read_bytes().startswith(first)


def test_precision_applies_to_parameters_and_not_to_buffers(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("trainer.precision=bf16"), tmp_path)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    buffers = dict(trainer.model.named_buffers())
    assert buffers
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    trainer_of(config_of(), tmp_path).train()
    with pytest.raises(TrainingError, match="belongs to config"):
        trainer_of(config_of("trainer.seed=1"), tmp_path)


def test_a_checkpoint_whose_optimizer_has_other_groups_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """Earlier versions wrote such a checkpoint. They trained a scale at the rate of the embeddings."""
    trainer = trainer_of(config_of("method.trainable_scaling=true"), tmp_path)
    trainer.train()
    path = max((tmp_path / "checkpoints").glob("step-*.pt"))
    state = checkpoint.load_latest(tmp_path / "checkpoints", print)
    assert state is not None
    groups = state["optimizer"]["param_groups"]
    groups[1]["params"] += groups.pop()["params"]
    path.unlink()
    checkpoint.save(tmp_path / "checkpoints", 14, state)
    with pytest.raises(TrainingError, match=r"step 14 .* another version .* remove .*checkpoints"):
        trainer_of(config_of("method.trainable_scaling=true"), tmp_path)


def test_the_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    config = config_of()
    trainer = trainer_of(config, tmp_path)
    inputs, targets, _ = trainer.training.training_batch(0, 4, 0)
    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=inputs).logits.double(), -1)
        mean = -expected.gather(-1, targets[..., None]).mean().item()
        assert summed_cross_entropy(model, inputs, targets).item() / 64 == pytest.approx(mean, rel=1e-6)
    trainer.train()
    assert trainer.tracker.rows[1]["train/loss"] == pytest.approx(mean, rel=1e-6)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------- faster with equal results


class Waits(TorchDispatchMode):
    """Counts reads of a number from a device. Each read makes the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["full", "relora"])
def test_an_update_does_not_wait_for_its_device(method: str, tmp_path: Path) -> None:
    kept = [override for override in TINY if method == "relora" or not override.startswith("method")]
    trainer = trainer_of(compose([*kept, f"method={method}"]), tmp_path)
    trainer.begin_method(0)
    with Waits() as waits:
        for step in range(2):
            trainer.update(step, trainer.forward_backward(step))
            trainer.refresh()
        assert waits.count == 0
        torch.ones(1).item()
    assert waits.count > 0


def test_a_host_that_runs_ahead_logs_and_trains_the_same(tmp_path: Path) -> None:
    runs = {}
    for ahead in (0, 1):
        trainer = runs[ahead] = trainer_of(config_of(), tmp_path / str(ahead))
        trainer.under_way.ahead = ahead
        trainer.train()
    rows: list[dict[int, dict[str, float]]] = [
        {
            step: {name: value for name, value in row.items() if not name.startswith("perf/")}
            for step, row in trainer.tracker.rows.items()
        }
        for trainer in runs.values()
    ]
    assert rows[0] == rows[1]
    assert runs[0].tracker.said == runs[1].tracker.said  # type: ignore[attr-defined]
    assert_equal_states(runs[0], runs[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("way", ["method.merged_weight=rebuilt", "method.merged_weight=never"])
def test_every_way_to_compute_trains_the_same_model(way: str, precision: str, tmp_path: Path) -> None:
    ends = []
    for number, overrides in enumerate(([], [way])):
        trainer = trainer_of(config_of(f"trainer.precision={precision}", *overrides), tmp_path / str(number))
        ends.append((trainer.train().loss, trainer.config.config_hash))
    assert ends[0][1] == ends[1][1]
    assert ends[0][0] == pytest.approx(ends[1][0], abs=2e-6 if precision == "fp32" else 2e-3)


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    plain = trainer_of(config_of("method.dropout=0.5"), tmp_path / "plain")
    again = trainer_of(config_of("method.dropout=0.5", "trainer.activation_checkpointing=true"), tmp_path / "again")
    calls = [0, 0]
    for number, trainer in enumerate((plain, again)):
        hook = lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)  # noqa: E731
        trainer.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(hook)
        trainer.train()
    assert_equal_states(plain, again)
    assert calls[1] == calls[0] + 14


@pytest.mark.filterwarnings("ignore")  # warnings of torch while it traces
def test_a_compiled_model_trains_equally_and_logs_the_time_of_compiling(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "relora.training.model.COMPILER", "aot_eager"
    )  # it traces too, and does not need minutes of a C++ compiler
    torch.compiler.reset()
    plain = trainer_of(config_of(), tmp_path / "plain")
    compiled = trainer_of(config_of("trainer.compile=true"), tmp_path / "compiled")
    assert compiled.train().loss == pytest.approx(plain.train().loss, abs=2e-5)
    assert isinstance(compiled.tracker, Recorder)
    assert sum("compiled; this update took" in line for line in compiled.tracker.said) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.filterwarnings("ignore")  # warnings of torch while it traces
def test_a_compiled_run_resumes_to_the_bit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("relora.training.model.COMPILER", "aot_eager")
    config = config_of("trainer.compile=true")
    whole = trainer_of(config, tmp_path / "whole")
    whole.train()
    with pytest.raises(Interrupted):
        trainer_of(config, tmp_path / "parts", stop=stop_after(9)).train()
    torch.compiler.reset()  # as in a new process
    rest = trainer_of(config, tmp_path / "parts")
    rest.train()
    assert_equal_states(whole, rest)
