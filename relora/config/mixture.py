"""The settings of a mixture of sources, and the table of all sources."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from relora.common.checks import check_name, one_of, positive
from relora.common.errors import ConfigError, shown
from relora.config.data import (
    SEQUENCE_KEYS,
    DataConfig,
    HubConfig,
    StdlibConfig,
    TextConfig,
    TokensConfig,
)

MIXTURE_CYCLE = 1000
"""Of so many training sequences in a row, each source of a mixture has the same number."""


@dataclass(kw_only=True, slots=True)
class MixtureConfig(DataConfig):
    """Several sources, mixed by sequences. The tokenizer is that of all of them.

    sources: Name -> the settings of a source, as in its own group: {name: text, path: my_texts}.
    weights: Name -> the share of the training sequences. Only the ratios matter.
    """

    sources: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super(MixtureConfig, self).__post_init__()
        if len(self.sources) < 2:
            example = "'data.sources={a:{name:stdlib},b:{name:text,path:my_texts}}' 'data.weights={a:0.3,b:0.7}'"
            raise ConfigError(f"data=mixture needs at least two sources; write {example}")
        if set(self.sources) != set(self.weights):
            raise ConfigError(
                f"data.weights has {', '.join(self.weights) or 'no source'}, and data.sources has "
                f"{', '.join(self.sources)}; give each source one weight"
            )
        for name, weight in self.weights.items():
            check_name("data.sources", name)
            positive(f"data.weights.{name}", weight)
        self.parts()
        self.shares()

    def parts(self) -> dict[str, DataConfig]:
        """Return the settings of each source, with the tokenizer and the length of the mixture. Raises ConfigError."""
        given = {"tokenizer": self.tokenizer, "vocab_size": self.vocab_size}
        given["sequence_length_tokens"] = self.sequence_length_tokens
        found: dict[str, DataConfig] = {}
        for name, values in self.sources.items():
            if not isinstance(values, dict):
                raise ConfigError(f"data.sources.{name}={shown(values)} is no source; write {{name: text, path: ...}}")
            if values.get("name") == self.name:
                raise ConfigError(f"data.sources.{name} is a mixture; name its sources here instead")
            for key in (*given, *SEQUENCE_KEYS):
                if key in values and values[key] != getattr(self, key):
                    raise ConfigError(f"data.sources.{name}.{key} has no meaning; set data.{key} for all sources")
            kind = source_class(values.get("name"))
            known = {each.name for each in dataclasses.fields(kind)}
            if unknown := sorted(set(values) - known):
                raise ConfigError(f"unknown key data.sources.{name}.{unknown[0]}; it has {', '.join(sorted(known))}")
            try:
                found[name] = kind(**{**values, **given})
            except TypeError as error:  # a value of another type
                raise ConfigError(f"data.sources.{name} has a value of the wrong type: {shown(error, 120)}") from error
            except ConfigError as error:
                raise ConfigError(f"data.sources.{name}: {error}") from error
            if isinstance(found[name], TokensConfig) and self.tokenizer is None:
                raise ConfigError(f"data.sources.{name} has token ids; set data.tokenizer to their tokenizer")
        return found

    def shares(self) -> dict[str, int]:
        """Return how many of MIXTURE_CYCLE sequences in a row are of each source. Raises ConfigError.

        The shares are rounded to whole numbers, those with the largest remainders up.
        """
        total = sum(self.weights.values())
        exact = {name: MIXTURE_CYCLE * self.weights[name] / total for name in self.sources}
        found = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: found[name] - exact[name])
        for name in by_remainder[: MIXTURE_CYCLE - sum(found.values())]:
            found[name] += 1
        for name, count in found.items():
            if count == 0:
                raise ConfigError(
                    f"data.weights.{name}={self.weights[name]} is less than 1/{MIXTURE_CYCLE} of all weights; leave "
                    "the source out, or give it more"
                )
        return found

    def written_out(self) -> dict[str, Any]:
        """Return the fields whose values have a normal form: all settings of each source, and the shares."""
        sources: dict[str, Any] = {}
        for name, part in self.parts().items():
            unused = {*part.without_effect(), "tokenizer", "vocab_size", "sequence_length_tokens"}
            values = {**dataclasses.asdict(part), **part.written_out()}
            sources[name] = {key: value for key, value in values.items() if key not in unused}
        return {"sources": sources, "weights": self.shares()}

    def without_effect(self) -> tuple[str, ...]:
        """Return the fields that change nothing with the values of the others. Each source has its own."""
        of_sources = ("text_field", "validation_fraction", "test_fraction", "limit_tokens", "held_out_tokens")
        return (*of_sources, *super(MixtureConfig, self).without_effect())

    def make_absolute(self) -> None:
        """Replace the relative paths of all sources by absolute ones."""
        for name, part in self.parts().items():
            part.make_absolute()
            own = part.paths()
            self.tokenizer = own.pop("tokenizer", self.tokenizer)
            self.sources[name] = {**self.sources[name], **own}

    def paths(self) -> dict[str, str]:
        """Return the paths of all sources."""
        found = super(MixtureConfig, self).paths()
        for name, part in self.parts().items():
            own = {key: value for key, value in part.paths().items() if key != "tokenizer"}
            found |= {f"sources.{name}.{key}": value for key, value in own.items()}
        return found

    def check_files(self) -> None:
        """Raise ConfigError if a file of a source is missing or unreadable. Only a launch calls this."""
        for name, part in self.parts().items():
            try:
                part.check_files()
            except ConfigError as error:
                raise ConfigError(f"data.sources.{name}: {error}") from error


SOURCES: dict[str, type[DataConfig]] = {
    "stdlib": StdlibConfig,
    "text": TextConfig,
    "hub": HubConfig,
    "tokens": TokensConfig,
    "mixture": MixtureConfig,
}


def source_class(name: object) -> type[DataConfig]:
    """Return the class of a source's settings. Raises ConfigError for an unknown name."""
    one_of("data.name", str(name), tuple(SOURCES))
    return SOURCES[str(name)]


def data_config(values: dict[str, Any]) -> DataConfig:
    """Return the settings with these values. `values["name"]` is the source."""
    return source_class(values.get("name"))(**values)
