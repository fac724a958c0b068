"""The config groups, their choices and keys, and suggestions for misspelt keys."""

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
    """Return the folder of config groups. It is inside an installed package, and beside the package in a checkout."""
    return home() / "conf"


def home() -> Path:
    """Return the folder that contains conf/, experiments/ and sweeps/. It does not depend on the working directory."""
    package = Path(__file__).resolve().parent.parent
    return package if (package / "conf").is_dir() else package.parent


def conf_dirs() -> list[Path]:
    """List the folders with choices of config groups: relora's folder, and those of packages that provide choices."""
    return list(dict.fromkeys([conf_dir(), *METHODS.conf_dirs(), *OPTIMIZERS.conf_dirs()]))


def preset_file(experiment: str, method: str) -> Path | None:
    """Return the file of a method's preset in an experiment; None if it has no preset there."""
    files = (folder / "presets" / experiment / f"{method}.yaml" for folder in conf_dirs())
    return next((file for file in files if file.is_file()), None)


def new_preset_file(experiment: str, method: str) -> Path:
    """Return the path for a new preset: that of the existing preset, else in the conf/ folder of the method's file."""
    return preset_file(experiment, method) or _home_of(method) / "presets" / experiment / f"{method}.yaml"


def searched_dirs() -> list[Path]:
    """List the folders in which Hydra looks besides conf/: relora's, with experiments/ and sweeps/, and packages'."""
    return [home(), *conf_dirs()[1:]]


def sweep_file(name: str) -> Path | None:
    """Return the file of sweeps=NAME, which is relora's or a package's; None if there is none."""
    files = (folder / "sweeps" / f"{name}.yaml" for folder in searched_dirs())
    return next((file for file in files if file.is_file()), None)


def is_untuned_by_its_file(experiment: str | None, method: str) -> bool:
    """Whether the file with a method's learning rates states that they are not tuned.

    The file is the method's preset in `experiment`, or conf/method/METHOD.yaml without an experiment.
    """
    file = preset_file(experiment, method) if experiment else _home_of(method) / "method" / f"{method}.yaml"
    rates = _read(file).get("rates") if file is not None else None
    return isinstance(rates, dict) and rates.get("basis") == "untuned"


def _home_of(method: str) -> Path:
    """Return the conf/ folder with the method's own file, else relora's."""
    return next((each for each in conf_dirs() if (each / "method" / f"{method}.yaml").is_file()), conf_dir())


def _read(file: Path) -> dict[str, Any]:
    """Read the keys of a YAML file; empty if it cannot be read. Hydra reports that error when the file is chosen."""
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def groups() -> set[str]:
    """Return the names of the config groups."""
    own = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}
    return own | {"experiments", "sweeps"}


def options(group: str) -> list[str]:
    """List the choices of a config group. Choices in subfolders (experiments) include the folder: FOLDER/NAME."""
    folders = (*(folder / group for folder in conf_dirs()), home() / group)
    paths = [path.relative_to(folder).with_suffix("") for folder in folders for path in folder.rglob("*.yaml")]
    return sorted({path.as_posix() for path in paths})


def listed(names: Sequence[str]) -> str:
    """Join the names for one line of a message. A long list is cut, and the rest is counted."""
    fitting: list[str] = []
    for name in names:
        if fitting and sum(map(len, fitting)) + len(name) > CHARACTERS_LISTED:
            return f"{', '.join(fitting)} and {len(names) - len(fitting)} more"
        fitting.append(name)
    return ", ".join(fitting)


def did_you_mean(key: str) -> str:
    """Return the end of an "unknown key" message: the key that was probably meant, or how to see all keys."""
    known = known_keys()
    if key in known:
        group = key.partition(".")[0]
        having = [path.stem for folder in conf_dirs() for path in folder.glob(f"{group}/*.yaml") if _has(path, key)]
        return f" with this choice of {group}; {listed([f'{group}={name}' for name in sorted(set(having))])} have it"
    meant = _meant(key, known)
    return f"; did you mean {meant}?" if meant else "; python run.py --cfg job shows every key"


def _has(path: Path, key: str) -> bool:
    """Whether a choice of a group has a dotted key."""
    return key in _keys_of(path)


def _meant(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that is most similar to `key`, first in the same group, then in all groups."""
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
    """Whether `short` consists of the initials of the words of `name` ("lr"), or of word beginnings ("seq_len")."""
    words = name.split("_")
    if len(words) > 1 and short == "".join(word[:1] for word in words):
        return True
    return all(len(part) > 1 and any(word.startswith(part) for word in words) for part in short.split("_"))


def known_keys() -> tuple[str, ...]:
    """Return every dotted key that any choice of any group has."""
    return _known_keys(tuple(conf_dirs()))


@lru_cache(maxsize=4)
def _known_keys(folders: tuple[Path, ...]) -> tuple[str, ...]:
    names: set[str] = {"runs_dir", "study", "baseline_rates", "max_failures"}
    for path in (path for folder in folders for path in folder.glob("*/*.yaml")):
        names.update(_keys_of(path))
    return tuple(sorted(names))


def _keys_of(path: Path) -> set[str]:
    """Return every dotted key that a choice of a group sets."""
    is_global = "@package _global_" in path.read_text(errors="replace")
    return set(_keys(_read(path), "" if is_global else path.parent.name))


def _keys(node: Any, prefix: str) -> Iterable[str]:
    if prefix:
        yield prefix
    for key, child in node.items() if isinstance(node, dict) else ():
        if key != "defaults":
            yield from _keys(child, f"{prefix}.{key}" if prefix else str(key))
