"""Convert plain values to a RunConfig: OmegaConf and the dataclasses check them, and paths become absolute."""

import os
import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relora.common.errors import ConfigError, shown
from relora.config import credentials
from relora.config.cluster import cluster_class
from relora.config.groups import TrackerConfig
from relora.config.mixture import source_class
from relora.config.overrides import explain, leaves
from relora.config.run import RunConfig
from relora.methods.registry import METHODS
from relora.optimizers.registry import OPTIMIZERS

LAUNCH_KEYS = ("baseline_rates", "max_failures")
"""Keys that are settings of a study, not of a run."""
SWEEP_KEYS = ("grids", "tune")
"""Keys of sweeps/ files that are not settings of a run."""


def resolved(composed: DictConfig) -> Any:
    """Return plain values with resolved references. Raises ConfigError."""
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except Exception as error:  # circular references raise RecursionError
        raise ConfigError(explain(error)) from error


def structured(values: Any) -> DictConfig:
    """Put the values into typed fields. Raises ConfigError for missing values, unknown keys and wrong types."""
    values = {key: value for key, value in values.items() if key not in ("hydra", *LAUNCH_KEYS, *SWEEP_KEYS)}
    missing = [key for key, value in leaves(values) if value == "???"]
    if missing:
        raise ConfigError(f"a value is missing: {shown(missing[0])}")
    schema = OmegaConf.structured(RunConfig)
    kinds = {"method": METHODS.find, "optimizer": OPTIMIZERS.find, "cluster": cluster_class, "data": source_class}
    for group, kind_of in kinds.items():
        chosen = values.get(group) or {}
        kind = kind_of(chosen.get("name") if isinstance(chosen, dict) else None)
        try:
            schema[group] = OmegaConf.structured(kind)
        except Exception as error:  # the class of a package may have fields of any type
            raise ConfigError(
                f"{group}={chosen['name']} has a field with a type that a config cannot contain: {shown(error, 120)}; "
                "use str, int, float, bool, a list or a dataclass of them"
            ) from error
    try:
        return cast(DictConfig, OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except OverflowError as error:
        key, value = next(
            (key, value) for key, value in leaves(values) if isinstance(value, int) and value > sys.maxsize
        )
        raise ConfigError(f"{key}={shown(value)} is too large for a number") from error


def checked(structured: DictConfig) -> RunConfig:
    """Make and check the RunConfig, with absolute paths. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(structured)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, RunConfig)
    config.runs_dir = str(Path(config.runs_dir).expanduser().absolute())
    config.data.make_absolute()
    config.tracker.uri = _store(config.tracker)
    return config


def _store(tracker: TrackerConfig) -> str | None:
    """Return the URI of a run's store without its password, which this process remembers.

    Without tracker.uri, MLFLOW_TRACKING_URI is used.
    """
    uri = tracker.uri
    if uri is None and tracker.name == "mlflow" and os.environ.get(credentials.VARIABLE):
        uri = os.environ[credentials.VARIABLE]
        try:
            TrackerConfig(uri=uri)
        except ConfigError:
            raise ConfigError(
                f"{credentials.VARIABLE}={shown(credentials.redacted(uri))} is not a store that relora can use; unset "
                "it, or give tracker.uri= sqlite:///FILE, http://HOST:PORT or a database's URI"
            ) from None
    if uri is not None and uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    return None if uri is None else credentials.learn(uri)
