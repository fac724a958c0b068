"""A run's config as a file: written once by a launch, read by whoever works on the run."""

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
    """Write the whole config; the file is whole at any time. A password of its store is kept in private."""
    path.parent.mkdir(parents=True, exist_ok=True)
    credentials.keep(config.tracker.uri, Path(config.runs_dir))
    write_whole(path, yaml.dump(asdict(config), Dumper=yaml.CSafeDumper, sort_keys=False))


def read_frozen(path: Path) -> RunConfig:
    """The config of a run's frozen file, its runs_dir the one where it stands now. Raises ConfigError."""
    return replace(thaw(path), runs_dir=str(path.absolute().parent.parent))


def thaw(path: Path) -> RunConfig:
    """The config that `freeze` wrote. Raises ConfigError for a file that is not one."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {path.parent} is no run folder")
    try:
        # By the library that wrote it: OmegaConf's own loader takes the text 1e3 for a number.
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.CSafeLoader)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a config: {shown(error, 200)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no config")
    try:
        return checked(structured(values))
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error
