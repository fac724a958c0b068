"""What a person is told instead of a traceback."""


class ConfigError(ValueError):
    """A config that cannot be run; the message says which value breaks which rule and what to do."""


class Interrupted(Exception):  # noqa: N818 -- like KeyboardInterrupt, no error
    """The run was asked to stop, and wrote a checkpoint first."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} after step {step}")
        self.step, self.reason = step, reason


class RunError(RuntimeError):
    """Something that went wrong in a run and that a person can mend; the message stands alone."""


class WarmStartTrained(Exception):  # noqa: N818 -- no error
    """The warm start stands, and this job was to do no more."""

    def __init__(self) -> None:
        super().__init__("the warm start is trained; the runs that share it go on from there")


class TrainingError(RunError):
    """Training cannot go on."""
