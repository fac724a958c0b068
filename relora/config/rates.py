"""The origin of a run's learning rates, which tables and comparisons report."""

from dataclasses import dataclass, field

from relora.common.checks import one_of

BASES = ("unknown", "tuned", "untuned", "hand", "ladder")

NOT_TUNED = "rates not tuned for this setting"


@dataclass(kw_only=True, slots=True)
class RatesConfig:
    """The origin of the rates. It is recorded at the launch and saved with the run. It does not change the run.

    basis: "tuned" (the preset's rates in the setting of the preset), "untuned" (the preset's rates in another setting,
    or a preset that is marked as untuned), "hand" (the user who launched the run chose them), "ladder" (a baseline at a
    multiple of full rank's rate), "unknown" (a run of an older version).
    """

    basis: str = "unknown"
    source: str | None = None
    """The preset file; None if it is unknown."""
    given: list[str] = field(default_factory=list)
    """Overrides of the launch that replace values of that file."""
    differs: list[str] = field(default_factory=list)
    """Differences between the run and the setting of the preset: "trainer.total_steps=80, tuned at 600"."""

    def __post_init__(self) -> None:
        one_of("rates.basis", self.basis, BASES)

    @property
    def words(self) -> str:
        """The note in a table; empty if the rates are tuned or their origin is unknown."""
        if self.basis == "untuned":
            return NOT_TUNED
        return {"hand": "rates set by hand", "ladder": "a multiple of full rank's rate"}.get(self.basis, "")

    @property
    def in_full(self) -> str:
        """The note with its reasons, on one line."""
        if self.basis == "tuned":
            return f"tuned for this setting ({self.source})"
        reasons = "; ".join(self.differs)
        words = self.words or "not recorded"
        return f"{words}: {reasons} ({self.source})" if reasons and self.basis == "untuned" else words
