"""The settings of the data group: where the text comes from, its tokenizer, its splits and its sequences.

Each source is a class with its own keys. `data.name` chooses it.
"""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from relora.common.checks import at_least, at_most, one_of, parse_count
from relora.common.errors import ConfigError, shown
from relora.config.groups import LARGEST_MODEL
from relora.config.sources import TOKEN_KINDS, check_path

HELD_OUT = ("validation", "test")
LIMITS = ("limit_tokens", "held_out_tokens")
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
    tokenizer: A tokenizer.json, a folder with a tokenizer, or its name on the hub. None trains a byte-level BPE of
        `vocab_size` on the training split.
    limit_tokens, held_out_tokens: The training split, and each held-out split, ends with the document that reaches so
        many tokens.
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
    limit_tokens: Any = None
    held_out_tokens: Any = None

    def __post_init__(self) -> None:
        self.check_path()
        for name in LIMITS:
            self.limit(name)
        self.check_vocab_size()
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

    def check_vocab_size(self) -> None:
        """Raise ConfigError if a byte-level BPE cannot have so few tokens."""
        at_least("data.vocab_size", self.vocab_size, 257, " (256 bytes and the end-of-text token)")

    def source_words(self) -> str:
        """Name the source as a user writes it: data=text data.path=..."""
        values = {key: value for key, value in self.paths().items() if key != "tokenizer"}
        return " ".join([f"data={self.name}", *(f"data.{key}={value}" for key, value in values.items())])

    def limit(self, name: str) -> int | None:
        """Return the value of limit_tokens or held_out_tokens as a number; None for no limit. Raises ConfigError."""
        value = getattr(self, name)
        return None if value is None else parse_count(f"data.{name}", value)

    def without_effect(self) -> tuple[str, ...]:
        """Return the fields that change nothing with the values of the others."""
        return () if self.tokenizer is None else ("vocab_size",)

    def written_out(self) -> dict[str, Any]:
        """Return the fields whose values have a normal form, in that form. Two forms of a value are one run."""
        return {name: self.limit(name) for name in LIMITS if self.limit(name) is not None}

    def make_absolute(self) -> None:
        """Replace relative paths by absolute ones."""
        for key, value in own_paths(self, *self.paths()).items():
            setattr(self, key, str(Path(value).expanduser().absolute()))

    def paths(self) -> dict[str, str]:
        """Return the paths of the config by key: files and folders of this machine."""
        own = () if self.tokenizer is None or not is_local(self.tokenizer) else ("tokenizer",)
        return own_paths(self, "path", *own)

    def check_files(self) -> None:
        """Raise ConfigError if a file of the config is missing or unreadable. Only a launch calls this."""
        for key, value in self.paths().items():
            try:
                self.check_file(key, value)
            except OSError as error:  # the path is too long, or this user has no permission
                within = f" ({error.filename})" if error.filename not in (None, value) else ""
                raise ConfigError(f"data.{key}={shown(value, 150)} cannot be read{within}: {error.strerror}") from error

    def check_file(self, key: str, value: str) -> None:
        """Raise ConfigError if the file or folder of one key cannot be used. May raise OSError."""
        if key == "tokenizer" and not tokenizer_file(value).is_file() and not Path(value).is_dir():
            raise ConfigError(f"data.tokenizer={shown(value, 200)} has no tokenizer.json")
        if key.endswith("path"):
            check_path(Path(value), f"data.{key}")


@dataclass(kw_only=True, slots=True)
class StdlibConfig(DataConfig):
    """The sources of the Python standard library. `path` and `text_field` have no meaning."""

    def without_effect(self) -> tuple[str, ...]:
        """Return the fields that change nothing with the values of the others."""
        return ("text_field", *super(StdlibConfig, self).without_effect())


@dataclass(kw_only=True, slots=True)
class FilesConfig(DataConfig):
    """The user's files, of any kind.

    validation_path, test_path: The user's own held-out files. If only one of them is given, the other split is half of
        the validation files, or is taken from the training text.
    """

    has_path: ClassVar[bool] = True

    validation_path: str | None = None
    test_path: str | None = None

    def paths(self) -> dict[str, str]:
        """Return the paths of the config by key: files and folders of this machine."""
        return super(FilesConfig, self).paths() | own_paths(self, "validation_path", "test_path")


@dataclass(kw_only=True, slots=True)
class TextConfig(FilesConfig):
    """Files of text."""


