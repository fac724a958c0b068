"""From overrides to a RunConfig and from a run's frozen file back to it: the one importer of Hydra and OmegaConf."""

import difflib
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from relora.cluster import CLUSTERS
from relora.config import RunConfig
from relora.errors import ConfigError
from relora.groups import METHODS, FullConfig, check_files
from relora.rundir import write_whole

OF_A_SWEEP = ("grids", "tune")
"""Keys of sweeps/ files that are no settings of a run."""
PRESET_HEAD = "# @package _global_"
BEFORE = "before the search:"
"""Begins what was said of a preset's value that a search has replaced."""


def conf_dir() -> Path:
    """The folder of config groups: inside an installed package, beside the package in a checkout."""
    return _home() / "conf"


def _home() -> Path:
    """Where conf/, experiments/ and sweeps/ stand, whatever the working directory is."""
    package = Path(__file__).resolve().parent
    return package if (package / "conf").is_dir() else package.parent


def _search_path() -> str:
    """The override that makes experiments/ and sweeps/ config groups."""
    return f"hydra.searchpath=['file://{_home()}']"


def _composed(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """What Hydra composes, overrides of a budget in steps taking the place of one in tokens. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    given = _given(overrides)
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


def _given(overrides: Sequence[str]) -> dict[str, str]:
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


def compose(overrides: Sequence[str]) -> RunConfig:
    """The run that the defaults and `overrides` describe. Raises ConfigError for whatever is wrong with it."""
    return to_run_config(_composed(overrides))


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
    overrides += _steps_alone(_given(overrides))
    sys.argv = [sys.argv[0], _search_path(), *overrides, *options]
    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(job)()


# --------------------------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A study's arms, in the order of its file and of the command line, each once."""

    study: str
    question: str
    """What the file says that it asks, empty for a sweep of the command line."""
    runs: list[RunConfig]
    arguments: dict[str, list[str]] = field(default_factory=dict)
    """Config hash -> the overrides that the run was composed from."""
    remarks: list[str] = field(default_factory=list)
    """What may surprise whoever launches it."""


def expand(overrides: Sequence[str]) -> Sweep:
    """Every run that `overrides` name: `key=a,b` on the command line times the grids of sweeps=NAME.

    A sweeps/ file has one grid under hydra.sweeper.params or a union of grids under `grids`; what else it sets holds
    for every run. The command line wins over both. Each run is checked. Raises ConfigError, naming the run, for the
    first that is wrong.
    """
    given = _parsed(overrides)
    plain = [text for key, texts in given if len(texts) == 1 for text in texts]
    name = _sweep_name(given)
    file = _composed(plain, with_hydra=True)
    grids = [{}] if name is None else _grids(file, name)
    on_the_line = {key for key, _ in given}
    runs: dict[str, RunConfig] = {}
    led_to: dict[str, list[str]] = {}
    remarks: list[str] = []
    cells = 0
    swept = [key for key, texts in given if len(texts) > 1]
    study = _study(file) or name or "-".join(key.rpartition(".")[2] for key in swept)
    if not study:
        raise ConfigError("nothing is swept; write key=a,b,c or sweeps=NAME, or leave -m out for a single run")
    for grid in grids:
        rows = _parsed([f"{key}={_written(value)}" for key, value in grid.items() if key not in on_the_line])
        axes = [*rows, *given]
        for cell in itertools.product(*(texts for _, texts in axes)):
            arguments = [text for text in cell if not text.startswith(("sweeps=", "study="))]
            chosen = [text for (key, texts), text in zip(axes, cell, strict=True) if key in grid or len(texts) > 1]
            try:
                own = [] if name is None else [f"sweeps={name}"]
                config = compose([*own, *arguments, f"study={study}"])
            except ConfigError as error:
                raise ConfigError(f"{' '.join(chosen)}: {error}{_other_choices(name, rows, error)}") from error
            cells += 1
            runs.setdefault(config.config_hash, config)
            led_to.setdefault(config.config_hash, arguments)
            remarks += untuned(arguments, config)
    if cells > len(runs):
        remarks.append(f"{cells} choices are {len(runs)} runs: the others would be the same again in this setting")
    return Sweep(
        study=study,
        question=_question(name),
        runs=list(runs.values()),
        arguments=led_to,
        remarks=list(dict.fromkeys(remarks)),
    )


def _other_choices(name: str | None, rows: Sequence[tuple[str, list[str]]], error: ConfigError) -> str:
    """How to ask the question of a sweeps/ file where its choices do not fit."""
    swept = [key for key, texts in rows if len(texts) > 1 and key != "method"]
    at_fault = [key for key in swept if key in str(error)] or swept
    if not at_fault:
        return ""
    others = " ".join(f"{key}=..." for key in at_fault)
    return f"; where the choices of sweeps={name} do not fit, give others on the command line: {others}"


def untuned(overrides: Sequence[str], config: RunConfig) -> list[str]:
    """The remark that the experiment of `overrides` has no preset for the run's method, where it has none."""
    experiment, method = _given(overrides).get("experiments"), config.method.name
    if experiment is None or (conf_dir() / "presets" / experiment / f"{method}.yaml").is_file():
        return []
    return [
        f"experiments={experiment} has no preset for method={method}: its rank and rates are those of the default run, "
        f"tuned to another setting; write conf/presets/{experiment}/{method}.yaml or set them"
    ]


def _sweep_name(given: Sequence[tuple[str, list[str]]]) -> str | None:
    """The NAME of sweeps=NAME. Raises ConfigError for several."""
    names = [text.partition("=")[2] for key, texts in given if key == "sweeps" for text in texts]
    if len(names) > 1:
        raise ConfigError(f"sweeps={','.join(names)}: a launch asks one question; launch them one after the other")
    return names[0] if names else None


def _grids(file: DictConfig, name: str) -> list[dict[str, Any]]:
    """The grids of a composed sweeps/ file. Raises ConfigError."""
    listed: Any = file.hydra.sweeper.params if "grids" not in file else file.grids
    grids: Any = OmegaConf.to_container(listed) if isinstance(listed, Container) else listed
    grids = [grids or {}] if "grids" not in file else grids
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise ConfigError(f"grids={grids} must be a list of grids, each key: choices, as in sweeps/{name}.yaml")
    return grids


def _study(file: DictConfig) -> str | None:
    try:
        return file.get("study")
    except OmegaConfBaseException as error:
        raise ConfigError(f"study: {_explain(error)}") from error


def _own_settings(name: str) -> dict[str, Any]:
    """What a sweeps/ file sets for every run, by dotted key."""
    file = _home() / "sweeps" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
    return dict(_leaves({str(key): value for key, value in values.items()})) if isinstance(values, dict) else {}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a sweeps/ file with a `tune` key asks for."""

    study: str
    question: str
    method: str
    experiment: str | None
    trials: int
    ranges: dict[str, tuple[float, float]]
    """Dotted key -> lowest and highest value, searched on a log scale."""
    seeds: list[int]
    overrides: list[str]
    """Of every trial's runs."""


def search(overrides: Sequence[str]) -> Search | None:
    """The search that sweeps=NAME describes, None where it is none. Seeds may be swept, nothing else.

    Raises ConfigError.
    """
    given = _parsed(overrides)
    plain = [text for _, texts in given if len(texts) == 1 for text in texts]
    name = _sweep_name(given)
    if name is None:
        return None
    file = _composed(plain)
    if "tune" not in file:
        return None
    wanted: Any = OmegaConf.to_container(file)
    wanted = wanted["tune"]
    if not isinstance(wanted, dict) or not isinstance(wanted.get("ranges"), dict) or "trials" not in wanted:
        raise ConfigError(f"tune={wanted} must hold trials and ranges, as in sweeps/tune_learning_rate.yaml")
    seeds = [text.partition("=")[2] for key, texts in given if key == "trainer.seed" for text in texts]
    study = _study(file) or name
    not_of_a_run = ("study=", "trainer.seed=", "tune.")
    plain_overrides = [*(text for text in plain if not text.startswith(not_of_a_run)), f"study={study}"]
    swept = [key for key, texts in given if len(texts) > 1 and key != "trainer.seed"]
    if swept:
        raise ConfigError(f"{swept[0]} cannot be swept in a search; launch one search for each value")
    ranges: dict[str, tuple[float, float]] = {}
    for key, limits in _leaves(wanted["ranges"]):
        try:
            low, high = map(float, limits)
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 < low < high:
            raise ConfigError(f"tune.ranges.{key}={limits} must be two positive numbers, the lower first")
        ranges[key] = (low, high)
    if not isinstance(wanted["trials"], int) or wanted["trials"] < 1:
        raise ConfigError(f"tune.trials={wanted['trials']} must be a whole number of at least 1")
    checked = [compose([*plain_overrides, f"trainer.seed={seed}"]) for seed in seeds or [file.trainer.seed]]
    found = Search(
        study=study,
        question=_question(name),
        method=file.method.name,
        experiment=next((text.partition("=")[2] for text in plain if text.startswith("experiments=")), None),
        trials=wanted["trials"],
        ranges=ranges,
        seeds=[config.trainer.seed for config in checked],
        overrides=plain_overrides,
    )
    compose([*found.overrides, *(f"{key}={low:g}" for key, (low, _) in ranges.items())])
    return found


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


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


def _question(name: str | None) -> str:
    """The comment at the head of a sweeps/ file."""
    file = _home() / "sweeps" / f"{name}.yaml"
    lines = file.read_text().splitlines() if file.is_file() else []
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comments if "@package" not in line)


