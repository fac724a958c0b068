"""Compose a RunConfig from conf/, experiments/, sweeps/ and the overrides of the command line, with Hydra."""

import copy
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relora.common.errors import ConfigError, shown
from relora.config import choices
from relora.config.cluster import ClusterConfig, cluster_class
from relora.config.data import DataConfig
from relora.config.groups import ScheduleConfig, check_architecture
from relora.config.overrides import as_hydra_reads, check, explain, given_values, leaves, overrides_of
from relora.config.run import RunConfig
from relora.config.typed import SWEEP_KEYS, checked, resolved, structured
from relora.methods.registry import BASELINE, METHODS
from relora.optimizers.base import Optimizer
from relora.optimizers.registry import OPTIMIZERS


def _search_path() -> str:
    """Return the override that adds experiments/, sweeps/ and the conf/ folders of packages to Hydra's search path."""
    escaped = [str(folder).replace("\\", "\\\\").replace("'", "\\'") for folder in choices.searched_dirs()]
    quoted = [f"'file://{folder}'" for folder in escaped]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def composed(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the config with Hydra. An override of the budget in steps replaces a budget in tokens.

    Raises:
        ConfigError: Hydra refuses an override, or the config is not complete or not valid.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    given = given_values(overrides)
    check(overrides, sweeps=False)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(choices.conf_dir()), version_base="1.3"):
            texts = [_search_path(), *map(as_hydra_reads, overrides), *_without_token_budget(given)]
            composed = hydra_compose("config", texts, return_hydra_config=with_hydra)
    except Exception as error:  # Hydra raises its own classes and Python's
        raise ConfigError(explain(error)) from error
    chosen = given.get("method")
    if chosen in METHODS.installed and composed.method.get("name") != chosen:
        raise ConfigError(
            f"the file conf/method/{chosen}.yaml of method={chosen} has the name of another method: "
            f"{shown(composed.method.get('name'))}; write method: name: {chosen} into it"
        )
    if "sweeps" not in given:
        for key in SWEEP_KEYS:
            if key in composed:
                raise ConfigError(f"unknown key {key}; it belongs in a sweeps/ file, chosen with sweeps=NAME")
    return composed


def _without_token_budget(given: dict[str, str]) -> list[str]:
    """Return the override that removes an experiment's budget in tokens if the command line or a sweep sets steps."""
    of_the_sweep = _own_settings(given["sweeps"]) if "sweeps" in given else {}
    keys = {key for key, value in {**of_the_sweep, **given}.items() if value not in (None, "null")}
    return ["trainer.total_tokens=null"] if "trainer.total_steps" in keys and "trainer.total_tokens" not in keys else []


def _own_settings(name: str) -> dict[str, Any]:
    """Read the values that a sweeps/ file sets for every run, by dotted key."""
    file = choices.sweep_file(name)
    values = OmegaConf.to_container(OmegaConf.load(file)) if file is not None else None
    return dict(leaves({str(key): value for key, value in values.items()})) if isinstance(values, dict) else {}


def sweep_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values that the chosen sweeps/ file sets for every run, by dotted key; empty if none is chosen."""
    name = given_values(overrides).get("sweeps")
    return _own_settings(name) if name is not None else {}


def compose(overrides: Sequence[str]) -> RunConfig:
    """Return the config that the defaults and `overrides` describe. Raises ConfigError if it is not valid."""
    return to_run_config(composed(overrides))


LEFT_OPEN = {"text": ("path", "text_field", "tokenizer"), "tokens": ("path", "tokens_field", "token_type")}
"""What an experiment leaves to the user, by `data.name`, if it has no path."""


def preset_run(experiment: str | None, method: str, data: DataConfig) -> RunConfig | None:
    """Return the run for which a method's preset was tuned: its experiment as it is composed without other overrides.

    Args:
        experiment: None means the default run.
        method: The name of the method.
        data: Gives the text and tokenizer, if the experiment leaves them to the user.

    Returns:
        The config of that run, or None if the experiment without other overrides is not a valid run.
    """
    chosen = [] if experiment is None else [f"experiments={experiment}"]
    try:
        values = resolved(composed([*chosen, f"method={method}"]))
        own = values["data"]
        left_open = LEFT_OPEN.get(str(own.get("name")))
        if left_open is not None and own.get("path") is None:
            own |= {key: getattr(data, key) for key in left_open} if data.name == own["name"] else {"path": "."}
        return checked(structured(values))
    except ConfigError:
        return None


def full_rank(overrides: Sequence[str]) -> tuple[Optimizer, ScheduleConfig]:
    """Return the optimizer and schedule of the full-rank run with `overrides`. Other values may be missing.

    Raises ConfigError.
    """
    values = resolved(composed([*overrides, f"method={BASELINE}"]))
    kinds = {"optimizer": OPTIMIZERS.find(values["optimizer"].get("name")), "schedule": ScheduleConfig}
    try:
        schema = {name: OmegaConf.structured(kind) for name, kind in kinds.items()}
        made = OmegaConf.merge(OmegaConf.create(schema), {name: values[name] for name in schema})
        return cast(Optimizer, OmegaConf.to_object(made.optimizer)), cast(
            ScheduleConfig, OmegaConf.to_object(made.schedule)
        )
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def hydra_main(argv: Sequence[str], run: Callable[[DictConfig, list[str]], None]) -> None:
    """Run Hydra's own command line (--help, --cfg, its launchers, ...) with the same config.

    Args:
        argv: The arguments of the command line.
        run: Called for each job with its composed config and its overrides.

    Raises:
        ConfigError: An override or an option is not valid.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def job(composed: DictConfig) -> None:
        run(composed, list(HydraConfig.get().overrides.task))

    # Hydra's parser needs the overrides in one group. Values of options (--cfg job) contain no "=".
    overrides = [argument for argument in argv if not argument.startswith("-") and "=" in argument]
    options = [argument for argument in argv if argument not in overrides]
    is_sweep = _is_sweep([*overrides, *options])
    check([text for text in overrides if not text.startswith("hydra")], sweeps=is_sweep)
    overrides = [*map(as_hydra_reads, overrides), *_without_token_budget(given_values(overrides))]
    sys.argv = [sys.argv[0], _search_path(), *overrides, *options]
    with _hydra_raises():
        hydra.main(config_path=str(choices.conf_dir()), config_name="config", version_base="1.3")(job)()


