"""The settings of the data group: where the text comes from, its tokenizer, its splits and its sequences.

Each source is a class with its own keys. `data.name` chooses it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from relora.common.checks import at_least, at_most, one_of
from relora.common.errors import ConfigError, shown
from relora.config.groups import LARGEST_MODEL
from relora.config.sources import check_path

HELD_OUT = ("validation", "test")
LARGEST_FRACTION = 0.4
PACKINGS = ("packed", "pad")
SEQUENCE_KEYS = ("sequence_length_tokens", "packing", "attend_across_documents")
"""The keys that choose how a prepared corpus is cut into sequences. They do not change the corpus."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What all sources have.

    name: The source: a key of SOURCES.
    path: A file or folder, for the sources that have files.
    text_field: The field or column with the text, in files of records.
    tokenizer: A tokenizer.json or its folder. None trains a byte-level BPE of `vocab_size` on the training split.
    packing: "packed" cuts the text of all documents into sequences. "pad" makes a sequence of each document.
    attend_across_documents: Whether the attention of a packed sequence covers all its documents, or only the own one.
    validation_fraction, test_fraction: The shares of the training text that are held out, for each split that the
        source does not have itself.
    """

    has_path: ClassVar[bool] = False

    name: str
    path: str | None = None
    text_field: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 2048
    sequence_length_tokens: int = 128
    packing: str = "packed"
    attend_across_documents: bool = True
    validation_fraction: float = 0.01
    test_fraction: float = 0.02

    def __post_init__(self) -> None:
        self.check_path()
        at_least("data.vocab_size", self.vocab_size, 257, " (256 bytes and the end-of-text token)")
        at_most("data.vocab_size", self.vocab_size, LARGEST_MODEL["vocab_size"], "no tokenizer is that large")
        at_least("data.sequence_length_tokens", self.sequence_length_tokens, 2)
        at_most("data.sequence_length_tokens", self.sequence_length_tokens, 2**31 - 1, "no model accepts that many")
        one_of("data.packing", self.packing, PACKINGS)
        if self.packing == "pad" and not self.attend_across_documents:
            raise ConfigError(
                "data.attend_across_documents=false has no meaning with data.packing=pad, where a sequence has one "
                "document; set it to true"
            )
        for split in HELD_OUT:
            value = getattr(self, f"{split}_fraction")
            if not 0.0 < value <= LARGEST_FRACTION:
                raise ConfigError(
                    f"data.{split}_fraction={shown(value)} must be above 0 and at most {LARGEST_FRACTION}"
                )

    def check_path(self) -> None:
        """Raise ConfigError if the source needs a path and has none, or the other way round."""
        if self.has_path and not self.path:
            raise ConfigError(f"data={self.name} needs data.path=FILE_OR_FOLDER")
        if not self.has_path and self.path:
            raise ConfigError(f"data.path={shown(self.path)} has no meaning with data={self.name}; use data=text")

    def paths(self) -> dict[str, str]:
        """Return the paths of the config by key: files and folders of this machine."""
        found = {"path": self.path, "tokenizer": self.tokenizer}
        return {key: value for key, value in found.items() if value is not None}

    def check_files(self) -> None:
        """Raise ConfigError if a file of the config is missing or unreadable. Only a launch calls this."""
        for key, value in self.paths().items():
            try:
                self.check_file(key, value)
            except OSError as error:  # the path is too long, or this user has no permission
                raise ConfigError(f"data.{key}={shown(value, 150)} cannot be read: {error.strerror}") from error

    def check_file(self, key: str, value: str) -> None:
        """Raise ConfigError if the file or folder of one key cannot be used. May raise OSError."""
        if key == "tokenizer" and not tokenizer_file(value).is_file():
            raise ConfigError(f"data.tokenizer={shown(value, 200)} has no tokenizer.json")
        if key == "path":
            check_path(Path(value))


@dataclass(kw_only=True, slots=True)
class StdlibConfig(DataConfig):
    """The sources of the Python standard library. `path` and `text_field` have no meaning."""


@dataclass(kw_only=True, slots=True)
class TextConfig(DataConfig):
    """The user's files."""

    has_path: ClassVar[bool] = True


SOURCES: dict[str, type[DataConfig]] = {"stdlib": StdlibConfig, "text": TextConfig}


def source_class(name: object) -> type[DataConfig]:
    """Return the class of a source's settings. Raises ConfigError for an unknown name."""
    one_of("data.name", str(name), tuple(SOURCES))
    return SOURCES[str(name)]


def data_config(values: dict[str, Any]) -> DataConfig:
    """Return the settings with these values. `values["name"]` is the source."""
    return source_class(values.get("name"))(**values)


def tokenizer_file(tokenizer: str) -> Path:
    """Return the path of tokenizer.json in a folder. For a file, return the file itself."""
    path = Path(tokenizer)
    return path / "tokenizer.json" if path.is_dir() else path
