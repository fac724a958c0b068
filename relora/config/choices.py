"""What config groups, choices and keys there are, and which of them a misspelt one may have meant."""

import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from relora.methods.registry import METHODS
from relora.optimizers.registry import OPTIMIZERS

CHARACTERS_LISTED = 120


def conf_dir() -> Path:
    """The folder of config groups: inside an installed package, beside the package in a checkout."""
    return home() / "conf"


def home() -> Path:
    """Where conf/, experiments/ and sweeps/ stand, whatever the working directory is."""
    package = Path(__file__).resolve().parent.parent
    return package if (package / "conf").is_dir() else package.parent


def conf_dirs() -> list[Path]:
    """The folders that hold choices of config groups: relora's, and those of packages that bring some."""
    return list(dict.fromkeys([conf_dir(), *METHODS.conf_dirs(), *OPTIMIZERS.conf_dirs()]))


def preset_file(experiment: str, method: str) -> Path | None:
    """What a method is tuned to in an experiment; None where it has no preset there."""
    files = (folder / "presets" / experiment / f"{method}.yaml" for folder in conf_dirs())
    return next((file for file in files if file.is_file()), None)


def new_preset_file(experiment: str, method: str) -> Path:
    """Where a preset is written: in place of the one that is there, else beside the method's own file."""
    return preset_file(experiment, method) or _home_of(method) / "presets" / experiment / f"{method}.yaml"


def is_untuned_by_its_file(experiment: str | None, method: str) -> bool:
    """Whether the file that a method's rates come from says itself that nobody has tuned them."""
    file = preset_file(experiment, method) if experiment else _home_of(method) / "method" / f"{method}.yaml"
    rates = _read(file).get("rates") if file is not None else None
    return isinstance(rates, dict) and rates.get("basis") == "untuned"


def _home_of(method: str) -> Path:
    """The conf/ folder that has the method's own file."""
    return next((each for each in conf_dirs() if (each / "method" / f"{method}.yaml").is_file()), conf_dir())


def _read(file: Path) -> dict[str, Any]:
    """The keys of a YAML file; none where it cannot be read, which Hydra tells where the file is chosen."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def groups() -> set[str]:
    """The config groups."""
    own = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}
    return own | {"experiments", "sweeps"}


def options(group: str) -> list[str]:
    """The choices of a config group, those of experiments in their folders."""
    folders = (*(folder / group for folder in conf_dirs()), home() / group)
    paths = [path.relative_to(folder).with_suffix("") for folder in folders for path in folder.rglob("*.yaml")]
    return sorted({path.as_posix() for path in paths})


def listed(names: Sequence[str]) -> str:
    """The names in one line of a message, cut where there are many."""
    fitting: list[str] = []
    for name in names:
        if fitting and sum(map(len, fitting)) + len(name) > CHARACTERS_LISTED:
            return f"{', '.join(fitting)} and {len(names) - len(fitting)} more"
        fitting.append(name)
    return ", ".join(fitting)


def did_you_mean(key: str) -> str:
    """The end of the message that `key` is unknown: the key that was meant, or how to see all keys."""
    known = known_keys()
    if key in known:
        return f" with this choice of {key.partition('.')[0]}; other choices of the group have it"
    meant = _meant(key, known)
    return f"; did you mean {meant}?" if meant else "; python run.py --cfg job shows every key"


def _meant(key: str, known: Sequence[str]) -> str | None:
    """The known key that is nearest to `key`: of the same group if one is near, else of any."""
    group, _, last = key.rpartition(".")
    leaves = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    siblings = [name for name in leaves if name.rpartition(".")[0] == group]
    for candidates in (siblings, leaves):
        ends = {name.rpartition(".")[2]: name for name in candidates}
        close = difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
        found = close or [end for end in ends if _abbreviates(last, end)]
        if found and last:
            return ends[found[0]]
    return next(iter(difflib.get_close_matches(key, leaves, n=1)), None)


def _abbreviates(short: str, name: str) -> bool:
    """Whether `short` is the initials of the words of `name` ("lr"), or the beginnings of some ("seq_len")."""
    words = name.split("_")
    if len(words) > 1 and short == "".join(word[:1] for word in words):
        return True
    return all(len(part) > 1 and any(word.startswith(part) for word in words) for part in short.split("_"))


def known_keys() -> tuple[str, ...]:
    """Every dotted key that some choice of groups has."""
    return _known_keys(tuple(conf_dirs()))


@lru_cache(maxsize=4)
def _known_keys(folders: tuple[Path, ...]) -> tuple[str, ...]:
    names: set[str] = {"runs_dir", "study", "baseline_rates"}
    for path in (path for folder in folders for path in folder.glob("*/*.yaml")):
        is_global = "@package _global_" in path.read_text(errors="replace")
        names.update(_keys(_read(path), "" if is_global else path.parent.name))
    return tuple(sorted(names))


def _keys(node: Any, prefix: str) -> Iterable[str]:
    if prefix:
        yield prefix
    for key, child in node.items() if isinstance(node, dict) else ():
        if key != "defaults":
            yield from _keys(child, f"{prefix}.{key}" if prefix else str(key))
