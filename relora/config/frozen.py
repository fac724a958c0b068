"""The config file of a run: a launch writes it once, and all commands on the run read it."""

from dataclasses import asdict, replace
from pathlib import Path

import yaml
from yaml import YAMLError

from relora.common.errors import ConfigError, shown
from relora.common.files import write_whole
from relora.config import credentials
from relora.config.run import RunConfig
from relora.config.typed import checked, structured


def freeze(config: RunConfig, path: Path) -> None:
    """Write the full config atomically. The password of its MLflow store goes into a private file instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    credentials.keep(config.tracker.uri, Path(config.runs_dir))
    write_whole(path, yaml.dump(asdict(config), Dumper=yaml.CSafeDumper, sort_keys=False))


def read_frozen(path: Path) -> RunConfig:
    """Read the config of a run's frozen file. Its runs_dir is the folder where the run is now. Raises ConfigError."""
    return replace(thaw(path), runs_dir=str(path.absolute().parent.parent))


def thaw(path: Path) -> RunConfig:
    """Read the config that `freeze` wrote. Raises ConfigError if the file is missing or is not a config."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {path.parent} is not a run folder")
    try:
        # Read with the library that wrote it: OmegaConf's own loader reads the text 1e3 as a number.
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.CSafeLoader)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {shown(error, 200)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} contains no config")
    try:
        return checked(structured(values))
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error
