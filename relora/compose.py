"""From overrides to a RunConfig and from a run's frozen file back to it: the one importer of Hydra and OmegaConf."""

import copy
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from relora.cluster import CLUSTERS, ClusterConfig
from relora.config import RunConfig
from relora.errors import ConfigError
from relora.groups import METHODS, check_files
from relora.rundir import write_whole

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

OF_A_SWEEP = ("grids", "tune")
"""Keys of sweeps/ files that are no settings of a run."""
PRESET_HEAD = "# @package _global_"
BEFORE = "before the search:"
"""Begins what was said of a preset's value that a search has replaced."""


def conf_dir() -> Path:
    """The folder of config groups: inside an installed package, beside the package in a checkout."""
    return home() / "conf"


def home() -> Path:
    """Where conf/, experiments/ and sweeps/ stand, whatever the working directory is."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parent


def _search_path() -> str:
    """The override that makes experiments/ and sweeps/ config groups."""
    return f"hydra.searchpath=['file://{home()}']"


def composed(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """What Hydra composes, overrides of a budget in steps taking the place of one in tokens. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    given = given_values(overrides)
    _check_choices(given)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            texts = [_search_path(), *overrides, *_steps_alone(given)]
            composed = hydra_compose("config", texts, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
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


def _check_choices(given: dict[str, str]) -> None:
    """Raise ConfigError for a value of a config group that cannot be the name of a choice."""
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()} | {"experiments", "sweeps"}
    for key in given.keys() & groups:
        if given[key].strip() in ("", "null") or given[key].startswith(("[", "{", "$")):
            choices = ", ".join(_options(key))
            raise ConfigError(f"{key}={given[key]} is no choice; leave {key} out, or choose {key}= one of {choices}")


def _steps_alone(given: dict[str, str]) -> list[str]:
    """What lets a budget in steps, of the command line or of a sweep, win over an experiment's budget in tokens."""
    of_the_sweep = _own_settings(given["sweeps"]) if "sweeps" in given else {}
    keys = {key for key, value in {**of_the_sweep, **given}.items() if value not in (None, "null")}
    return ["trainer.total_tokens=null"] if "trainer.total_steps" in keys and "trainer.total_tokens" not in keys else []


def _own_settings(name: str) -> dict[str, Any]:
    """What a sweeps/ file sets for every run, by dotted key."""
    file = home() / "sweeps" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
    return dict(leaves({str(key): value for key, value in values.items()})) if isinstance(values, dict) else {}


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
    overrides += _steps_alone(given_values(overrides))
    sys.argv = [sys.argv[0], _search_path(), *overrides, *options]
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()