def _parsed(overrides: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(key, the single overrides that it stands for) of each override. Raises ConfigError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(_explain(error)) from error
    return [
        (
            override.get_key_element(),
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            if override.is_sweep_override()
            else [str(override.input_line)],
        )
        for override in parsed
    ]


def _written(value: Any) -> str:
    """A grid's value as it would stand on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def baseline(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The full-rank run that `config` is compared with: the same run but for what belongs to the method.

    Its learning rates are those that full rank is tuned to under the groups that `overrides` choose.
    """
    groups = [
        text
        for key, texts in _parsed(overrides)
        for text in texts[:1]
        if "." not in key and key not in ("method", "sweeps", "study", "runs_dir")
    ]
    rates = _composed([*groups, "method=full"]).optimizer
    return replace(
        config,
        method=FullConfig(name="full"),
        optimizer=replace(
            config.optimizer,
            learning_rate=rates.learning_rate,
            embedding_learning_rate=rates.embedding_learning_rate,
        ),
        schedule=replace(config.schedule, restart_warmup_steps=0),
    )


# ----------------------------------------------------------------------------------------- from Hydra's to our config


def to_run_config(composed: DictConfig) -> RunConfig:
    """Typed, completed and checked, with paths made absolute. Raises ConfigError."""
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    config = _typed(values)
    config.runs_dir = str(Path(config.runs_dir).expanduser().absolute())
    for key in ("path", "tokenizer"):
        value = getattr(config.data, key)
        if value is not None:
            setattr(config.data, key, str(Path(value).expanduser().absolute()))
    uri = config.tracker.uri
    if uri is not None and uri.startswith("sqlite:///"):
        config.tracker.uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    check_files(config.data)
    return config


def _typed(values: Any) -> RunConfig:
    values = {key: value for key, value in values.items() if key not in ("hydra", *OF_A_SWEEP)}
    schema = OmegaConf.structured(RunConfig)
    try:
        for group, kinds in (("method", METHODS), ("cluster", CLUSTERS)):
            chosen = values.get(group) or {}
            name = chosen.get("name") if isinstance(chosen, dict) else None
            if name not in kinds:
                raise ConfigError(f"{group}.name={name} is not one of {', '.join(kinds)}")
            schema[group] = OmegaConf.structured(kinds[str(name)])
        config = OmegaConf.to_object(OmegaConf.merge(schema, values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


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
    folders = (conf_dir() / group, _home() / group)
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
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


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
    return _typed(values)