def _is_sweep(argv: Sequence[str]) -> bool:
    """Whether Hydra's command line starts a sweep. Raises ConfigError for options that Hydra does not accept."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{shown(message, 200)}; python run.py --hydra-help lists the options")

    parser = get_args_parser()
    parser.error = refuse
    arguments = parser.parse_args(argv)
    if arguments.multirun and arguments.cfg:
        raise ConfigError("-m starts a sweep, but --cfg shows the config of a single run; leave out one of them")
    return arguments.multirun


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Inside, an error of Hydra's command line is raised as ConfigError, instead of a long text and an exit."""
    from hydra.errors import HydraException

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def study_of(file: DictConfig) -> str | None:
    """Return the study of a composed config, or None. Raises ConfigError."""
    try:
        return file.get("study")
    except OmegaConfBaseException as error:
        raise ConfigError(f"study: {explain(error)}") from error


def as_values(node: Any) -> Any:
    """Return a node of a composed config as dicts, lists and values. References are not resolved."""
    return OmegaConf.to_container(node) if isinstance(node, Container) else node


def cluster_with(values: dict[str, Any], overrides: Sequence[str]) -> ClusterConfig:
    """Return saved cluster settings after changes by overrides of cluster and cluster.*.

    Args:
        values: The saved settings.
        overrides: An override of cluster itself replaces all saved settings first.

    Raises:
        ConfigError: A setting is not valid.
    """
    given = overrides_of(overrides)
    try:
        chosen = next((str(item.value()) for item in given if item.key_or_group == "cluster"), None)
        if chosen is not None:
            values = as_values(composed([f"cluster={chosen}"]).cluster)
        made = OmegaConf.merge(OmegaConf.structured(cluster_class(values["name"])), values)
        config = OmegaConf.create({"cluster": made})  # so that errors give the full key
        for item in given:
            if item.key_or_group != "cluster":
                OmegaConf.update(config, item.key_or_group, item.value(), merge=True)
        return cast(ClusterConfig, OmegaConf.to_object(config.cluster))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


# ----------------------------------------------------------------------------------------- from Hydra's to our config


def to_run_config(composed: DictConfig) -> RunConfig:
    """Make the RunConfig of a composed config: typed, complete and checked, with absolute paths. Raises ConfigError."""
    config = checked(structured(resolved(composed)))
    _check_launch(config)
    config.data.check_files()
    return config


def _check_launch(config: RunConfig) -> None:
    """Raise ConfigError for values that a new run must not have. An old run may have them."""
    check_architecture(config.model.name)
    config.cluster.check_folder(config.runs_dir)
    config.optimizer.check_here()


class Composer:
    """Composes many runs fast. Hydra runs once for each choice of groups; plain values are set on a copy of its result.

    Hydra needs about 70 ms per run, this class about 3 ms.
    """

    def __init__(self) -> None:
        self._bases: dict[tuple[str, ...], DictConfig | None] = {}
        self._parsed: dict[str, tuple[str, Any]] = {}
        self._files_checked: set[tuple[tuple[str, str], ...]] = set()

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """Return the same as the function `compose`."""
        groups = tuple(text for text in overrides if not _is_plain(text))
        if groups not in self._bases:
            self._bases[groups] = self._base(groups)
        base = self._bases[groups]
        if base is None:
            return compose(overrides)
        config = self._with_values(base, [text for text in overrides if _is_plain(text)], overrides)
        _check_launch(config)
        files = tuple(sorted(config.data.paths().items()))
        if files not in self._files_checked:
            config.data.check_files()
            self._files_checked.add(files)
        return config

    def _base(self, groups: Sequence[str]) -> DictConfig | None:
        """Compose the groups. None if it fails, or if values refer to each other.

        Such values cannot be set after the references are resolved.
        """
        try:
            made = composed(groups)
            if "${" in str(as_values(made)):
                return None
            return structured(resolved(made))
        except ConfigError:  # a missing value may be among the plain values
            return None

    def _with_values(self, base: DictConfig, texts: Sequence[str], overrides: Sequence[str]) -> RunConfig:
        made = copy.deepcopy(base)
        try:
            for text in [*texts, *_without_token_budget(given_values(overrides))]:
                OmegaConf.update(made, *self._key_and_value(text), merge=True)
        except Exception:  # OmegaConf's own classes, or Python's for too large numbers
            return compose(overrides)  # to show its error message
        return checked(made)

    def _key_and_value(self, text: str) -> tuple[str, Any]:
        """Parse an override, with a cache: Hydra's parser is slow, and all runs of a sweep share most overrides."""
        if text not in self._parsed:
            (override,) = overrides_of([text])
            self._parsed[text] = (override.key_or_group, override.value())
        return self._parsed[text]


def _is_plain(override: str) -> bool:
    """Whether an override only sets one value. It does not choose a group, and adds or deletes nothing."""
    key, _, value = override.partition("=")
    is_value = re.fullmatch(r"\w+(\.\w+)+|runs_dir|study", key) is not None
    return is_value and key not in ("method.name", "cluster.name") and "${" not in value
