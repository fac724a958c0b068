"""From overrides to a RunConfig and from a run's frozen file back to it: the one importer of Hydra and OmegaConf."""

import copy
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from relora.common.errors import ConfigError, shown
from relora.common.files import write_whole
from relora.config import choices, credentials
from relora.config.cluster import ClusterConfig, cluster_class
from relora.config.groups import (
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrackerConfig,
    check_architecture,
    check_files,
)
from relora.config.run import RunConfig
from relora.methods import registry

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OF_A_LAUNCH = ("baseline_rates",)
"""Keys that are settings of a study and of no run."""
OF_A_SWEEP = ("grids", "tune")
"""Keys of sweeps/ files that are no settings of a run."""
PATHS = ("data.path", "data.tokenizer", "runs_dir", "tracker.uri")
FREE_KEYS = ("cluster.options.", "cluster.options=")
"""Begin keys that no file of conf/ has."""
MOST_VALUES = 10_000
"""Of one key in a sweep."""


def _search_path() -> str:
    """The override that adds experiments/, sweeps/ and the conf/ folders of packages that bring methods."""
    folders = [choices.home(), *registry.conf_dirs()]
    quoted = [f"'file://{folder}'" for folder in folders]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def composed(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """What Hydra composes, overrides of a budget in steps taking the place of one in tokens. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    given = given_values(overrides)
    _check(overrides, sweeps=False)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(choices.conf_dir()), version_base="1.3"):
            texts = [_search_path(), *map(_as_hydra_reads, overrides), *_steps_alone(given)]
            composed = hydra_compose("config", texts, return_hydra_config=with_hydra)
    except Exception as error:  # whatever Hydra raises, by its classes or Python's
        raise ConfigError(_explain(error)) from error
    if "sweeps" not in given:
        for key in OF_A_SWEEP:
            if key in composed:
                raise ConfigError(f"unknown key {key}; it belongs in a sweeps/ file, chosen with sweeps=NAME")
    return composed


def given_values(overrides: Sequence[str]) -> dict[str, str]:
    """Key -> value, both as they are written, the last of each."""
    pairs = (text.partition("=") for text in overrides if "=" in text)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _check(texts: Sequence[str], *, sweeps: bool) -> None:
    """Raise ConfigError for overrides that Hydra would take for something else, or explain at length."""
    groups = choices.groups()
    for text, override in zip(texts, _overrides(texts), strict=True):
        key = override.key_or_group
        if override.is_sweep_override():
            if not sweeps:
                raise ConfigError(
                    f"{shown(text)} holds several values, and this is a single run; write python run.py -m for a "
                    "sweep, or quote a value with a comma: 'key=\"a,b\"'"
                )
            continue
        value = override.value()
        if not key.strip():
            raise ConfigError(f"'{shown(text)}' is no override of the form key=value: it has no key")
        if override.is_delete():
            raise ConfigError(
                f"{shown(text)}: nothing can be taken away from a config; write {shown(key)}= another value"
            )
        if key in groups and value not in choices.options(key):
            raise ConfigError(_no_choice(key, text.partition("=")[2]))
        if value == "???":
            raise ConfigError(f"{shown(key)}=??? is no value; leave {shown(key)} out, or give it one")


def _as_hydra_reads(text: str) -> str:
    """An override with what Hydra's grammar asks for beyond key=value: quotes around a path, ++ before a free key."""
    text = _quoted(text)
    return f"++{text}" if text.startswith(FREE_KEYS) else text


@lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    """An override, its value in quotes where that is a path that Hydra's grammar refuses, or reads as no text.

    Paths with commas between them stay a sweep. What the grammar reads as text, null or a sweep stays as it is.
    """
    key, equals, value = text.partition("=")
    if key.lstrip("+") not in PATHS or not value.strip():
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    def one(path: str) -> str:
        made = _parsed(f"{key}={path}")
        if made is not None and (made.is_sweep_override() or isinstance(made.value(), str | None)):
            return path
        return QuotedString(path.strip(), Quote.double).with_quotes()

    made = _parsed(text)
    is_one = made is not None and not made.is_sweep_override()
    return f"{key}{equals}{one(value) if is_one else ','.join(map(one, _parts(value)))}"


def _parts(value: str) -> list[str]:
    """What stands between the commas that are not in quotes or brackets."""
    return re.findall(r"""(?:"[^"]*"|'[^']*'|\([^)]*\)|\[[^]]*\]|\{[^}]*\}|\\,|[^,])+""", value)


def _parsed(text: str) -> "Override | None":
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_override(text)
    except Exception:  # the grammar's own classes, and Python's
        return None


def _steps_alone(given: dict[str, str]) -> list[str]:
    """What lets a budget in steps, of the command line or of a sweep, win over an experiment's budget in tokens."""
    of_the_sweep = _own_settings(given["sweeps"]) if "sweeps" in given else {}
    keys = {key for key, value in {**of_the_sweep, **given}.items() if value not in (None, "null")}
    return ["trainer.total_tokens=null"] if "trainer.total_steps" in keys and "trainer.total_tokens" not in keys else []


def _own_settings(name: str) -> dict[str, Any]:
    """What a sweeps/ file sets for every run, by dotted key."""
    file = choices.home() / "sweeps" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
    return dict(leaves({str(key): value for key, value in values.items()})) if isinstance(values, dict) else {}


def sweep_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """What the sweeps/ file that `overrides` choose sets for every run, by dotted key; empty without one."""
    name = given_values(overrides).get("sweeps")
    return _own_settings(name) if name is not None else {}


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def compose(overrides: Sequence[str]) -> RunConfig:
    """The run that the defaults and `overrides` describe. Raises ConfigError for whatever is wrong with it."""
    return to_run_config(composed(overrides))


def preset_run(experiment: str | None, method: str, data: DataConfig) -> RunConfig | None:
    """The run that a method's preset belongs to: what its experiment, or else the default run, composes to.

    An experiment that leaves the text to the user takes that of `data`. None where it describes no run by itself.
    """
    chosen = [] if experiment is None else [f"experiments={experiment}"]
    try:
        values = _resolved(composed([*chosen, f"method={method}"]))
        own = values["data"]
        if own.get("name") == "text" and own.get("path") is None:
            left_open = ("path", "text_field", "tokenizer")
            own |= {key: getattr(data, key) for key in left_open} if data.name == "text" else {"path": "."}
        return _checked(_structured(values))
    except ConfigError:
        return None


def full_rank(overrides: Sequence[str]) -> tuple[OptimizerConfig, ScheduleConfig]:
    """Optimizer and schedule of full rank under `overrides`, which may leave the rest open. Raises ConfigError."""
    values = _resolved(composed([*overrides, f"method={registry.BASELINE}"]))
    try:
        schema = {"optimizer": OmegaConf.structured(OptimizerConfig), "schedule": OmegaConf.structured(ScheduleConfig)}
        made = OmegaConf.merge(OmegaConf.create(schema), {name: values[name] for name in schema})
        return cast(OptimizerConfig, OmegaConf.to_object(made.optimizer)), cast(
            ScheduleConfig, OmegaConf.to_object(made.schedule)
        )
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def hydra_main(argv: Sequence[str], run: Callable[[DictConfig, list[str]], None]) -> None:
    """Hydra's own command line (--help, --cfg, its launchers, ...) over the same config.

    `run` is called for each job with its composed config and the overrides that led to it.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def job(composed: DictConfig) -> None:
        run(composed, list(HydraConfig.get().overrides.task))

    # Hydra's parser wants the overrides in one row; values of options (--cfg job) hold no "=".
    overrides = [argument for argument in argv if not argument.startswith("-") and "=" in argument]
    options = [argument for argument in argv if argument not in overrides]
    is_sweep = _is_sweep([*overrides, *options])
    _check([text for text in overrides if not text.startswith("hydra")], sweeps=is_sweep)
    overrides = [*map(_as_hydra_reads, overrides), *_steps_alone(given_values(overrides))]
    sys.argv = [sys.argv[0], _search_path(), *overrides, *options]
    with _hydra_raises():
        hydra.main(config_path=str(choices.conf_dir()), config_name="config", version_base="1.3")(job)()


def _is_sweep(argv: Sequence[str]) -> bool:
    """Whether Hydra's command line starts a sweep. Raises ConfigError for options that Hydra does not take."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{shown(message, 200)}; python run.py --hydra-help lists the options")

    parser = get_args_parser()
    parser.error = refuse
    arguments = parser.parse_args(argv)
    if arguments.multirun and arguments.cfg:
        raise ConfigError("-m starts a sweep and --cfg shows the config of a single run; leave out one of them")
    return arguments.multirun


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Inside, what goes wrong in Hydra's command line is a ConfigError, instead of a page and an exit."""
    from hydra.errors import HydraException

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def parsed(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(key, the single overrides that it stands for) of each override. Raises ConfigError."""
    _check(overrides, sweeps=True)
    return [
        (
            override.get_key_element(),
            [f"{override.get_key_element()}={value}" for value in _values(override)]
            if override.is_sweep_override()
            else [str(override.input_line)],
        )
        for override in _overrides(overrides)
    ]


def _values(override: "Override") -> list[str]:
    """What a sweep stands for, as it would be written on the command line. Raises ConfigError."""
    from hydra.core.override_parser.types import Glob

    text = shown(override.input_line)
    if override.is_interval_sweep():
        raise ConfigError(
            f"{text} has no end of values; write key=a,b,c, or search a range with a tune: file of sweeps/"
        )
    if override.key_or_group.startswith("hydra."):
        raise ConfigError(f"{text} is a setting of Hydra's and cannot be swept; write the run's own key=a,b,c")
    if isinstance(override._value, Glob):
        found = override._value.filter(choices.options(override.key_or_group))
        if not found:
            raise ConfigError(
                f"{text} matches nothing; glob takes the name of a group's choices, as in model=glob(llama_*)"
            )
        return found
    try:
        values = [str(value) for value in itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1)]
    except Exception as error:  # a range without a step, a mixture that cannot be sorted, ...
        raise ConfigError(f"{text} cannot be swept: {_explain(error)}") from error
    if not values or len(values) > MOST_VALUES:
        raise ConfigError(f"{text} holds {'no' if not values else f'more than {MOST_VALUES}'} values")
    return values


def _overrides(texts: Sequence[str]) -> "list[Override]":
    """What Hydra's grammar makes of them. Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    found: list[Override] = []
    for text in texts:
        try:
            found += parser.parse_overrides([_quoted(text)])
        except Exception as error:  # the grammar's own classes, and Python's for what is nested too deep or too long
            raise ConfigError(
                f"'{shown(text, 160)}' is no override of the form key=value; quote a value with special characters: "
                "'key=\"value\"'"
            ) from error
    return found


def study_of(file: DictConfig) -> str | None:
    """The study that a composed config names. Raises ConfigError."""
    try:
        return file.get("study")
    except OmegaConfBaseException as error:
        raise ConfigError(f"study: {_explain(error)}") from error


def as_values(node: Any) -> Any:
    """A node of a composed config as dicts, lists and values, nothing resolved."""
    return OmegaConf.to_container(node) if isinstance(node, Container) else node


def cluster_with(values: dict[str, Any], overrides: Sequence[str]) -> ClusterConfig:
    """Cluster settings as they were written down, changed by overrides of cluster.*. Raises ConfigError."""
    given = _overrides(overrides)
    try:
        chosen = next((str(item.value()) for item in given if item.key_or_group == "cluster"), None)
        if chosen is not None:
            values = as_values(composed([f"cluster={chosen}"]).cluster)
        made = OmegaConf.merge(OmegaConf.structured(cluster_class(values["name"])), values)
        config = OmegaConf.create({"cluster": made})  # so that errors name the whole key
        for item in given:
            if item.key_or_group != "cluster":
                OmegaConf.update(config, item.key_or_group, item.value(), merge=True)
        return cast(ClusterConfig, OmegaConf.to_object(config.cluster))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


# ----------------------------------------------------------------------------------------- from Hydra's to our config


def to_run_config(composed: DictConfig) -> RunConfig:
    """Typed, completed and checked, with paths made absolute. Raises ConfigError."""
    config = _checked(_structured(_resolved(composed)))
    check_architecture(config.model.name)
    config.cluster.check_folder(config.runs_dir)
    check_files(config.data)
    return config


def _resolved(composed: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except Exception as error:  # values that refer to each other without an end are a RecursionError
        raise ConfigError(_explain(error)) from error


def _structured(values: Any) -> DictConfig:
    """The values in their fields, with types. Raises ConfigError for unknown keys and wrong types."""
    values = {key: value for key, value in values.items() if key not in ("hydra", *OF_A_LAUNCH, *OF_A_SWEEP)}
    missing = [key for key, value in leaves(values) if value == "???"]
    if missing:
        raise ConfigError(f"a value is missing: {shown(missing[0])}")
    schema = OmegaConf.structured(RunConfig)
    for group, kind_of in (("method", registry.method_class), ("cluster", cluster_class)):
        chosen = values.get(group) or {}
        schema[group] = OmegaConf.structured(kind_of(chosen.get("name") if isinstance(chosen, dict) else None))
    try:
        return cast(DictConfig, OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    except OverflowError as error:
        key, value = next(
            (key, value) for key, value in leaves(values) if isinstance(value, int) and value > sys.maxsize
        )
        raise ConfigError(f"{key}={shown(value)} is too large for a number") from error


def _checked(structured: DictConfig) -> RunConfig:
    """The config itself, its paths absolute. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(structured)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, RunConfig)
    config.runs_dir = str(Path(config.runs_dir).expanduser().absolute())
    for key in ("path", "tokenizer"):
        value = getattr(config.data, key)
        if value is not None:
            setattr(config.data, key, str(Path(value).expanduser().absolute()))
    config.tracker.uri = _store(config.tracker)
    return config


def _store(tracker: TrackerConfig) -> str | None:
    """The URI of a run's store without its password, which is remembered; MLFLOW_TRACKING_URI where none is given."""
    uri = tracker.uri
    if uri is None and tracker.name == "mlflow" and os.environ.get(credentials.VARIABLE):
        uri = os.environ[credentials.VARIABLE]
        try:
            TrackerConfig(uri=uri)
        except ConfigError:
            raise ConfigError(
                f"{credentials.VARIABLE}={shown(credentials.redacted(uri))} is no store that relora records in; unset "
                "it, or give tracker.uri= sqlite:///FILE, http://HOST:PORT or a database's URI"
            ) from None
    if uri is not None and uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    return None if uri is None else credentials.learn(uri)


class Composer:
    """Composes many runs: Hydra once for each choice of groups, plain values on a copy of what it made.

    Hydra takes some 70 ms a run, this 3.
    """

    def __init__(self) -> None:
        self._bases: dict[tuple[str, ...], DictConfig | None] = {}
        self._parsed: dict[str, tuple[str, Any]] = {}
        self._files_checked: set[tuple[str | None, str | None]] = set()

    def compose(self, overrides: Sequence[str]) -> RunConfig:
        """The same as the function `compose`."""
        groups = tuple(text for text in overrides if not _is_plain(text))
        if groups not in self._bases:
            self._bases[groups] = self._base(groups)
        base = self._bases[groups]
        if base is None:
            return compose(overrides)
        config = self._with_values(base, [text for text in overrides if _is_plain(text)], overrides)
        check_architecture(config.model.name)
        config.cluster.check_folder(config.runs_dir)
        files = (config.data.path, config.data.tokenizer)
        if files not in self._files_checked:
            check_files(config.data)
            self._files_checked.add(files)
        return config

    def _base(self, groups: Sequence[str]) -> DictConfig | None:
        """None where values refer to each other, so that one cannot be set after the others were resolved."""
        try:
            made = composed(groups)
            if "${" in str(as_values(made)):
                return None
            return _structured(_resolved(made))
        except ConfigError:  # what is missing may be among the values
            return None

    def _with_values(self, base: DictConfig, texts: Sequence[str], overrides: Sequence[str]) -> RunConfig:
        made = copy.deepcopy(base)
        try:
            for text in [*texts, *_steps_alone(given_values(overrides))]:
                OmegaConf.update(made, *self._key_and_value(text), merge=True)
        except Exception:  # OmegaConf's own classes, and Python's for numbers that are too large
            return compose(overrides)  # whose message is the one to show
        return _checked(made)

    def _key_and_value(self, text: str) -> tuple[str, Any]:
        """Most overrides are those of all runs of a sweep, and Hydra's parser is slow."""
        if text not in self._parsed:
            (override,) = _overrides([text])
            self._parsed[text] = (override.key_or_group, override.value())
        return self._parsed[text]


def _is_plain(override: str) -> bool:
    """Whether an override sets one value, and chooses, adds or deletes nothing."""
    key, _, value = override.partition("=")
    is_value = re.fullmatch(r"\w+(\.\w+)+|runs_dir|study", key) is not None
    return is_value and key not in ("method.name", "cluster.name") and "${" not in value


def _explain(error: Exception) -> str:
    """One line of ours for an error of Hydra's or OmegaConf's."""
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = str(getattr(cause, "full_key", "") or "")
    text, detail = str(error).strip(), str(cause).strip()
    group = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if group and group[1] in choices.groups():
        return _no_choice(group[1], group[2])
    if "not in struct" in detail or "not in '" in detail:
        return f"unknown key {shown(key)}{choices.did_you_mean(key)}"
    first = shown((detail or type(cause).__name__).splitlines()[0], 200)
    if "missing mandatory value" in first.lower():
        return f"a value is missing: {first}"
    return f"{shown(key)}: {first}" if key else first


def _no_choice(group: str, value: object) -> str:
    options = choices.listed(choices.options(group))
    if re.fullmatch(r"[A-Za-z][\w./-]*", str(value)) and value != "null":
        return f"{group}={shown(value)} does not exist; choose {group}= one of {options}"
    return f"{group}={shown(value)} is no choice; leave {group} out, or choose {group}= one of {options}"


def freeze(config: RunConfig, path: Path) -> None:
    """Write the whole config; the file is whole at any time. A password of its store is kept in private."""
    path.parent.mkdir(parents=True, exist_ok=True)
    credentials.keep(config.tracker.uri, Path(config.runs_dir))
    write_whole(path, yaml.dump(asdict(config), Dumper=yaml.CSafeDumper, sort_keys=False))


def at_home(path: Path) -> RunConfig:
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
        return _checked(_structured(values))
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error
