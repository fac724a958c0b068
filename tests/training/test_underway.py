"""Training seconds compared with known device time.

No test machine has a GPU, so the tests emulate a device that works later than the host.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from small import TINY
from trainers import Recorder, stop_after, trainer_of

from relora.common.errors import Interrupted
from relora.config.compose import compose
from relora.training.trainer import Trainer
from relora.training.underway import UnderWay

pytestmark = pytest.mark.slow

HOST_SECONDS = 0.005
"""The time of the host for a step."""
DEVICE_SECONDS = 0.05
"""The time of the device for a step. The device begins a step after it has finished all earlier steps."""
LOG_SECONDS = 0.001
PAUSE_SECONDS = 3.0
"""The time of an evaluation or a checkpoint. It is not training time."""


class Device:
    """A clock, and a device that computes steps in order while the host continues."""

    def __init__(self) -> None:
        self.now = self.free_at = self.busy_seconds = 0.0

    def event(self, _: torch.device) -> "Work":
        self.now += HOST_SECONDS
        self.free_at = max(self.now, self.free_at) + DEVICE_SECONDS
        self.busy_seconds += DEVICE_SECONDS
        return Work(self, self.free_at)


class Work:
    """A step that the host has sent to the device."""

    def __init__(self, device: Device, ready_at: float) -> None:
        self.device, self.ready_at = device, ready_at

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.ready_at)


class SlowRecorder(Recorder):
    """A tracker that takes time: much for an evaluation or a checkpoint, little for another row."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        self.device.now += PAUSE_SECONDS if "eval/loss" in metrics else LOG_SECONDS

    def flush(self) -> None:
        self.device.now += PAUSE_SECONDS


FULL = ("method=full",)
RELORA = (*(override for override in TINY if override.startswith("method")), "method.reset_interval_steps=20")


def trainer_on(
    device: Device, folder: Path, *overrides: str, method: tuple[str, ...] = FULL, ahead: int = 1, **changes
) -> Trainer:
    kept = [override for override in TINY if not override.startswith("method")]
    config = compose([*kept, *method, "trainer.total_steps=40", *overrides])
    trainer = trainer_of(config, folder, tracker=SlowRecorder(device), **changes)
    trainer.under_way = UnderWay(trainer.device, ahead=ahead, event=device.event, now=lambda: device.now)
    trainer.under_way.resume_from(trainer.counters.training_seconds)
    return trainer


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(("interval", "pauses"), [(5, 8), (40, 1)])
def test_training_seconds_contain_all_work_of_the_device_and_no_pause(
    interval: int, pauses: int, ahead: int, tmp_path: Path
) -> None:
    device = Device()
    every = (f"trainer.validation_interval_steps={interval}", "trainer.checkpoint_interval_steps=40")
    trainer = trainer_on(device, tmp_path, *every, ahead=ahead)
    trainer.train()
    assert device.busy_seconds == pytest.approx(2.0)
    # The device waits for the host at every step if the host does not run ahead, and else only after a pause.
    idle = HOST_SECONDS * (40 if ahead == 0 else pauses)
    assert trainer.counters.training_seconds == pytest.approx(2.0 + idle)
    rows = trainer.tracker.rows  # type: ignore[attr-defined]
    assert rows[40]["perf/training_seconds"] == pytest.approx(2.0 + idle)
    rate = rows[40]["perf/tokens_per_second"]
    per_update = rate / trainer.config.tokens_per_step
    assert DEVICE_SECONDS - 1e-9 <= 1 / per_update <= DEVICE_SECONDS + HOST_SECONDS + 1e-9


def test_the_wait_before_a_checkpoint_is_training_time_and_is_kept_after_a_resume(tmp_path: Path) -> None:
    device = Device()
    every = ("trainer.validation_interval_steps=40", "trainer.checkpoint_interval_steps=7")
    with pytest.raises(Interrupted):
        trainer_on(device, tmp_path, *every, stop=stop_after(17)).train()
    trainer = trainer_on(device, tmp_path, *every)
    assert trainer.first_step == 17
    assert trainer.counters.training_seconds == pytest.approx(17 * DEVICE_SECONDS + 3 * HOST_SECONDS)
    trainer.train()
    # There are pauses before updates 0, 7, 14, 17, 21, 28 and 35.
    assert device.busy_seconds == pytest.approx(2.0)
    assert trainer.counters.training_seconds == pytest.approx(2.0 + 7 * HOST_SECONDS)


def test_the_wait_before_a_restart_is_counted_once(tmp_path: Path) -> None:
    device = Device()
    every = ("trainer.validation_interval_steps=40", "trainer.checkpoint_interval_steps=40")
    trainer = trainer_on(device, tmp_path, *every, method=RELORA)
    trainer.train()
    # The device waits for the host at the first update, after the warm start and after the restart.
    logged = trainer.counters.training_seconds - 2.0 - 3 * HOST_SECONDS
    assert -1e-9 <= logged <= 4 * LOG_SECONDS


@pytest.mark.parametrize("ahead", [0, 1])
def test_every_evaluation_has_its_tokens_flops_and_seconds(ahead: int, tmp_path: Path) -> None:
    """Only the last step has both an evaluation and a log row of the log interval."""
    device = Device()
    every = ("trainer.validation_interval_steps=10", "trainer.log_interval_steps=7")
    trainer = trainer_on(device, tmp_path, *every, ahead=ahead)
    trainer.train()
    rows = trainer.tracker.rows  # type: ignore[attr-defined]
    evaluated = {step: row for step, row in rows.items() if "eval/loss" in row}
    assert list(evaluated) == [0, 10, 20, 30, 40]
    for step, row in evaluated.items():
        assert row["progress/tokens"] == step * trainer.config.tokens_per_step
        assert row["progress/flops"] == trainer.reporter.progress_metrics(step)["progress/flops"]
        assert row["perf/training_seconds"] == pytest.approx(step * DEVICE_SECONDS, abs=step * HOST_SECONDS + 1e-9)
