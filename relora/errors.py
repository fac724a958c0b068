"""What a person is told instead of a traceback."""


class ConfigError(ValueError):
    """A config that cannot be run; the message says which value breaks which rule and what to do."""


class RunError(RuntimeError):
    """Something that went wrong in a run and that a person can mend; the message stands alone."""
