"""Plug-ins: classes that installed packages register as entry points, and the conf/ folders of these packages."""

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

from relora.common.checks import check_name
from relora.common.errors import ConfigError, first_line, shown

T = TypeVar("T")


@lru_cache(maxsize=16)
def _installed(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points by name, without names that a file cannot have. A package that is found twice counts once."""
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for point in entry_points(group=group):
        with suppress(ConfigError):
            check_name(group, point.name)
            found.setdefault(point.name, {})[point.value, _source(point)] = point
    return {name: list(points.values()) for name, points in found.items()}


def _source(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else point.value


def _top_folders(point: EntryPoint) -> list[Path]:
    """The folders of the package that an entry point names; empty if the entry point is wrong or has no package."""
    try:
        spec = find_spec(point.module.partition(".")[0])
    except (AttributeError, ImportError, ValueError):
        return []
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


class Registry(Generic[T]):
    """The classes that a config group can choose, by name: relora's own classes and those of installed packages.

    A package registers a class as an entry point of the group `relora.KINDs`: NAME = "module:Class". The package's top
    folder has the YAML file conf/KIND/NAME.yaml.
    """

    def __init__(self, kind: str, base: type[T], built_in: Mapping[str, type[T]]) -> None:
        """Make a registry.

        Args:
            kind: The config group, for example "method".
            base: The class that every registered class must inherit from.
            built_in: relora's own classes by name.
        """
        self.kind, self.base, self.built_in = kind, base, built_in

    @property
    def installed(self) -> dict[str, list[EntryPoint]]:
        """The entry points of installed packages, by name."""
        return _installed(f"relora.{self.kind}s")

    def names(self) -> list[str]:
        """List all names. relora's own come first."""
        return [*self.built_in, *(name for name in self.installed if name not in self.built_in)]

    def find(self, name: object) -> type[T]:
        """Return the class of that name.

        Raises:
            ConfigError: The name is unknown, two classes have it, or the class cannot be loaded or has a wrong base.
        """
        points, given = self.installed, f"{self.kind}={shown(name)}"
        if not isinstance(name, str) or name not in self.names():
            raise ConfigError(
                f"{self.kind}.name={shown(name)} is not one of {', '.join(self.names())}; if a package provides it, "
                "install that package"
            )
        brought = points.get(name, [])
        if name in self.built_in:
            if brought:
                raise ConfigError(f"{given} is relora's own, but {_source(brought[0])} has one of that name too")
            return self.built_in[name]
        if len(brought) > 1:
            raise ConfigError(f"{given} is provided by {' and by '.join(map(_source, brought))}; uninstall one of them")
        (point,) = brought
        try:
            found = point.load()
        except Exception as error:  # the package's code may raise anything
            raise ConfigError(f"{given} of {_source(point)} cannot be loaded: {first_line(error)}") from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            base = f"{self.base.__module__}.{self.base.__name__}"
            raise ConfigError(f"{given} of {_source(point)} is not a subclass of {base}")
        return found

    def conf_dirs(self) -> list[Path]:
        """List the conf/ folders of the packages."""
        folders = [folder for points in self.installed.values() for point in points for folder in _top_folders(point)]
        return list(dict.fromkeys(folder / "conf" for folder in folders if (folder / "conf").is_dir()))