def parsed(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(key, the single overrides that it stands for) of each override. Raises ConfigError."""
    return [
        (
            override.get_key_element(),
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            if override.is_sweep_override()
            else [str(override.input_line)],
        )
        for override in _overrides(overrides)
    ]


def _overrides(texts: Sequence[str]) -> "list[Override]":
    """What Hydra's grammar makes of them. Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides(list(texts))
    except HydraException as error:
        raise ConfigError(_explain(error)) from error


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
        made = OmegaConf.merge(OmegaConf.structured(CLUSTERS[values["name"]]), values)
        config = OmegaConf.create({"cluster": made})  # so that errors name the whole key
        for item in given:
            if item.key_or_group != "cluster":
                OmegaConf.update(config, item.key_or_group, item.value(), merge=True)
        return cast(ClusterConfig, OmegaConf.to_object(config.cluster))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def write_preset(file: Path, values: dict[str, float], remark: str) -> None:
    """Put `values` (by dotted key) into a preset, beside what it holds already, comments included.

    What was said of a value that is replaced stays behind the new one, with the old one. The file is whole at any time.
    """
    old = file.read_text() if file.is_file() else ""
    wanted = OmegaConf.create(old)
    lines = old.splitlines()
    for key, value in values.items():
        OmegaConf.update(wanted, key, value, force_add=True)
        lines = _with_value(lines, key, f"{value}")
    if not _says("\n".join(lines), wanted):  # laid out in another way than presets are
        lines = [line for line in lines if line.startswith("#")] + OmegaConf.to_yaml(wanted).splitlines()
    told = [f"# {line}".rstrip() for line in remark.split("\n")]
    # An earlier search's remark begins with the same words.
    beginnings = {" ".join(line.split()[:4]) for line in told}
    lines = [
        line
        for line in lines
        if line != PRESET_HEAD and not (line.startswith("#") and " ".join(line.split()[:4]) in beginnings)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "\n".join([PRESET_HEAD, *told, *lines]) + "\n")


def _says(text: str, wanted: Container) -> bool:
    try:
        return OmegaConf.create(text) == wanted
    except YAMLError:
        return False


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
        told = f" # {comment}" if comment else ""
        return [*lines[:at], f"{indent}{part}: {value}{told}", *lines[at + 1 :]]
    return lines


# ----------------------------------------------------------------------------------------- from Hydra's to our config


def to_run_config(composed: DictConfig) -> RunConfig:
    """Typed, completed and checked, with paths made absolute. Raises ConfigError."""
    config = _checked(_structured(_resolved(composed)))
    check_files(config.data)
    return config


def _resolved(composed: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


def _structured(values: Any) -> DictConfig:
    """The values in their fields, with types. Raises ConfigError for unknown keys and wrong types."""
    values = {key: value for key, value in values.items() if key not in ("hydra", *OF_A_SWEEP)}
    schema = OmegaConf.structured(RunConfig)
    try:
        for group, kinds in (("method", METHODS), ("cluster", CLUSTERS)):
            chosen = values.get(group) or {}
            name = chosen.get("name") if isinstance(chosen, dict) else None
            if name not in kinds:
                raise ConfigError(f"{group}.name={name} is not one of {', '.join(kinds)}")
            schema[group] = OmegaConf.structured(kinds[str(name)])
        return cast(DictConfig, OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error


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
    uri = config.tracker.uri
    if uri is not None and uri.startswith("sqlite:///"):
        config.tracker.uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    return config


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
        except (ConfigError, OmegaConfBaseException):
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
    return re.fullmatch(r"\w+(\.\w+)+|runs_dir|study", key) is not None and "${" not in value


def _explain(error: Exception) -> str:
    """One message of ours for one of Hydra's or OmegaConf's."""
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = str(getattr(cause, "full_key", "") or "")
    text, detail = str(error).strip(), str(cause).strip()
    group = re.search(r"Could not find '([^/']+)/([^']+)'", text)
    if group:
        return f"{group[1]}={group[2]} does not exist; choose {group[1]}= one of {', '.join(_options(group[1]))}"
    override = re.match(r"Error parsing override '(.*)'\n(.*)", text)
    if override:
        return f"{override[1]!r} is no override of the form key=value ({override[2]})"
    if "not in struct" in detail or "not in '" in detail:
        return f"unknown key {key}{_did_you_mean(key)}"
    if "missing mandatory value" in detail.lower():
        return f"a value is missing: {detail.splitlines()[0]}"
    return f"{key}: {detail.splitlines()[0]}" if key else text


def _options(group: str) -> list[str]:
    """The choices of a config group, those of experiments in their folders."""
    folders = (conf_dir() / group, home() / group)
    paths = [path.relative_to(folder).with_suffix("") for folder in folders for path in folder.rglob("*.yaml")]
    return sorted(path.as_posix() for path in paths)


def _did_you_mean(key: str) -> str:
    known = _known_keys()
    if key in known:
        return f" with this choice of {key.partition('.')[0]}; other choices of the group have it"
    close = difflib.get_close_matches(key, known, n=1) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"; did you mean {close[0]}?" if close else "; python run.py --cfg job shows every key"


def _known_keys() -> list[str]:
    """Every dotted key that some choice of groups has."""
    names: set[str] = set()
    for path in conf_dir().glob("*/*.yaml"):
        node = OmegaConf.to_container(OmegaConf.load(path))
        package_is_global = "@package _global_" in path.read_text()
        _collect(node, "" if package_is_global else path.parent.name, names)
    return sorted(names | {"runs_dir", "study"})


def _collect(node: Any, prefix: str, names: set[str]) -> None:
    if isinstance(node, dict):
        for key, child in node.items():
            _collect(child, f"{prefix}.{key}" if prefix else str(key), names)
    if prefix:
        names.add(prefix)


def freeze(config: RunConfig, path: Path) -> None:
    """Write the whole config; the file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.dump(asdict(config), Dumper=yaml.CSafeDumper, sort_keys=False))


def at_home(path: Path) -> RunConfig:
    """The config of a run's frozen file, its runs_dir the one where it stands now. Raises ConfigError."""
    return replace(thaw(path), runs_dir=str(path.absolute().parent.parent))


def thaw(path: Path) -> RunConfig:
    """The config that `freeze` wrote. Raises ConfigError for a file that is not one."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; {path.parent} is no run folder")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as a config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no config")
    return _checked(_structured(values))
