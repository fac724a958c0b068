from hypothesis import given
from hypothesis import strategies as st
from small import TINY

from relora.config.compose import Composer
from relora.config.learning_rate import learning_rate_factor
from relora.config.sketch import LEVELS, schedule_sketch

COMPOSER = Composer()


def marked(line: str, sign: str) -> list[int]:
    return [column for column, found in enumerate(line) if found == sign]


def test_every_step_of_a_short_run_has_a_column_with_its_rate() -> None:
    config = COMPOSER.compose([*TINY, "optimizer.learning_rate=4e-3"])  # the warm start has half of that rate
    factor = learning_rate_factor(config)
    rates = [factor(step) * (2e-3 if step < 3 else 4e-3) for step in range(14)]
    line, marks, told = schedule_sketch(config)
    assert line == "".join(LEVELS[round(rate / max(rates) * 8)] for rate in rates)
    assert (marked(marks, "w"), marked(marks, "|")) == ([0, 1, 2], [7, 11])
    assert told == "(the highest rate is 0.004, w: warm start, |: restart)"


@given(
    total=st.integers(60, 100_000),
    interval=st.integers(20, 5_000),
    warm=st.integers(0, 40),
    width=st.integers(20, 100),
)
def test_each_restart_is_marked_where_it_is_and_shows_the_lowest_rate(
    total: int, interval: int, warm: int, width: int
) -> None:
    interval = min(interval, total - warm)
    last = (total - warm) % interval or interval
    rewarm = min(interval // 2, last)
    overrides = [f"trainer.total_steps={total}", f"method.reset_interval_steps={interval}"]
    overrides += [f"method.warm_start_steps={warm}", f"schedule.restart_warmup_steps={rewarm}"]
    config = COMPOSER.compose([*TINY, "schedule.warmup_steps=1", *overrides])
    line, *marks, _ = schedule_sketch(config, width)
    assert len(line) == min(width, total)
    restarts = [step for step in range(total) if config.clock.restarts_at(step)]
    columns = {next(c for c in range(len(line)) if total * (c + 1) // len(line) > step) for step in restarts}
    if len(columns) > len(line) / 2:
        assert "|" not in "".join(marks)
        return
    assert set(marked("".join(marks), "|")) == columns
    assert not rewarm or all(line[column] == LEVELS[0] for column in columns)


def test_a_run_without_restarts_has_no_marks() -> None:
    line, told = schedule_sketch(COMPOSER.compose(["method=full"]))
    assert len(line) == 72
    assert "restart" not in told
