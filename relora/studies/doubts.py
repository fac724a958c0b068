"""Reasons to doubt the results of a study: learning rates that were not tuned, and values that are not plausible."""

from collections.abc import Sequence

from relora.config.rates import NOT_TUNED
from relora.config.run import RunConfig
from relora.config.tuned import RATES
from relora.runs.results import Run, mean
from relora.studies.compare import Arm, Estimate, Study
from relora.studies.gaps import Baseline

IMPLAUSIBLE = -0.02
"""A relative gap below this value is reported as not plausible. A method that trains fewer parameters than full rank is
not expected to be better. 2% is about the effect of another seed at laptop/small (docs/results.md)."""
TRAINING_RISE = 0.1
"""Nats by which the mean training loss of a tenth of the run may exceed that of an earlier tenth."""
VALIDATION_RISE = 0.02
"""Nats by which the last validation loss may exceed the lowest one after the warm-up."""
ARMS_NAMED = 4
"""So many arms of one method are named one by one. More are counted."""
TENTHS = 10
"""The number of parts whose mean training losses are compared."""


def rates_of(study: Study, arm: Arm) -> str:
    """Return how the learning rates of an arm were chosen, for a table.

    The text is empty if the rates were tuned, or if their source is unknown.
    """
    if arm.config is None:
        return ""
    tried = _tried(study, arm)
    if len(tried) > 1:
        return f"{'the best' if _is_best(study, arm) else 'one'} of {len(tried)} rates"
    return arm.config.rates.words


def untuned(study: Study) -> list[Arm]:
    """Return the arms whose rates were neither tuned for the setting nor chosen among several rates.

    The baseline comes first.
    """
    full = study.full_rank()
    rest = [arm for arm in study.arms if full is None or arm.variant != full.variant]
    candidates = [*([full] if full is not None else []), *(arm for arm in rest if not arm.is_full_rank)]
    return [arm for arm in candidates if rates_of(study, arm) == NOT_TUNED]


def untuned_words(study: Study) -> list[str]:
    """Return the headline's sentence about the untuned arms. It names them and the differences from their presets."""
    found = untuned(study)
    if not found:
        return []
    full = study.full_rank()
    names: list[str] = []
    labels: dict[str, list[str]] = {}
    for arm in found:
        if full is not None and arm.variant == full.variant:
            names.append(f"full rank ({arm.label})")
        else:
            labels.setdefault(arm.config.method.name if arm.config else arm.label, []).append(arm.label)
    for method, own in labels.items():
        names += own if len(own) <= ARMS_NAMED else [f"{len(own)} arms of {method}"]
    reasons = dict.fromkeys(reason for arm in found if arm.config for reason in arm.config.rates.differs)
    return [
        f"Caution, {NOT_TUNED}: {', '.join(names)} ({'; '.join(reasons)}). The gaps may come from the rates as much "
        "as from the methods; sweeps=tune_learning_rate searches for rates."
    ]


def tokenizer_words(study: Study) -> list[str]:
    """Return the headline's sentences about arms with different tokenizers, whose perplexities cannot be compared."""
    runs = [member.run for member in study.members if member.run.finished]
    corpora = [run.status.corpus for run in runs if run.status is not None]
    tokenizers, texts = ({corpus.get(name) for corpus in corpora} for name in ("tokenizer_digest", "corpus_digest"))
    if len(tokenizers) < 2:
        return []
    sentences = [
        f"The arms have {len(tokenizers)} different tokenizers. A perplexity is per token, so it cannot be compared "
        "between tokenizers. Bits per byte can be compared: they are in the table of the arms."
    ]
    if len(texts) > 1:
        sentences.append("Their texts differ too, so even bits per byte are not measured on the same text.")
    if lacking := [run.name for run in runs if "test_bits_per_byte" not in run.summary]:
        sentences.append(f"No bits per byte: {', '.join(lacking)}, because the corpus does not state its bytes.")
    return [" ".join(sentences)]


def doubts(study: Study, best: Arm | None, full: Arm | None) -> list[str]:
    """Return sentences about results that are not plausible.

    Args:
        study: A study of one setting.
        best: The best arm that is not full rank. None if there is no such arm.
        full: The full-rank arm that is the baseline. None if there is no baseline.
    """
    sentences: list[str] = []
    choice = study.baseline()
    if full is not None and choice is not None:
        sentences += _rising(full, choice)
        sentences += _at_the_edge(f"the baseline ({full.label})", full.config, _tried(study, full))
    if best is None:
        return sentences
    sentences += _at_the_edge(best.label, best.config, _tried(study, best))
    gaps = [(arm.label, arm.gap("tokens")) for arm in study.arms if not arm.is_full_rank]
    ahead = [f"{label} ({-gap.relative:.1%})" for label, gap in gaps if gap is not None and gap.relative < IMPLAUSIBLE]
    if ahead:
        sentences.append(
            f"Not plausible: ahead of full rank at equal tokens by more than {-IMPLAUSIBLE:.0%}: {', '.join(ahead)}. "
            "This suggests that the full-rank run has bad rates; try other rates: method=full "
            "optimizer.learning_rate=... optimizer.embedding_learning_rate=..."
        )
    sentences += _within_seeds(best.label, best.gap("tokens"))
    return sentences


