"""A drawing of the learning rate over a run, in text."""

from itertools import pairwise

from relora.config.learning_rate import learning_rate_factor
from relora.config.run import RunConfig

LEVELS = " ▁▂▃▄▅▆▇█"
WIDTH = 72
SAMPLES = 9
"""Steps of one column whose learning rates are averaged."""


def schedule_sketch(config: RunConfig, width: int = WIDTH) -> list[str]:
    """Return lines that draw the learning rate of each step: its height, and the warm start and restarts below it.

    A column in which the run restarts shows the rate at the restart, where the rate is lowest. With a restart in more
    than half of the columns, all columns show the mean rate.

    Args:
        config: The run.
        width: The most columns.
    """
    factor, clock, total = learning_rate_factor(config), config.clock, config.total_steps
    warm, base, warm_base = clock.warm_start_steps, config.optimizer.learning_rate, config.warm_start_learning_rate
    columns = min(width, total)
    borders = [total * column // columns for column in range(columns + 1)]
    restarts = [clock.next_restart(max(begin - 1, warm)) for begin in borders[:-1]]
    within = [
        step if step is not None and begin <= step < end else None
        for step, (begin, end) in zip(restarts, pairwise(borders), strict=True)
    ]
    many = sum(step is not None for step in within) > columns / 2

    def rate(step: int) -> float:
        return factor(step) * (warm_base if step < warm else base)

    def of_column(begin: int, end: int, restart: int | None) -> float:
        if restart is not None and not many:
            return rate(restart)
        steps = sorted({begin + (end - begin) * number // SAMPLES for number in range(SAMPLES)})
        return sum(map(rate, steps)) / len(steps)

    rates = [of_column(*column, restart) for column, restart in zip(pairwise(borders), within, strict=True)]
    highest = max(rates)
    line = "".join(LEVELS[round(value / highest * (len(LEVELS) - 1))] for value in rates) if highest else ""
    marks = "".join(
        "|" if restart is not None and not many else "w" if end <= warm else " "
        for restart, end in zip(within, borders[1:], strict=True)
    )
    told = [f"the highest rate is {max(base, warm_base) if warm else base:g}"]
    told += ["w: warm start"] if "w" in marks else []
    told += ["|: restart"] if "|" in marks else []
    return [line, *([marks.rstrip()] if marks.strip() else []), f"({', '.join(told)})"]
