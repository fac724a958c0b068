"""Checks of single values. Each check raises ConfigError with the value, the rule and the remedy."""

import dataclasses
import math
import re
import unicodedata
from typing import Any

from relora.common.errors import ConfigError, shown

NAME_CHARACTERS = 100
TEXT_CHARACTERS = 4096
"""The longest path that Linux accepts."""
NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that text must not contain: control characters, surrogates and line ends.

Bytes that are not UTF-8 arrive as surrogates.
"""
LINES_OF_A_SCRIPT = ("cluster.setup",)
MOST_TOKENS = 10**18
MOST_STEPS = 10**12

UNHASHED = {"identity": False}
"""Metadata of a dataclass field that does not change the results of a run. The hash of the run leaves it out."""


def at_least(name: str, value: float | None, minimum: float, remedy: str = "") -> None:
    """Raise ConfigError for a value below `minimum`. None is allowed."""
    if value is not None and not value >= minimum:
        raise ConfigError(f"{name}={shown(value)} must be at least {minimum}{remedy}")


def at_most(name: str, value: float | None, maximum: float, reason: str) -> None:
    """Raise ConfigError for a value above `maximum`. The message gives `reason`. None is allowed."""
    if value is not None and not value <= maximum:
        raise ConfigError(f"{name}={shown(value)} must be at most {maximum:,}: {reason}")


def positive(name: str, value: float | None) -> None:
    """Raise ConfigError for a value that is not positive and finite. None is allowed."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={shown(value)} must be positive and finite")


def fraction(name: str, value: float) -> None:
    """Raise ConfigError for a value below 0 or above 1."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name}={shown(value)} must be between 0 and 1")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is not in `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={shown(value)} is not one of {', '.join(choices)}")


def check_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raise ConfigError if `value` does not divide `whole`. The message lists the divisors."""
    if whole % value:
        divisors = [number for number in range(1, whole + 1) if whole % number == 0]
        raise ConfigError(
            f"{name}={shown(value)} does not divide {whole_name}={whole}; use one of {shown(divisors)}, or change "
            f"{whole_name}"
        )


def check_name(name: str, value: str) -> None:
    """Raise ConfigError for a name (of a study, of a model) that cannot be part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ConfigError(
            f"{name}={shown(value)} may contain only letters, digits, '_', '.' and '-', and not begin with '.' or '-'"
        )
    if len(value) > NAME_CHARACTERS:
        raise ConfigError(f"{name}={shown(value)} has {len(value)} characters; use at most {NAME_CHARACTERS}")


def check_strings(name: str, value: Any) -> None:
    """Raise ConfigError for text that a shell, sbatch, a path or a YAML file would read differently.

    Such text is empty, contains control characters or bytes that are not UTF-8, or is longer than a path may be. Lines
    of a script may contain tabs and newlines.

    Args:
        name: The dotted key of `value`, for the message. It is empty for a whole config.
        value: Text, or a dataclass, dict or list, which is checked recursively. Values of other types are not checked.
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
            raise ConfigError(f"{name}={shown(value)} has {len(value)} characters; use at most {TEXT_CHARACTERS}")
        lines = "\t\n" if name in LINES_OF_A_SCRIPT else ""
        odd = next((one for one in value if unicodedata.category(one) in NO_TEXT and one not in lines), None)
        if odd is not None:
            raise ConfigError(f"{name}={shown(value)} contains the control character {odd!a}; remove it")


def parse_count(name: str, value: int | float | str) -> int:
    """Parse a whole number, with or without a suffix (k, M, B or G, T): 1500000, "1.5e6", "1.5M", "1.5B".

    Raises:
        ConfigError: `value` is not a whole number from 1 to MOST_TOKENS. The message names it by `name`.
    """
    text = shown(value, TEXT_CHARACTERS).strip().replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([kKmMbBgGtT]?)", text, re.ASCII)
    if match is None:
        raise ConfigError(f"{name}={shown(value)} is not a count; write 1500000, 1.5e6 or 1.5M (suffixes k, M, B, T)")
    power = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}[match[2].lower()]
    count = float(match[1]) * 10**power
    at_most(name, count, MOST_TOKENS, "no corpus has that many tokens")
    if count < 1 or abs(count - round(count)) > 1e-6:
        raise ConfigError(f"{name}={shown(value)} must be a whole number of at least 1")
    return round(count)


UNITS_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_UNITS_BYTES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(name: str, value: int | float | str) -> int:
    """Parse a size of memory: 80GiB, 512MiB, 80GB (10**9 bytes each), or a plain number of bytes.

    Raises:
        ConfigError: `value` is no such size, or less than one byte. The message names it by `name`.
    """
    text = shown(value, TEXT_CHARACTERS).strip().replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?", text, re.ASCII | re.IGNORECASE)
    unit, is_binary = ("", "") if match is None else ((match[2] or "").lower(), match[3])
    if match is None or (is_binary and not unit):
        raise ConfigError(f"{name}={shown(value)} is not a size of memory; write 80GiB, 512MiB, 80GB or bytes")
    size_bytes = float(match[1]) * (BINARY_UNITS_BYTES if is_binary else UNITS_BYTES)[unit]
    at_most(name, size_bytes, 2**60, "no device has that many bytes")
    if size_bytes < 1:
        raise ConfigError(f"{name}={shown(value)} must be at least one byte")
    return round(size_bytes)
