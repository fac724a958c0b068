"""Overrides as users write them: parsing by Hydra's grammar, checks, and error messages on one line."""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from omegaconf.errors import OmegaConfBaseException

from relora.common.errors import ConfigError, shown
from relora.config import choices

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PATHS = ("data.path", "data.tokenizer", "runs_dir", "tracker.uri")
FREE_KEYS = tuple(f"{key}{end}" for key in ("cluster.options", "data.sources", "data.weights") for end in ".=")
"""Beginnings of overrides whose keys are in no file of conf/."""
MOST_VALUES = 10_000
"""The most values of one key in a sweep."""


def given_values(overrides: Sequence[str]) -> dict[str, str]:
    """Return key -> value, both as they are written. The last value of a key counts."""
    pairs = (text.partition("=") for text in overrides if "=" in text)
    return {key.lstrip("+"): value for key, _, value in pairs}


def check(texts: Sequence[str], *, sweeps: bool) -> None:
    """Raise ConfigError for overrides that Hydra would misread, or would refuse with a long message.

    Args:
        texts: The overrides.
        sweeps: Whether an override may have several values.
    """
    groups = choices.groups()
    for text, override in zip(texts, overrides_of(texts), strict=True):
        key = override.key_or_group
        if override.is_sweep_override():
            if not sweeps:
                raise ConfigError(
                    f"{shown(text)} has several values, but this is a single run; write python run.py -m for a "
                    "sweep, or quote a value with a comma: 'key=\"a,b\"'"
                )
            continue
        value = override.value()
        if not key.strip():
            raise ConfigError(f"'{shown(text)}' is not an override of the form key=value: it has no key")
        if override.is_delete():
            raise ConfigError(f"{shown(text)}: a key cannot be deleted from a config; set {shown(key)}= another value")
        if key in groups and value not in choices.options(key):
            raise ConfigError(_no_choice(key, text.partition("=")[2]))
        if value == "???":
            raise ConfigError(f"{shown(key)}=??? is not a value; leave {shown(key)} out, or give it a value")


def written(value: Any) -> str:
    """Return a value as it is written on the command line and in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_hydra_reads(text: str) -> str:
    """Return an override in Hydra's grammar: with quotes around a path, and with ++ before a free key."""
    text = _quoted(text)
    return f"++{text}" if text.startswith(FREE_KEYS) else text


@lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    """Return an override with quotes around a path that Hydra's grammar refuses, or does not read as text.

    Paths with commas between them are still a sweep. A value that the grammar reads as text, null or a sweep is not
    changed.
    """
    key, equals, value = text.partition("=")
    if key.lstrip("+") not in PATHS or not value.strip():
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    def one(path: str) -> str:
        made = _parsed(f"{key}={path}")
        if made is not None and (made.is_sweep_override() or isinstance(made.value(), str | None)):
            return path
        return QuotedString(path.strip(), Quote.double).with_quotes()

    made = _parsed(text)
    is_one = made is not None and not made.is_sweep_override()
    return f"{key}{equals}{one(value) if is_one else ','.join(map(one, _parts(value)))}"


def _parts(value: str) -> list[str]:
    """Split a value at the commas that are not in quotes or brackets."""
    return re.findall(r"""(?:"[^"]*"|'[^']*'|\([^)]*\)|\[[^]]*\]|\{[^}]*\}|\\,|[^,])+""", value)


def _parsed(text: str) -> "Override | None":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_override(text)
    except Exception:  # the grammar raises its own classes and Python's
        return None


def parsed(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return (key, single overrides) for each override. A sweep has one single override per value.

    Raises ConfigError.
    """
    check(overrides, sweeps=True)
    return [
        (
            override.get_key_element(),
            [f"{override.get_key_element()}={value}" for value in _values(override)]
            if override.is_sweep_override()
            else [str(override.input_line)],
        )
        for override in overrides_of(overrides)
    ]


def _values(override: "Override") -> list[str]:
    """Return the values of a sweep, as they would be written on the command line. Raises ConfigError."""
    from hydra.core.override_parser.types import Glob

    text = shown(override.input_line)
    if override.is_interval_sweep():
        raise ConfigError(
            f"{text} has an infinite number of values; write key=a,b,c, or search a range with a tune: file of sweeps/"
        )
    if override.key_or_group.startswith("hydra."):
        raise ConfigError(f"{text} is a setting of Hydra and cannot be swept; sweep a key of the run: key=a,b,c")
    if isinstance(override._value, Glob):
        found = override._value.filter(choices.options(override.key_or_group))
        if not found:
            raise ConfigError(
                f"{text} matches nothing; glob needs a pattern for the choices of a group, as in model=glob(llama_*)"
            )
        return found
    try:
        values = [str(value) for value in itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1)]
    except Exception as error:  # a range without a step, values that cannot be sorted, ...
        raise ConfigError(f"{text} cannot be swept: {explain(error)}") from error
    if not values or len(values) > MOST_VALUES:
        raise ConfigError(f"{text} has {'no' if not values else f'more than {MOST_VALUES}'} values")
    return values


def overrides_of(texts: Sequence[str]) -> "list[Override]":
    """Parse overrides with Hydra's grammar. Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    found: list[Override] = []
    for text in texts:
        try:
            found += parser.parse_overrides([_quoted(text)])
        except Exception as error:  # the grammar's own classes, or Python's for too deep or too long values
            raise ConfigError(
                f"'{shown(text, 160)}' is not an override of the form key=value; quote a value with special "
                "characters: 'key=\"value\"'"
            ) from error
    return found


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value of a nested mapping."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def explain(error: Exception) -> str:
    """Return our one-line message for an error of Hydra or OmegaConf."""
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = str(getattr(cause, "full_key", "") or "")
    text, detail = str(error).strip(), str(cause).strip()
    group = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if group and group[1] in choices.groups():
        return _no_choice(group[1], group[2])
    if "not in struct" in detail or "not in '" in detail:
        return f"unknown key {shown(key)}{choices.did_you_mean(key)}"
    first = shown((detail or type(cause).__name__).splitlines()[0], 200)
    if "missing mandatory value" in first.lower():
        return f"a value is missing: {first}"
    return f"{shown(key)}: {first}" if key else first


def _no_choice(group: str, value: object) -> str:
    options = choices.listed(choices.options(group))
    if re.fullmatch(r"[A-Za-z][\w./-]*", str(value)) and value != "null":
        return f"{group}={shown(value)} does not exist; choose {group}= one of {options}"
    return f"{group}={shown(value)} is not a choice; leave {group} out, or choose {group}= one of {options}"
