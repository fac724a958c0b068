import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora.core.schedule import JaggedCosine, RestartClock

LAWS = settings(derandomize=True, deadline=None, max_examples=150)


class Plan(NamedTuple):
    """T, C, w0, w, m of the formula, and the warm start before it."""

    phase: int
    interval: int | None
    warm_start: int
    warmup: int
    rewarm: int
    floor: float

    @property
    def clock(self) -> RestartClock:
        return RestartClock(
            total_steps=self.warm_start + self.phase,
            reset_interval_steps=self.interval,
            warm_start_steps=self.warm_start,
        )

    @property
    def schedule(self) -> JaggedCosine:
        return JaggedCosine(
            self.clock, warmup_steps=self.warmup, restart_warmup_steps=self.rewarm, min_lr_ratio=self.floor
        )

    @property
    def restarts(self) -> list[int]:
        """Steps of the restarts, counted up one interval at a time."""
        found = []
        t = self.interval or self.phase
        while t < self.phase:
            found.append(self.warm_start + t)
            t += self.interval or self.phase
        return found

    def factor(self, step: int) -> float:
        """The module's formula, written down a second time."""
        t, k, rho = step - self.warm_start, 0, step - self.warm_start
        while self.interval is not None and rho >= self.interval:
            k, rho = k + 1, rho - self.interval
        if t >= self.phase:
            return self.floor
        if t < self.warmup:
            return t / self.warmup
        if k >= 1 and rho < self.rewarm:
            return (rho / self.rewarm) * self.cosine(t - rho + self.rewarm)
        return self.cosine(t)

    def cosine(self, v: int) -> float:
        if v >= self.phase:
            return self.floor
        angle = math.pi * (v - self.warmup) / (self.phase - self.warmup)
        return self.floor + (1 - self.floor) / 2 * (1 + math.cos(angle))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    phase = draw(st.integers(1, 120))
    interval = draw(st.none() | st.integers(1, phase) | st.integers(1, 2 * phase))
    longest = phase if interval is None or interval >= phase else interval
    return Plan(
        phase=phase,
        interval=interval,
        warm_start=draw(st.just(0) | st.integers(0, 60)),
        warmup=draw(st.integers(0, min(longest, phase - 1))),
        rewarm=draw(st.integers(0, longest)),
        floor=draw(st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0.0, 1.0)),
    )


def steps_of(plan: Plan, beyond: int = 30) -> range:
    return range(plan.warm_start, plan.warm_start + plan.phase + beyond)


# ---------------------------------------------------------------------------------------------------------- clock


@LAWS
@given(plans())
def test_restarts_come_exactly_at_the_multiples_of_the_interval_after_the_warm_start(plan: Plan) -> None:
    steps = range(-5, steps_of(plan).stop)
    assert [step for step in steps if plan.clock.restarts_at(step)] == plan.restarts


@LAWS
@given(plans())
def test_restarts_before_a_step_are_the_restarts_at_the_steps_up_to_it(plan: Plan) -> None:
    seen = 0
    for step in range(-5, steps_of(plan).stop):
        assert plan.clock.restarts_before(step) == seen
        seen += plan.clock.restarts_at(step)


@LAWS
@given(plans())
def test_next_restart_is_the_first_restart_after_the_step(plan: Plan) -> None:
    for step in range(-5, steps_of(plan).stop):
        assert plan.clock.next_restart(step) == next((at for at in plan.restarts if at > step), None)


@LAWS
@given(plans())
def test_the_warm_start_ends_at_one_step_and_the_low_rank_phase_has_the_rest(plan: Plan) -> None:
    clock = plan.clock
    assert [step for step in range(clock.total_steps) if clock.warm_start_ends_at(step)] == [plan.warm_start]
    assert clock.low_rank_steps == plan.phase


def test_a_warm_start_longer_than_the_interval_does_not_skip_the_first_restart() -> None:
    clock = RestartClock(total_steps=100, reset_interval_steps=10, warm_start_steps=75)
    assert [step for step in range(100) if clock.restarts_at(step)] == [85, 95]


def test_a_restart_that_would_fall_on_the_end_does_not_happen() -> None:
    clock = RestartClock(total_steps=30, reset_interval_steps=10)
    assert [step for step in range(100) if clock.restarts_at(step)] == [10, 20]
    assert clock.restarts_before(100) == 2
    assert clock.next_restart(20) is None