@dataclass(kw_only=True, slots=True)
class HubConfig(DataConfig):
    """A dataset on the hub, a folder in the hub's layout, or files at any address; streamed.

    dataset: OWNER/NAME on the hub, or a folder. With `files`, the kind of the files: json, csv, parquet, text, ...
    config: The dataset's configuration, such as "en"; None for its default.
    revision: A branch, tag or commit of the dataset; None for the newest.
    split: The dataset's split for training.
    validation_split, test_split: The dataset's own splits. "auto" means the split of that name, if there is one. None
        means that the split is taken from the training split.
    files: Paths or URLs of files for training.
    """

    dataset: str = "???"
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = "auto"
    test_split: str | None = "auto"
    files: list[str] | None = None

    def __post_init__(self) -> None:
        super(HubConfig, self).__post_init__()
        if self.dataset == "???":
            raise ConfigError(f"data={self.name} needs data.dataset=OWNER/NAME, or a folder")
        if self.files is not None and not self.files:
            raise ConfigError("data.files is empty; name files or URLs, or leave it null")
        validation = "validation" if self.validation_split == "auto" else self.validation_split
        if validation is not None and validation == ("test" if self.test_split == "auto" else self.test_split):
            raise ConfigError(
                f"data.test_split={shown(self.test_split)} is the validation split too; leave it auto, and half of it "
                "is for the test, or set data.validation_split=null"
            )

    def source_words(self) -> str:
        """Name the source as a user writes it: data=hub data.dataset=..."""
        names = ("dataset", "config", "split", "revision", "files")
        values = {name: getattr(self, name) for name in names}
        return " ".join(["data=hub", *(f"data.{name}={value}" for name, value in values.items() if value is not None)])

    def make_absolute(self) -> None:
        """Replace relative paths by absolute ones, also in `files`."""
        super(HubConfig, self).make_absolute()
        if self.files is not None:
            self.files = [name if "://" in name else str(Path(name).expanduser().absolute()) for name in self.files]

    def check_files(self) -> None:
        """Raise ConfigError if a file of the config is missing or unreadable. Only a launch calls this."""
        super(HubConfig, self).check_files()
        for name in self.files or ():
            # Path.glob takes no absolute pattern.
            if "://" not in name and not glob.glob(name, recursive=True):  # noqa: PTH207
                raise ConfigError(f"data.files has {shown(name, 200)}, and there is no such file")

    def paths(self) -> dict[str, str]:
        """Return the paths of the config by key: files and folders of this machine."""
        local = own_paths(self, "dataset") if Path(self.dataset).exists() else {}
        return super(HubConfig, self).paths() | local

    def check_file(self, key: str, value: str) -> None:
        """Raise ConfigError if the file or folder of one key cannot be used. May raise OSError."""
        if key != "dataset":
            super(HubConfig, self).check_file(key, value)


@dataclass(kw_only=True, slots=True)
class TokensConfig(FilesConfig):
    """Files of token ids.

    tokens_field: The column with the ids, in files of rows.
    token_type: The type of the ids in raw files (.bin).
    tokenizer: The tokenizer of the ids. It gives the vocabulary, and lets the model write text. Without it,
        `vocab_size` and `end_of_text_id` give the vocabulary.
    """

    tokens_field: str = "input_ids"
    token_type: str = "uint16"
    end_of_text_id: int = 50256

    def __post_init__(self) -> None:
        super(TokensConfig, self).__post_init__()
        one_of("data.token_type", self.token_type, ("uint16", "uint32"))
        at_least("data.end_of_text_id", self.end_of_text_id, 0)
        if self.tokenizer is None and self.end_of_text_id >= self.vocab_size:
            raise ConfigError(
                f"data.end_of_text_id={self.end_of_text_id} is not below data.vocab_size={self.vocab_size}; set both "
                "to those of the files' tokenizer, or set data.tokenizer"
            )

    def check_vocab_size(self) -> None:
        """Raise ConfigError for less than two ids. A small vocabulary is accepted: no tokenizer is trained."""
        at_least("data.vocab_size", self.vocab_size, 2)

    def without_effect(self) -> tuple[str, ...]:
        """Return the fields that change nothing with the values of the others."""
        of_tokenizer = () if self.tokenizer is None else ("end_of_text_id",)
        return ("text_field", *of_tokenizer, *super(TokensConfig, self).without_effect())

    def check_file(self, key: str, value: str) -> None:
        """Raise ConfigError if the file or folder of one key cannot be used. May raise OSError."""
        if key.endswith("path"):
            check_path(Path(value), f"data.{key}", TOKEN_KINDS)
        else:
            super(TokensConfig, self).check_file(key, value)


def own_paths(config: DataConfig, *keys: str) -> dict[str, str]:
    """Return the values of these keys, without those that are None."""
    return {key: getattr(config, key) for key in keys if getattr(config, key) is not None}


def is_local(tokenizer: str) -> bool:
    """Return whether a tokenizer is a file or folder of this machine, and not a name on the hub.

    A name on the hub is NAME or OWNER/NAME.
    """
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", tokenizer) is None or Path(tokenizer).exists()


def tokenizer_file(tokenizer: str) -> Path:
    """Return the path of tokenizer.json in a folder. For a file, return the file itself."""
    path = Path(tokenizer)
    return path / "tokenizer.json" if path.is_dir() else path
