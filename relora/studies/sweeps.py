"""Sweeps: the runs that a command line or a file of sweeps/ describes."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from relora.common.errors import ConfigError, shown
from relora.config import tuned
from relora.config.choices import preset_file, sweep_file
from relora.config.compose import Composer, as_values, compose, composed, study_of
from relora.config.overrides import given_values, leaves, parsed, written
from relora.config.run import RunConfig
from relora.config.tuned import Presets
from relora.methods.registry import METHODS

if TYPE_CHECKING:
    from omegaconf import DictConfig


MOST_RUNS = 10_000
"""The maximum number of runs of one grid. All runs are composed and checked before the first one starts."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The arms of a study."""

    study: str
    question: str
    """The question in the file. Empty for a sweep of the command line."""
    runs: list[RunConfig]
    """In the order of the file and of the command line. Each run is there once."""
    arguments: dict[str, list[str]] = field(default_factory=dict)
    """Config hash -> the overrides from which the run was composed."""
    fixed: list[str] = field(default_factory=list)
    """The overrides of the command line with one value. They apply to every run."""
    file: str | None = None
    """The NAME of sweeps=NAME."""
    baseline_rates: list[float] | None = None
    """Multiples of full rank's learning rate for the baselines. None: 1 if that rate was tuned, otherwise several."""
    max_failures: int | None = None
    """How many runs may fail before no more are started. None: relora.studies.failures decides."""
    remarks: list[str] = field(default_factory=list)
    """Notes for the user who launches the sweep."""


def expand(overrides: Sequence[str]) -> Sweep:
    """Compose and check all runs that the overrides describe.

    The runs are the product of `key=a,b` on the command line and each grid of sweeps=NAME. A sweeps/ file has one grid
    under hydra.sweeper.params, or a union of grids under `grids`. Its other values apply to every run. The command line
    has priority over both.

    Raises:
        ConfigError: A run is invalid, and the message names the first such run. Or nothing is swept, a key cannot be
            swept, or a grid gives more than MOST_RUNS runs.
    """
    given = parsed(overrides)
    plain = [text for key, texts in given if len(texts) == 1 for text in texts]
    name = _sweep_name(given)
    for key, texts in given:
        if key.startswith("hydra.sweeper."):
            raise ConfigError(f"{shown(texts[0])} is for Hydra's own sweeper; write key=a,b,c instead")
        if key in ("study", "runs_dir") and len(texts) > 1:
            raise ConfigError(f"{key}={shown(texts[0].partition('=')[2])},... cannot be swept: a study has one {key}")
    file = composed(_of_every_method(plain), with_hydra=True)
    grids = [{}] if name is None else _grids(file, name)
    on_the_line = {key for key, _ in given}
    runs: dict[str, RunConfig] = {}
    led_to: dict[str, list[str]] = {}
    remarks: list[str] = []
    cells = 0
    swept = [key for key, texts in given if len(texts) > 1]
    study = study_of(file) or name or "-".join(key.rpartition(".")[2] for key in swept)
    if not study:
        raise ConfigError("nothing is swept; write key=a,b,c or sweeps=NAME, or leave -m out for a single run")
    composer, presets = Composer(), Presets()
    own = [] if name is None else [f"sweeps={name}"]
    keys = _KeysOfMethods([text for key, texts in given if key == "method" for text in texts] or _methods_of(grids))
    for grid in grids:
        rows = parsed([f"{key}={written(value)}" for key, value in grid.items() if key not in on_the_line])
        axes = [*rows, *given]
        if math.prod(len(texts) for _, texts in axes) > MOST_RUNS:
            sizes = " x ".join(str(len(texts)) for _, texts in axes if len(texts) > 1)
            raise ConfigError(f"the sweep has {sizes} runs; the maximum is {MOST_RUNS:,}; give fewer values")
        for cell in itertools.product(*(texts for _, texts in axes)):
            arguments = keys.without_foreign(text for text in cell if not text.startswith(("sweeps=", "study=")))
            chosen = [text for (key, texts), text in zip(axes, cell, strict=True) if key in grid or len(texts) > 1]
            try:
                config = composer.compose([*own, *arguments, f"study={study}"])
            except ConfigError as error:
                raise ConfigError(f"{' '.join(chosen)}: {error}{_other_choices(name, rows, error)}") from error
            cells += 1
            key = config.config_hash  # looks for folders, so once a cell
            if key not in runs:
                runs[key] = presets.noted(config, [*own, *arguments])
                led_to[key] = arguments
    if cells > len(runs):
        remarks.append(f"{cells} choices are {len(runs)} runs: some choices give the same run in this setting")
    for key, config in runs.items():
        remarks += [*without_preset(led_to[key], config), *config.remarks]
    remarks += [*keys.remarks(), *tuned.remarks(runs.values())]
    return Sweep(
        study=study,
        question=_question(name),
        runs=list(runs.values()),
        arguments=led_to,
        fixed=[text for _, texts in given if len(texts) == 1 for text in texts],
        file=name,
        baseline_rates=_baseline_rates(as_values(file.get("baseline_rates"))),
        max_failures=_max_failures(as_values(file.get("max_failures"))),
        remarks=list(dict.fromkeys(remarks)),
    )