def _within_seeds(label: str, gap: Estimate | None) -> list[str]:
    """Return a sentence if the gap is within the spread of its seeds.

    A gap with an interval is left out: the report itself says whether the interval contains zero.
    """
    if gap is None or gap.deviation is None or gap.low is not None or abs(gap.relative) > gap.deviation:
        return []
    return [
        f"The gap of {label} ({gap.relative:+.1%}) is within the spread of its seeds (± {gap.deviation:.1%}): no "
        "difference is shown."
    ]


def _tried(study: Study, arm: Arm) -> list[float]:
    """Return the learning rates of all finished runs that differ from `arm` only in rates and seed.

    For full rank, the runs of other studies in the runs_dir count too.
    """
    configs = [other.config for other in study.arms if other.finished]
    choice = study.baseline()
    if arm.is_full_rank and choice is not None:
        configs += [run.config for runs in choice.rivals.values() for run in runs.values()]
    assert arm.config is not None
    own = _without_rates(arm.config)
    return sorted({c.optimizer.learning_rate for c in configs if c is not None and _without_rates(c) == own})


def _without_rates(config: RunConfig) -> dict[str, object]:
    """Return the values that identify a run, without its rates and its seed."""
    return {name: value for name, value in config.identity.items() if name not in (*RATES, "trainer.seed")}


def _is_best(study: Study, arm: Arm) -> bool:
    """Return whether an arm has the lowest validation loss of the arms that differ from it only in rates."""
    if arm.is_full_rank:
        full = study.full_rank()
        return full is not None and full.variant == arm.variant
    assert arm.config is not None
    own = _without_rates(arm.config)
    rivals = [other for other in study.arms if other.finished and other.config and _without_rates(other.config) == own]
    return bool(rivals) and min(rivals, key=_validation).variant == arm.variant


def _validation(arm: Arm) -> float:
    """Return the mean validation loss of the finished runs."""
    return mean([member.run.validation_loss for member in arm.finished])


def _at_the_edge(name: str, config: RunConfig | None, tried: Sequence[float]) -> list[str]:
    """Return a sentence if the rate of `config` is the lowest or the highest of the tried rates."""
    if config is None or len(tried) < 2 or config.optimizer.learning_rate not in (tried[0], tried[-1]):
        return []
    rate = config.optimizer.learning_rate
    side, beyond = ("lowest", rate / 2) if rate == tried[0] else ("highest", rate * 2)
    return [
        f"The rate of {name}, {rate:g}, is the {side} of the {len(tried)} that were tried: a better rate may "
        f"be outside this range; try optimizer.learning_rate={beyond:g}."
    ]


def _rising(full: Arm, choice: Baseline) -> list[str]:
    """Return a sentence if the baseline's loss rises after the warm-up. It is about the first seed with such a rise."""
    for _, run in sorted(choice.runs.items()):
        found = rise(run)
        if found is not None:
            kind, low, high = found
            return [
                f"Not plausible: the {kind} loss of the baseline ({full.label}, {run.name}) rises after its warm-up, "
                f"from {low:.3f} to {high:.3f}: its rate is too high, or its training is unstable."
            ]
    return []


def rise(run: Run) -> tuple[str, float, float] | None:
    """Find a loss that rises after the warm-up of a run.

    Returns:
        "validation" or "training", the lowest loss, and the later higher loss. None if no loss rises.
    """
    assert run.config is not None
    warm = run.config.schedule.warmup_steps
    evaluated = [row["eval/loss"] for row in run.rows if "eval/loss" in row and row["step"] > warm]
    if evaluated and evaluated[-1] - min(evaluated) > VALIDATION_RISE:
        return "validation", min(evaluated), evaluated[-1]
    losses = [row["train/loss"] for row in run.rows if "train/loss" in row and row["step"] > warm]
    width = max(1, -(-len(losses) // TENTHS))
    parts = [mean(losses[start : start + width]) for start in range(0, len(losses) - width + 1, width)]
    low = float("inf")
    for part in parts:
        if part - low > TRAINING_RISE:
            return "training", low, part
        low = min(low, part)
    return None
