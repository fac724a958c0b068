"""The part of a report that shows the results of a study beside the figures of a paper."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from relora.common.perplexity import perplexity
from relora.config.published import PublishedConfig
from relora.studies.cells import spread
from relora.studies.compare import Arm, Study
from relora.studies.doubts import rates_of

HEADING = "Beside the paper"
COLUMNS = ("method", "ours, true perplexity", "ours, as their code prints it", "the paper's figure", "source")
READING = (
    "Ours, true perplexity: the sum of the losses of all predicted test tokens, divided by their number. It can be "
    "compared with other true perplexities. Ours, as their code prints it: computed from the same losses in the way of "
    "the paper's code. Only this column may be compared with the paper's figure, and only if text, tokenizer, budget "
    "and model are the paper's. docs/protocol.md explains the two numbers."
)


@dataclass(frozen=True, kw_only=True)
class BesideThePaper:
    """A table with the rows of `COLUMNS`, and remarks about it."""

    rows: list[list[str]]
    remarks: list[str]


def beside_the_paper(study: Study) -> BesideThePaper | None:
    """Return the runs of a study beside the figures of their papers. None if no run has such figures."""
    rows: list[list[str]] = []
    remarks: dict[str, None] = {}
    for part in study.settings():
        arms = [(arm, published) for arm in part.arms if (published := _published(arm)) is not None]
        rows += [_row(part, arm, published) for arm, published in arms]
        if arms:
            rows += _missing_rows([arm for arm, _ in arms], arms[0][1])
        remarks |= dict.fromkeys(_remarks(arms))
    return BesideThePaper(rows=rows, remarks=list(remarks)) if rows else None


def _published(arm: Arm) -> PublishedConfig | None:
    return arm.config.published if arm.config is not None else None


def _method(arm: Arm) -> str:
    assert arm.config is not None
    return arm.config.method.name


def _row(part: Study, arm: Arm, published: PublishedConfig) -> list[str]:
    tried = rates_of(part, arm)
    return [
        f"{arm.label}, {tried}" if tried.endswith(" rates") else arm.label,
        spread(arm.values("test_perplexity")),
        spread(arm.values("test_perplexity_as_published")),
        _figure(published.perplexity.get(_method(arm))),
        published.source,
    ]


def _missing_rows(arms: Sequence[Arm], published: PublishedConfig) -> list[list[str]]:
    """Return rows for the paper's figures of methods that are not in the study."""
    known = {_method(arm) for arm in arms}
    return [
        [f"{name} (not in this study)", "-", "-", _figure(figure), published.source]
        for name, figure in published.perplexity.items()
        if name not in known and figure is not None
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _remarks(arms: Sequence[tuple[Arm, PublishedConfig]]) -> list[str]:
    """Return what limits the comparison with the papers. The same remark may be in the list several times."""
    remarks = [_divisor_remark(published) for _, published in arms]
    for arm, published in arms:
        batches, losses = arm.values("test_batches_as_published"), arm.values("test_loss")
        if batches and math.isfinite(losses[0]):
            remarks.append(_batches_remark(published, int(batches[0]), losses[0]))
            break
    lacking = [
        member.run.name
        for arm, _ in arms
        for member in arm.finished
        if "test_perplexity_as_published" not in member.run.summary
    ]
    if lacking:
        remarks.append(f"No figure as their code prints it: an earlier version finished {', '.join(lacking)}.")
    by_differences: dict[str, list[str]] = defaultdict(list)
    for arm, published in arms:
        if published.differs:
            by_differences["; ".join(published.differs)].append(arm.label)
    remarks += [
        f"Not the setting of the paper, so not to be compared with its figures: {', '.join(labels)} ({differences})."
        for differences, labels in by_differences.items()
    ]
    return remarks


def _divisor_remark(published: PublishedConfig) -> str:
    if published.divisor == "tokens":
        return (
            f"By the experiment's file, the code of {published.source} divides by the right number. So both columns of "
            "ours are equal."
        )
    return (
        f"The code of {published.source} adds up the mean losses of n batches and divides by n + 1, so its perplexity "
        f"is too low. In the paper, n is about {published.batches_per_gpu} (batches of "
        f"{published.micro_batch_sequences} sequences, {published.gpus} GPU{'s' if published.gpus != 1 else ''})."
    )


def _batches_remark(published: PublishedConfig, batches: int, loss: float) -> str:
    """Return a sentence on how much the wrong divisor changes our figure, and how much it would with the paper's n."""
    assert published.batches_per_gpu is not None
    here, there = (math.expm1(-loss / (n + 1)) for n in (batches, published.batches_per_gpu))
    return (
        f"Here, n is {batches}, which changes a perplexity of {perplexity(loss):.2f} by {here:+.1%}. With the paper's "
        f"n it would change by {there:+.1%}. The length of the held-out text and its packing decide n."
    )
