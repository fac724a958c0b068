"""Presets as files: what a search found, written beside what a person wrote."""

import re
from pathlib import Path
from typing import Any

import yaml

from relora.common.files import write_whole

HEAD = "# @package _global_"
BEFORE = "before the search:"
"""Begins what was said of a preset's value that a search has replaced."""


class _Loader(yaml.SafeLoader):
    """Takes 1e-3 for a number, as Hydra does; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def write_preset(file: Path, values: dict[str, float], remark: str) -> None:
    """Put `values` (by dotted key) into a preset, beside what it holds already, comments included.

    What was said of a value that is replaced stays behind the new one, with the old one. A mark that the rates were not
    tuned (`rates`) goes: a search has tuned them. The file is whole at any time.
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
        lines = _with_value(lines, key, f"{value}")
    if not _has_values("\n".join(lines), wanted):  # laid out in another way than presets are
        lines = [line for line in lines if line.startswith("#")] + yaml.safe_dump(wanted, sort_keys=False).splitlines()
    written = [f"# {line}".rstrip() for line in remark.split("\n")]
    # An earlier search's remark begins with the same words.
    beginnings = {" ".join(line.split()[:4]) for line in written}
    lines = [
        line
        for line in lines
        if line != HEAD and not (line.startswith("#") and " ".join(line.split()[:4]) in beginnings)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join([HEAD, *written, *lines]) + "\n")


def _has_values(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return _read(text) == wanted
    except yaml.YAMLError:
        return False


def _without(lines: list[str], key: str) -> list[str]:
    """Lines of YAML in blocks, without a key of the top level and what stands under it."""
    first = next((n for n, line in enumerate(lines) if line.startswith(f"{key}:")), None)
    if first is None:
        return lines
    after = (n for n in range(first + 1, len(lines)) if lines[n].strip() and not lines[n].startswith((" ", "#")))
    return lines[:first] + lines[next(after, len(lines)) :]


def _with_value(lines: list[str], key: str, value: str) -> list[str]:
    """Lines of YAML in blocks, with `value` at a dotted key."""
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
