"""The line of progress. tests/training/test_job.py tests the bar on a terminal."""

from relora.runs.metrics import Progress
from relora.tracking.console import describe


def test_the_time_left_does_not_depend_on_the_tokens_of_a_step() -> None:
    speed = {"tokens_per_second": 1234.0, "steps_per_second": 2.0}
    line = describe(Progress(step=100, total_steps=340, loss=2.5, learning_rate=1e-3, **speed, next_restart=200))
    assert line == "loss 2.500  lr 1.00e-03  1,234 tokens/s  2:00 left  next restart 200"