def _of_every_method(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without keys of a method: the composed method may be another one than theirs."""
    return [text for text in overrides if not text.startswith("method.")]


class _KeysOfMethods:
    """Leaves out overrides of keys that the method of a run does not have, but another method of the sweep has."""

    def __init__(self, choices_of_method: Sequence[str]) -> None:
        names = [text.partition("=")[2] for text in choices_of_method]
        self._keys = {
            name: {each.name for each in fields(METHODS.find(name))} for name in names if name in METHODS.names()
        }
        self._left_out: dict[str, set[str]] = {}
        """Override -> the methods that do not have its key."""

    def without_foreign(self, arguments: Iterable[str]) -> list[str]:
        """Return the overrides of one run, without those that are for other methods of the sweep."""
        texts = list(arguments)
        method = given_values(texts).get("method")
        found: list[str] = []
        for text in texts:
            group, _, key = text.partition("=")[0].partition(".")
            having = {name for name, keys in self._keys.items() if key.partition(".")[0] in keys}
            if group == "method" and key and method in self._keys.keys() - having and having:
                self._left_out.setdefault(text, set()).add(method)
            else:
                found.append(text)
        return found

    def remarks(self) -> list[str]:
        """Return a note for each override that some methods do not have."""
        return [
            f"{text} is not for {', '.join(f'method={name}' for name in sorted(methods))}: no such key there"
            for text, methods in self._left_out.items()
        ]


def _methods_of(grids: Sequence[dict[str, Any]]) -> list[str]:
    """Return the choices of method in the grids of a file, as overrides."""
    return [
        text
        for grid in grids
        if "method" in grid
        for _, texts in parsed([f"method={grid['method']}"])
        for text in texts
    ]


def _baseline_rates(given: Any) -> list[float] | None:
    """Return the checked value of baseline_rates. Raises ConfigError if a factor is not a positive number."""
    if given is None:
        return None
    values = given if isinstance(given, list) else [given]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if not values or len(numbers) < len(values) or not all(0 < value < math.inf for value in numbers):
        raise ConfigError(
            f"baseline_rates={shown(given)} must be positive factors of full rank's learning rate, for example "
            "[0.25,0.5,1,2]; [1] trains that rate only, null trains several rates if that rate is not tuned"
        )
    return list(dict.fromkeys(map(float, numbers)))


def _max_failures(given: Any) -> int | None:
    """Return the checked value of max_failures. Raises ConfigError if it is not a number of runs."""
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise ConfigError(f"max_failures={shown(given)} must be a whole number of at least 1, or null")
    return given


def _other_choices(name: str | None, rows: Sequence[tuple[str, list[str]]], error: ConfigError) -> str:
    """Return the remedy for a sweeps/ file with choices that do not fit, as the end of an error message."""
    swept = [key for key, texts in rows if len(texts) > 1 and key != "method"]
    at_fault = [key for key in swept if key in str(error)] or swept
    if not at_fault:
        return ""
    others = " ".join(f"{key}=..." for key in at_fault)
    return f"; where the choices of sweeps={name} do not fit, give others on the command line: {others}"


def without_preset(overrides: Sequence[str], config: RunConfig) -> list[str]:
    """Return a remark if the experiment of `overrides` has no preset for the method of `config`."""
    experiment, method = given_values(overrides).get("experiments"), config.method.name
    if experiment is None or preset_file(experiment, method) is not None:
        return []
    return [
        f"experiments={experiment} has no preset for method={method}: its rank and rates are those of the default run; "
        f"write conf/presets/{experiment}/{method}.yaml or set them"
    ]


def _sweep_name(given: Sequence[tuple[str, list[str]]]) -> str | None:
    """Return the NAME of sweeps=NAME, or None. Raises ConfigError if there are several names."""
    names = [text.partition("=")[2] for key, texts in given if key == "sweeps" for text in texts]
    if len(names) > 1:
        raise ConfigError(f"sweeps={','.join(names)}: a launch asks one question; launch one sweep after the other")
    return names[0] if names else None


def _grids(file: "DictConfig", name: str) -> list[dict[str, Any]]:
    """Return the grids of a composed sweeps/ file. Raises ConfigError if they are not a list of mappings."""
    grids = as_values(file.hydra.sweeper.params if "grids" not in file else file.grids)
    grids = [grids or {}] if "grids" not in file else grids
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise ConfigError(f"grids={grids} must be a list of grids with lines key: choices, as in sweeps/{name}.yaml")
    return grids


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for learning rates, from a sweeps/ file with the key `tune`."""

    study: str
    question: str
    method: str
    experiment: str | None
    trials: int
    ranges: dict[str, tuple[float, float]]
    """Dotted key -> lowest and highest value. The search uses a log scale."""
    choices: dict[str, list[Any]]
    """Dotted key -> the values to choose from."""
    seeds: list[int]
    overrides: list[str]
    """The overrides that all trials share."""


def search(overrides: Sequence[str]) -> Search | None:
    """Return the search for learning rates that sweeps=NAME describes. Only the seed may be swept.

    Returns:
        The search. None without sweeps=NAME, or if the file has no key `tune`.

    Raises:
        ConfigError: A value of `tune` is invalid, another key is swept, or a trial's config is invalid.
    """
    given = parsed(overrides)
    plain = [text for _, texts in given if len(texts) == 1 for text in texts]
    name = _sweep_name(given)
    if name is None:
        return None
    file = composed(_of_every_method(plain))
    if "tune" not in file:
        return None
    wanted = as_values(file)["tune"]
    if not isinstance(wanted, dict) or not isinstance(wanted.get("ranges"), dict) or "trials" not in wanted:
        raise ConfigError(f"tune={wanted} must hold trials and ranges, as in sweeps/tune_learning_rate.yaml")
    seeds = [text.partition("=")[2] for key, texts in given if key == "trainer.seed" for text in texts]
    study = study_of(file) or name
    not_of_a_run = ("study=", "trainer.seed=", "tune.")
    plain_overrides = [*(text for text in plain if not text.startswith(not_of_a_run)), f"study={study}"]
    swept = [key for key, texts in given if len(texts) > 1 and key != "trainer.seed"]
    if swept:
        raise ConfigError(f"{swept[0]} cannot be swept in a search; launch one search for each value")
    ranges: dict[str, tuple[float, float]] = {}
    for key, limits in leaves(wanted["ranges"]):
        try:
            low, high = map(float, limits)
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 < low < high:
            raise ConfigError(f"tune.ranges.{key}={limits} must be two positive numbers, the lower first")
        ranges[key] = (low, high)
    listed = wanted.get("choices") or {}
    if not isinstance(listed, dict):
        raise ConfigError(f"tune.choices={shown(listed)} must hold lists, as in sweeps/tune_relora.yaml")
    choices = dict(leaves(listed))
    for key, values in choices.items():
        if not isinstance(values, list) or len(values) < 2:
            raise ConfigError(f"tune.choices.{key}={shown(values)} must be a list of at least two values")
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
        choices=choices,
        seeds=[config.trainer.seed for config in checked],
        overrides=plain_overrides,
    )
    lowest = [f"{key}={low:g}" for key, (low, _) in ranges.items()]
    for choice in itertools.product(
        *([f"{key}={written(value)}" for value in values] for key, values in choices.items())
    ):
        compose([*found.overrides, *lowest, *choice])
    return found


def _question(name: str | None) -> str:
    """Return the comment at the top of a sweeps/ file. Empty if there is no file or no comment."""
    file = sweep_file(name) if name is not None else None
    lines = file.read_text().splitlines() if file is not None else []
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comments if "@package" not in line)
