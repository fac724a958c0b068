"""Find out whether a run's learning rates were tuned for its setting.

A preset belongs to the setting of its experiment. The values of conf/method/ belong to the default run. A run with the
same model, text, batch, budget and precision has tuned rates. Any other run does not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from relora.common.errors import shown
from relora.config.choices import is_untuned_by_its_file, preset_file
from relora.config.compose import preset_run, sweep_settings
from relora.config.identity import every_field, spelled_out
from relora.config.overrides import given_values
from relora.config.published import PublishedConfig
from relora.config.rates import NOT_TUNED, RatesConfig
from relora.config.run import RunConfig

RATES = ("optimizer.learning_rate", "optimizer.embedding_learning_rate", "method.warm_start_learning_rate")

PRESET_GROUPS = ("optimizer.", "schedule.", "method.")


class Presets:
    """Compares runs with the settings of their presets, and caches these settings."""

    def __init__(self) -> None:
        self._runs: dict[str, RunConfig | None] = {}
        self._untuned: dict[tuple[str | None, str], bool] = {}

    def noted(self, config: RunConfig, overrides: Sequence[str]) -> RunConfig:
        """Return `config` with `rates`, the origin of its learning rates, and with `published.differs`.

        Args:
            config: The config of a run.
            overrides: The overrides from which `config` was composed.
        """
        given = given_values(overrides)
        given = {**{key: str(value) for key, value in sweep_settings(overrides).items()}, **given}
        experiment, method = given.get("experiments"), config.method.name
        published = self._published(config, experiment)
        if experiment is not None and preset_file(experiment, method) is None:
            experiment = None
        source = f"conf/presets/{experiment}/{method}.yaml" if experiment else f"conf/method/{method}.yaml"
        own = self._run(experiment, config)
        differs = differences(config, own) if own is not None else [f"experiments={experiment} alone is not a full run"]
        if not differs and own is not None and self._is_untuned(experiment, method):
            differs = [f"{source} says that its values are not tuned"]
        by_hand = [key for key in RATES if key in given]
        if not differs and own is not None and _same_rates(config, own):
            basis = "tuned"
        elif RATES[0] in by_hand or (by_hand and not differs):
            basis = "hand"
        else:
            basis = "untuned"
        changed = [f"{key}={value}" for key, value in given.items() if key.startswith(PRESET_GROUPS)]
        rates = RatesConfig(basis=basis, source=source, given=changed, differs=differs)
        return replace(config, rates=rates, published=published)

    def _published(self, config: RunConfig, experiment: str | None) -> PublishedConfig | None:
        """Return the paper's figures with the differences between the run and its experiment."""
        if config.published is None:
            return None
        own = self._run(experiment, config)
        if own is None:
            differs = [f"experiments={experiment} alone is not a full run"]
        else:
            # The values of the method as they were set: a short run may not come to use all of them.
            here, there = every_field(config), every_field(own)
            methods = [name for name in here if name.startswith("method.") and here[name] != there.get(name)]
            differs = _described(_differing(config, own), spelled_out(config), spelled_out(own), "in the experiment")
            differs += _described(methods, here, there, "in the experiment")
        return replace(config.published, differs=differs)

    def _is_untuned(self, experiment: str | None, method: str) -> bool:
        """Whether the preset's file is marked as untuned. It is read once for all runs of a sweep."""
        key = (experiment, method)
        if key not in self._untuned:
            self._untuned[key] = is_untuned_by_its_file(experiment, method)
        return self._untuned[key]

    def _run(self, experiment: str | None, config: RunConfig) -> RunConfig | None:
        """Return the run for which the preset was tuned."""
        key = f"{experiment} {config.method.name} {config.data}"
        if key not in self._runs:
            self._runs[key] = preset_run(experiment, config.method.name, config.data)
        return self._runs[key]


def _same_rates(config: RunConfig, own: RunConfig) -> bool:
    """Whether all rates equal those of `own`. The rate of the warm start counts only if both have a warm start."""

    def rates(run: RunConfig) -> tuple[float | None, ...]:
        both = config.method.warm_start_steps and own.method.warm_start_steps
        warm_start = run.warm_start_learning_rate if both else None
        return (run.optimizer.learning_rate, run.optimizer.embedding_learning_rate, warm_start)

    return rates(config) == rates(own)


def differences(config: RunConfig, own: RunConfig) -> list[str]:
    """List the differences between the settings of `config` and `own`, the run for which its preset was tuned."""
    return _described(_differing(config, own), spelled_out(config), spelled_out(own), "tuned at")


def _described(names: Sequence[str], here: dict[str, Any], there: dict[str, Any], other: str) -> list[str]:
    """Describe fields that differ: "trainer.total_steps=80, tuned at 600". `other` is the text before the value."""
    return [
        f"{'model' if name == 'model.name' else name}={shown(here[name])}, {other} {shown(there.get(name))}"
        for name in names
    ]


def _differing(config: RunConfig, own: RunConfig) -> list[str]:
    """Return the dotted names of the fields in which the settings of `config` and `own` differ."""
    here, there = spelled_out(config), spelled_out(own)
    names = [name for name in here if name.startswith(("model.", "data."))]
    names += ["optimizer.name", "trainer.sequences_per_step", "trainer.precision", "trainer.total_steps"]
    differ = [name for name in names if here[name] != there.get(name)]
    if "data.name" in differ:  # the other fields of a text follow from it
        differ = [name for name in differ if name in ("data.name", "data.vocab_size") or not name.startswith("data.")]
    if any(name.startswith("model.") and name != "model.name" for name in differ):
        if "model.name" in differ:  # the sizes follow from the name
            differ = ["model.name", *(name for name in differ if not name.startswith("model."))]
    else:
        differ = [name for name in differ if name != "model.name"]
    return differ


def remarks(configs: Iterable[RunConfig]) -> list[str]:
    """Return a launch's messages about untuned rates: one for each set of differences from the settings of presets."""
    found: dict[tuple[str, ...], dict[str, dict[str, None]]] = {}
    for config in configs:
        if config.rates.basis == "untuned":
            methods = found.setdefault(tuple(config.rates.differs), {}).setdefault(_values(config), {})
            methods[config.method.name] = None
    return [
        f"{NOT_TUNED}: {'; '.join(differs)}. This applies to the "
        + ", and to the ".join(f"{values} of {', '.join(methods)}" for values, methods in whose.items())
        for differs, whose in found.items()
    ]


def _values(config: RunConfig) -> str:
    """Name the values of a run that come from its preset and were not set by the user."""
    given = {text.partition("=")[0] for text in config.rates.given}
    names = ["learning rates"]
    if config.method.warm_start_steps and "method.warm_start_steps" not in given:
        names.append("warm start")
    if config.reset_interval_steps is not None and f"method.{config.method.restart_interval_field}" not in given:
        names.append("restarts")
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