@pytest.mark.parametrize(
    ("total", "interval", "warm_start", "message"),
    [
        (10, 5, -1, "warm_start_steps=-1"),
        (10, 5, 10, "warm_start_steps=10"),
        (10, 5, 11, "warm_start_steps=11"),
        (0, None, 0, "total_steps=0"),
        (-3, None, 0, "total_steps=-3"),
        (10, 0, 0, "reset_interval_steps=0"),
        (10, -5, 0, "reset_interval_steps=-5"),
    ],
)
def test_a_clock_with_an_empty_phase_or_no_positive_interval_is_an_error(
    total: int, interval: int | None, warm_start: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RestartClock(total_steps=total, reset_interval_steps=interval, warm_start_steps=warm_start)


# ------------------------------------------------------------------------------------------------- learning rate


@LAWS
@given(plans())
def test_the_factor_is_the_formula_at_every_step(plan: Plan) -> None:
    schedule = plan.schedule
    for step in steps_of(plan):
        assert schedule(step) == pytest.approx(plan.factor(step), abs=1e-12)


def test_the_factor_takes_the_values_computed_by_hand() -> None:
    clock = RestartClock(total_steps=18, reset_interval_steps=4, warm_start_steps=10)
    schedule = JaggedCosine(clock, warmup_steps=0, restart_warmup_steps=2, min_lr_ratio=0.0)
    eighth = math.sqrt(2) / 4
    assert [schedule(step) for step in (10, 12, 14, 15, 16, 18, 19)] == pytest.approx(
        [1.0, 0.5 + eighth, 0.0, (0.5 - eighth) / 2, 0.5 - eighth, 0.0, 0.0], abs=1e-15
    )


@LAWS
@given(plans())
def test_the_factor_lies_between_zero_and_one(plan: Plan) -> None:
    assert all(0.0 <= plan.schedule(step) <= 1.0 for step in steps_of(plan))


@LAWS
@given(plans())
def test_the_factor_is_zero_at_every_restart_and_the_re_warm_up_climbs_in_equal_parts(plan: Plan) -> None:
    schedule, end = plan.schedule, plan.warm_start + plan.phase
    for at in plan.restarts if plan.rewarm else []:
        assert schedule(at) == 0.0
        climb = [schedule(step) for step in range(at, min(at + plan.rewarm, end))]
        height = plan.cosine(at - plan.warm_start + plan.rewarm)
        assert climb == pytest.approx([height * n / plan.rewarm for n in range(len(climb))], abs=1e-12)


@LAWS
@given(plans())
def test_without_a_re_warm_up_restarts_leave_no_trace_in_the_factor(plan: Plan) -> None:
    jagged = plan._replace(rewarm=0).schedule
    plain = plan._replace(rewarm=0, interval=None).schedule
    assert all(jagged(step) == plain(step) for step in steps_of(plan))


@LAWS
@given(plans())
def test_the_factor_rises_only_in_warm_ups_and_stays_below_the_plain_cosine(plan: Plan) -> None:
    jagged, plain = plan.schedule, plan._replace(interval=None).schedule
    for step in steps_of(plan):
        assert jagged(step) <= plain(step) + 1e-12
        warming = step - plan.warm_start < plan.warmup or any(0 <= step - at < plan.rewarm for at in plan.restarts)
        if not warming:
            assert jagged(step + 1) <= jagged(step) + 1e-12


@LAWS
@given(plans(), st.integers(0, 10_000))
def test_past_the_end_the_factor_stays_at_its_minimum(plan: Plan, beyond: int) -> None:
    assert plan.schedule(plan.warm_start + plan.phase + beyond) == plan.floor


@LAWS
@given(plans())
def test_the_factor_is_a_function_of_the_step_and_not_of_earlier_calls(plan: Plan) -> None:
    schedule, steps = plan.schedule, steps_of(plan)
    forwards = [schedule(step) for step in steps]
    assert [schedule(step) for step in reversed(steps)] == forwards[::-1]


@pytest.mark.parametrize(
    ("warmup", "rewarm", "floor", "message"),
    [
        (-1, 0, 0.1, "warmup_steps=-1"),
        (26, 0, 0.1, "warmup_steps=26 exceeds reset_interval_steps=25"),
        (0, -1, 0.1, "restart_warmup_steps=-1"),
        (0, 26, 0.1, "restart_warmup_steps=26 exceeds reset_interval_steps=25"),
        (0, 0, -0.01, "min_lr_ratio=-0.01"),
        (0, 0, 1.01, "min_lr_ratio=1.01"),
        (0, 0, math.nan, "min_lr_ratio=nan"),
    ],
)
def test_a_schedule_that_does_not_fit_into_the_phase_or_the_interval_is_an_error(
    warmup: int, rewarm: int, floor: float, message: str
) -> None:
    clock = RestartClock(total_steps=105, reset_interval_steps=25, warm_start_steps=5)
    with pytest.raises(ValueError, match=f"^{message}"):
        JaggedCosine(clock, warmup_steps=warmup, restart_warmup_steps=rewarm, min_lr_ratio=floor)


@pytest.mark.parametrize("warmup", [100, 101])
def test_a_warm_up_as_long_as_the_phase_is_an_error_without_restarts_too(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warmup_steps={warmup} .*below .*100 steps"):
        JaggedCosine(RestartClock(total_steps=105, warm_start_steps=5), warmup_steps=warmup)


def test_warm_ups_as_long_as_the_interval_are_allowed() -> None:
    clock = RestartClock(total_steps=100, reset_interval_steps=25)
    schedule = JaggedCosine(clock, warmup_steps=25, restart_warmup_steps=25)
    assert [schedule(step) for step in (0, 25, 50, 75)] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("interval", [None, 100, 200])
def test_a_warm_up_longer_than_an_interval_that_never_ends_is_allowed(interval: int | None) -> None:
    clock = RestartClock(total_steps=100, reset_interval_steps=interval)
    assert JaggedCosine(clock, warmup_steps=99, restart_warmup_steps=300)(99) == 1.0


@pytest.mark.parametrize("warm_start", [0, 5])
def test_a_step_before_the_low_rank_phase_has_no_factor(warm_start: int) -> None:
    clock = RestartClock(total_steps=10, warm_start_steps=warm_start)
    with pytest.raises(ValueError, match=f"step={warm_start - 1} "):
        JaggedCosine(clock, warmup_steps=1)(warm_start - 1)
