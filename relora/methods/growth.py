"""The setting of the norm-growth limiter (relora.optimizers.growth), without torch."""

from relora.common.checks import at_most
from relora.common.errors import ConfigError, shown

NORM_BYTES = 4
"""The norm of a matrix's last update is one fp32 element."""


def check_growth_limit(growth_limit: float | None) -> None:
    """Raise ConfigError for a limit below 1, with which updates could only become smaller."""
    if growth_limit is not None and not growth_limit >= 1:
        raise ConfigError(
            f"method.growth_limit={shown(growth_limit)} must be at least 1, or updates could only become smaller; the "
            "papers have 1.01, and null means no limit"
        )
    at_most("method.growth_limit", growth_limit, 1e6, "it would limit nothing; null means no limit")
