"""What may be wrong with a single value: each check raises ConfigError with the value, the rule and the remedy."""

import dataclasses
import math
import re
import unicodedata
from typing import Any

from relora.common.errors import ConfigError, shown

NAME_CHARACTERS = 100
TEXT_CHARACTERS = 4096
"""The longest path that Linux takes."""
NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's control characters, halves of characters (bytes that are no UTF-8 arrive as those) and line ends."""
LINES_OF_A_SCRIPT = ("cluster.setup",)
MOST_TOKENS = 10**18
MOST_STEPS = 10**12

UNHASHED = {"identity": False}
"""Metadata of a dataclass's field that does not change the results of a run, and stays out of its hash."""


def at_least(name: str, value: float | None, minimum: float, remedy: str = "") -> None:
    """Raise ConfigError for a value below `minimum`; None passes."""
    if value is not None and not value >= minimum:
        raise ConfigError(f"{name}={shown(value)} must be at least {minimum}{remedy}")


def at_most(name: str, value: float | None, maximum: float, reason: str) -> None:
    """Raise ConfigError, with the reason, for a value above `maximum`; None passes."""
    if value is not None and not value <= maximum:
        raise ConfigError(f"{name}={shown(value)} must be at most {maximum:,}: {reason}")


def positive(name: str, value: float | None) -> None:
    """Raise ConfigError for a value that is not positive and finite; None passes."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={shown(value)} must be positive and finite")


def fraction(name: str, value: float) -> None:
    """Raise ConfigError for a value outside 0 to 1."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name}={shown(value)} must be between 0 and 1")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is none of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={shown(value)} is not one of {', '.join(choices)}")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raise ConfigError where `value` does not divide `whole`."""
    if whole % value:
        divisors = [number for number in range(1, whole + 1) if whole % number == 0]
        raise ConfigError(
            f"{name}={shown(value)} does not divide {whole_name}={whole}; use one of {shown(divisors)}, or change "
            f"{whole_name}"
        )


def check_name(name: str, value: str) -> None:
    """Raise ConfigError for a value that cannot be part of a file's name: of a study, or of a model."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ConfigError(
            f"{name}={shown(value)} may hold letters, digits, '_', '.' and '-' alone, and not begin with '.' or '-'"
        )
    if len(value) > NAME_CHARACTERS:
        raise ConfigError(f"{name}={shown(value)} has {len(value)} characters; take at most {NAME_CHARACTERS}")


def check_strings(name: str, value: Any) -> None:
    """Raise ConfigError for text in `value` that a shell, sbatch, a path or a file of YAML would read as another text.

    Such text is empty, holds control characters or bytes that are no UTF-8, or is longer than a path may be. Lines of a
    script may hold tabs and newlines.
    """
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            check_strings(f"{name}.{item.name}" if name else item.name, getattr(value, item.name))
    elif isinstance(value, dict):
        for key, child in value.items():
            check_strings(name, key)
            check_strings(f"{name}.{key}", child)
    elif isinstance(value, list):
        for child in value:
            check_strings(name, child)
    elif isinstance(value, str):
        if not value.strip():
            raise ConfigError(
                f"{name}={shown(value)} is empty; leave it out, or write {name}=null where it may be null"
            )
        if len(value) > TEXT_CHARACTERS:
            raise ConfigError(f"{name}={shown(value)} has {len(value)} characters; take at most {TEXT_CHARACTERS}")
        lines = "\t\n" if name in LINES_OF_A_SCRIPT else ""
        odd = next((one for one in value if unicodedata.category(one) in NO_TEXT and one not in lines), None)
        if odd is not None:
            raise ConfigError(f"{name}={shown(value)} holds the control character {odd!a}; remove it")


def parse_count(name: str, value: int | float | str) -> int:
    """A whole number written plainly or with a suffix: 1500000, "1.5e6", "1.5M", "1.5B" (k, M, B or G, T)."""
    text = shown(value, TEXT_CHARACTERS).strip().replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKmMbBgGtT]?)", text, re.ASCII)
    if match is None:
        raise ConfigError(f"{name}={shown(value)} is not a count; write 1500000, 1.5e6 or 1.5M (suffixes k, M, B, T)")
    power = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}[match[2].lower()]
    count = float(match[1]) * 10**power
    at_most(name, count, MOST_TOKENS, "no corpus has as many tokens")
    if count < 1 or abs(count - round(count)) > 1e-6:
        raise ConfigError(f"{name}={shown(value)} must be a whole number of at least 1")
    return round(count)
