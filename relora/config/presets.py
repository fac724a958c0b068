"""Preset files: write the values that a search found, and keep the values and comments that the user wrote."""

import re
from pathlib import Path
from typing import Any

import yaml

from relora.common.files import write_whole
from relora.config.overrides import written

HEAD = "# @package _global_"
BEFORE = "before the search:"
"""Beginning of the comment after a value that a search has replaced."""


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as Hydra does. YAML 1.1 reads only 1.0e-3 as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def write_preset(file: Path, values: dict[str, Any], remark: str) -> None:
    """Put values into a preset file, and keep its other values and its comments.

    The comment of a replaced value is kept after the new value, together with the old value. The key `rates`, which
    marks rates that are not tuned, is removed, because a search has tuned them. The file is written atomically.

    Args:
        file: The preset, which may not exist yet.
        values: The new values by dotted key.
        remark: Lines for the comment at the top. They replace the lines of an earlier search's remark.
    """
    old = file.read_text() if file.is_file() else ""
    wanted = _read(old) or {}
    wanted.pop("rates", None)
    lines = _without(old.splitlines(), "rates")
    for key, value in values.items():
        *groups, last = key.split(".")
        node = wanted
        for name in groups:
            node = node.setdefault(name, {})
        node[last] = value
        lines = _with_value(lines, key, written(value))
    if not _has_values("\n".join(lines), wanted):  # the layout is not that of a preset
        lines = [line for line in lines if line.startswith("#")] + yaml.safe_dump(wanted, sort_keys=False).splitlines()
    remarks = [f"# {line}".rstrip() for line in remark.split("\n")]
    # The lines of an earlier search's remark begin with the same words.
    beginnings = {" ".join(line.split()[:4]) for line in remarks}
    lines = [
        line
        for line in lines
        if line != HEAD and not (line.startswith("#") and " ".join(line.split()[:4]) in beginnings)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join([HEAD, *remarks, *lines]) + "\n")


def _has_values(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return _read(text) == wanted
    except yaml.YAMLError:
        return False


def _without(lines: list[str], key: str) -> list[str]:
    """Return the lines of block-style YAML without a top-level key and its block."""
    first = next((n for n, line in enumerate(lines) if line.startswith(f"{key}:")), None)
    if first is None:
        return lines
    after = (n for n in range(first + 1, len(lines)) if lines[n].strip() and not lines[n].startswith((" ", "#")))
    return lines[:first] + lines[next(after, len(lines)) :]


def _with_value(lines: list[str], key: str, value: str) -> list[str]:
    """Return the lines of block-style YAML with `value` at a dotted key."""
    parts, first, last, indent = key.split("."), 0, len(lines), ""
    for number, part in enumerate(parts):
        at = next((n for n in range(first, last) if lines[n].startswith(f"{indent}{part}:")), None)
        if at is None:
            missing = [f"{indent}{'  ' * depth}{name}:" for depth, name in enumerate(parts[number:])]
            return [*lines[:last], *missing[:-1], f"{missing[-1]} {value}", *lines[last:]]
        if number + 1 < len(parts):
            inner = f"{indent}  "
            first = at + 1
            last = next((n for n in range(first, last) if lines[n].strip() and not lines[n].startswith(inner)), last)
            indent = inner
            continue
        before, _, comment = lines[at].partition(":")[2].partition("#")
        comment = comment.strip()
        if comment and not comment.startswith(BEFORE):
            comment = f"{BEFORE} {before.strip()}, {comment}"
        written = f" # {comment}" if comment else ""
        return [*lines[:at], f"{indent}{part}: {value}{written}", *lines[at + 1 :]]
    return lines
