"""Where a run's learning rates come from: what a comparison says of them, beside what they are."""

from dataclasses import dataclass, field

from relora.common.checks import one_of

BASES = ("unknown", "tuned", "untuned", "hand", "ladder")

NOT_TUNED = "rates not tuned for this setting"


@dataclass(kw_only=True, slots=True)
class RatesConfig:
    """Noted at the launch and kept with the run; it changes nothing in the run.

    basis: "tuned" (a preset's rates in the setting of the preset), "untuned" (a preset's rates in another setting, or
    a preset that says so itself), "hand" (whoever launched the run chose them), "ladder" (a baseline at a multiple of
    full rank's rate), "unknown" (a run of an older version).
    """

    basis: str = "unknown"
    source: str | None = None
    """The file of the preset; None where it is unknown."""
    given: list[str] = field(default_factory=list)
    """Overrides of the launch that take the place of values of that file."""
    differs: list[str] = field(default_factory=list)
    """What of the run is not as in the setting of the preset: "trainer.total_steps=80, tuned at 600"."""

    def __post_init__(self) -> None:
        one_of("rates.basis", self.basis, BASES)

    @property
    def words(self) -> str:
        """What a table says; empty where there is nothing to say."""
        if self.basis == "untuned":
            return NOT_TUNED
        return {"hand": "rates set by hand", "ladder": "a multiple of full rank's rate"}.get(self.basis, "")

    @property
    def in_full(self) -> str:
        """The same with its reasons, on one line."""
        if self.basis == "tuned":
            return f"tuned for this setting ({self.source})"
        reasons = "; ".join(self.differs)
        words = self.words or "not recorded"
        return f"{words}: {reasons} ({self.source})" if reasons and self.basis == "untuned" else words
