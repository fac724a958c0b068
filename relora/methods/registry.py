"""Which methods there are: relora's own, and those of installed packages.

A package registers a method as an entry point of the group `relora.methods`, NAME = "module:Class". The package's
folder has conf/method/NAME.yaml, and may have presets in conf/presets/EXPERIMENT/NAME.yaml. See
docs/your-own-method.md.
"""

from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from relora.common.errors import ConfigError, first_line, shown
from relora.methods.base import Method
from relora.methods.control import Control
from relora.methods.full import Full
from relora.methods.galore import GaLore
from relora.methods.lora import LoRA
from relora.methods.relora import ReLoRA

GROUP = "relora.methods"

BUILT_IN: dict[str, type[Method]] = {
    "full": Full,
    "lora": LoRA,
    "relora": ReLoRA,
    "control": Control,
    "galore": GaLore,
}

BASELINE = "full"
"""The method that others are measured against."""


@lru_cache(maxsize=1)
def installed() -> dict[str, EntryPoint]:
    """The methods of installed packages, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """The names of all methods, relora's own first."""
    return [*BUILT_IN, *(name for name in installed() if name not in BUILT_IN)]


def method_class(name: object) -> type[Method]:
    """The class of a method. Raises ConfigError for one that is unknown or cannot be loaded."""
    points = installed()
    if not isinstance(name, str) or name not in names():
        raise ConfigError(
            f"method.name={shown(name)} is not one of {', '.join(names())}; where a package brings it, install that "
            "package"
        )
    if name in BUILT_IN:
        if name in points:
            raise ConfigError(f"method={name} is relora's own, and {_source(points[name])} has one of that name too")
        return BUILT_IN[name]
    try:
        found = points[name].load()
    except Exception as error:  # whatever the package's code raises
        raise ConfigError(f"method={name} of {_source(points[name])} cannot be loaded: {first_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method={name} of {_source(points[name])} is no subclass of relora.methods.base.Method")
    return found


def conf_dirs() -> list[Path]:
    """The conf/ folders of the packages that bring methods."""
    found: dict[Path, None] = {}
    for point in installed().values():
        try:
            spec = find_spec(point.module.partition(".")[0])
        except (ImportError, ValueError):
            continue
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(place) / "conf").is_dir():
                found[Path(place) / "conf"] = None
    return list(found)


def _source(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else point.value
