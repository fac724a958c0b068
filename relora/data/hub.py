"""Documents of a dataset on the hub, of a folder in the hub's layout, or of files at any address. Imports datasets.

The documents are streamed: memory is bounded, and nothing is read before it is needed. `datasets` finds the files and
the splits. A stream that breaks is opened again at the same document.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any, ClassVar

from relora.common.errors import first_line
from relora.config.data import HubConfig
from relora.data.decoding import CorpusError, Tally, Unfinished
from relora.data.json_stream import JsonStream, is_json
from relora.data.readers import TextField
from relora.data.source import SPLITS, Document, Source

SECONDS_TO_REACH = 5.0
"""A hub that does not answer within this time is not there."""
WAITS_SECONDS = (1.0, 5.0, 20.0)
"""Waits before a broken stream is opened again, one after the other, without a document between them. Before the
first document there is only one: the address may be wrong."""
CURSOR_DOCUMENTS = 64
"""A document after so many has a cursor."""


def go_offline_if_unreachable() -> bool:
    """Tell the hub's library to use only its cache if the hub does not answer. Return whether that is so.

    Without this, the library tries again for up to a minute. Proxies and HF_ENDPOINT are used as it uses them.
    """
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH)
        except Exception:  # the errors of several HTTP libraries
            os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
            constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _missing(split: str, files: Sequence[str]) -> str:
    """Say how many files of a split a copy lacks, by names such as c4-train.00000-of-01024.json.gz; empty if none."""
    totals = [int(found[1]) for name in files if (found := re.search(r"-of-(\d+)\b", Path(name).name))]
    total = max(totals, default=0)
    return f"note: the copy has {len(totals):,} of the {total:,} files of {split}" if len(totals) < total else ""


class HubSource(Source):
    """Streams the documents of data.dataset."""

    is_read_twice: ClassVar[bool] = False

    def __init__(self, config: HubConfig) -> None:
        """Remember the config. Nothing is read, and no network is used."""
        self.config = self.hub = config
        self._folder = Path(config.dataset) if Path(config.dataset).exists() else None
        self._names: dict[str, str] | None = None
        self._builder: Any = None
        """The `datasets` builder, which knows the files of each split; None before the first look-up."""
        self._share_read: Callable[[], float | None] = lambda: None
        self._knows_rows = False
        """Whether the card of the dataset says how many rows the split has."""
        self._revision = config.revision
        self._place = config.dataset
        """What `datasets` opens: a name on the hub, a folder, or the kind of `data.files`."""

    @property
    def identity(self) -> Any:
        """The paths, sizes and times of the files of a local folder. A dataset on the hub is known by its settings."""
        files: list[Path] = []
        if self._folder is not None and not self.hub.files:
            below = (path for path in self._folder.rglob("*") if path.is_file())
            shown = (path for path in below if not _is_hidden(path.relative_to(self._folder)))
            files = sorted(shown)
        for name in self.hub.files or ():
            if "://" not in name:
                found = sorted(glob(name, recursive=True))  # noqa: PTH207 -- Path.glob takes no absolute pattern
                files += map(Path, found)
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    @property
    def parts(self) -> tuple[str, ...]:
        """The splits that the dataset has itself."""
        return tuple(split for split in SPLITS if split in self._splits)

    def described(self) -> str:
        """Name the dataset, its splits, and where it is."""
        where = "of files" if self.hub.files else "in a folder" if self._folder else "on the hub"
        config = f", {self.hub.config}" if self.hub.config else ""
        names = (own if own == part else f"{own} for {part}" for part, own in self._splits.items())
        splits = f"splits {', '.join(names)}"
        revision = f" at revision {self._revision}" if self._revision else ""
        missing = [_missing(own, self._files(own)) for own in self._splits.values()] if self._is_local else []
        return "; ".join([f"{self.hub.dataset}{config}{revision}, a dataset {where}", splits, *filter(None, missing)])

    def documents(self, part: str, tally: Tally, cursor: Any = None) -> Iterator[Document]:
        """Yield the documents of a split, from a state of its stream on."""
        field = TextField(f"the {self._splits[part]} split of {self.hub.dataset}", self.config.text_field, tally)
        field.records, field.without = tally.records, tally.null  # of the documents before the cursor
        since_cursor, split = 0, self._splits[part]
        self._share_read, self._knows_rows = lambda: None, False
        info = (self._builder.info.splits or {}).get(split)
        if info is not None and info.num_examples:
            self._share_read, self._knows_rows = lambda: tally.records / info.num_examples, True
        for state, record in self._records(split, tally, cursor):
            counts = asdict(tally) if since_cursor == 0 else {}
            text = field.text(f"record {field.records + 1}", record)
            if text:
                yield Document(chunks=(text,), cursor=state if since_cursor == 0 else None, counts=counts)
                since_cursor = (since_cursor + 1) % CURSOR_DOCUMENTS
        field.check()

    def share_read(self) -> float | None:
        """Return the share of the documents that are read. The card of a dataset may say how many there are."""
        return self._share_read()

    def pinned(self) -> Any:
        """Return the revision that is read."""
        return self._revision

    def pin(self, state: Any) -> None:
        """Read the revision that an earlier process has read."""
        if state is not None and state != self._revision:
            self._revision, self._names, self._builder, self._place = state, None, None, self.hub.dataset

    def provenance(self) -> dict[str, Any]:
        """Name the dataset, its revision, and its splits."""
        named = {"dataset": self.hub.dataset, "config": self.hub.config, "files": self.hub.files}
        return {**named, "revision": self._revision, "splits": self._splits}

    # ------------------------------------------------------------------------------------------------------- streams

    def _records(self, split: str, tally: Tally, state: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (state of the stream before the record, the record)."""
        failures, waits = 0, WAITS_SECONDS[:1]
        while True:
            try:
                stream = self._opened(split, tally)
                if state is not None:
                    stream.load_state_dict(state)
                rows = iter(stream)
                state = stream.state_dict()
                while (row := next(rows, None)) is not None:
                    before, state = state, stream.state_dict()
                    failures, waits = 0, WAITS_SECONDS
                    yield before, row
                return
            except (CorpusError, GeneratorExit):
                raise
            except Exception as error:  # datasets and the HTTP libraries below it raise errors of many classes
                if self._is_local or failures == len(waits):
                    raise self._broken(error) from error
                time.sleep(waits[failures])
                failures += 1

    @property
    def _is_local(self) -> bool:
        if self.hub.files:
            return not any("://" in name for name in self.hub.files)
        return Path(self._place).exists()

    def _broken(self, error: Exception) -> CorpusError:
        what = f"data.dataset={self.hub.dataset} cannot be read: {first_line(error)}"
        if self._is_local:
            return CorpusError(
                f"{what}; correct or replace its files, or read files with data=text data.path=..., which needs only "
                "the text of each record"
            )
        return Unfinished(f"{what}; the same command goes on from here when the network is back")

    def _opened(self, split: str, tally: Tally) -> Any:
        """Open the stream of a split. relora reads JSON itself, because only the text field has to have one type."""
        from datasets.packaged_modules.json.json import Json

        files = self._files(split)
        if not (
            isinstance(self._builder, Json) and is_json(files) and getattr(self._builder.config, "field", None) is None
        ):
            return self._builder.as_streaming_dataset(split=split)
        stream = JsonStream(files, tally)
        if not self._knows_rows:
            self._share_read = lambda: stream.share_read
        return stream

    def _files(self, split: str) -> list[str]:
        """The paths or addresses of the files of a split."""
        self._look_up()
        return list((self._builder.config.data_files or {}).get(split, ()))

    def _arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {"path": self._place, "name": self.hub.config, "revision": self._revision_to_open}
        if self.hub.files:
            found["data_files"] = {self.hub.split: self.hub.files}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def _revision_to_open(self) -> str | None:
        """The revision of a dataset on the hub. A folder, also in the cache, has the files of one revision."""
        return None if Path(self._place).exists() or self.hub.files else self._revision

    @property
    def _splits(self) -> dict[str, str]:
        """Split of the corpus -> split of the dataset. The first call looks the dataset up."""
        self._look_up()
        assert self._names is not None
        return self._names

    def _look_up(self) -> None:
        """Find the dataset's revision, its files and its splits. Raises CorpusError if it cannot be found."""
        if self._names is not None:
            return
        config = self.hub
        self.check_reachable()
        import datasets

        try:
            if self._place == config.dataset and self._folder is None and not config.files:
                from huggingface_hub import HfApi

                self._revision = HfApi().dataset_info(config.dataset, revision=self._revision).sha
            self._builder = datasets.load_dataset_builder(**self._arguments())
            names = list(self._builder.config.data_files or ())
        except Exception as error:  # datasets and the hub's library raise errors of many classes
            raise CorpusError(f"data.dataset={config.dataset} cannot be opened: {first_line(error)}") from error
        wanted = {"train": config.split, "validation": config.validation_split, "test": config.test_split}
        found = {part: part if name == "auto" else name for part, name in wanted.items() if name is not None}
        for part, name in list(found.items()):
            if name not in names and wanted[part] == "auto":
                del found[part]
            elif name not in names:
                raise CorpusError(
                    f"data.dataset={config.dataset} has no split {name}; it has {', '.join(names)}; set data."
                    f"{'split' if part == 'train' else f'{part}_split'} to one of them"
                )
        self._names = {part: name for part, name in found.items() if part == "train" or name != found["train"]}

    def check_reachable(self) -> None:
        """If the hub cannot be reached, read the copy in its cache. Raises CorpusError without such a copy."""
        if self._folder is None and not self.hub.files and go_offline_if_unreachable():
            self._place = self._cached()

    def _cached(self) -> str:
        """Return the folder of the dataset in the hub's cache. Raises CorpusError if there is no copy."""
        from huggingface_hub import snapshot_download

        name = self.hub.dataset
        try:
            folder = snapshot_download(name, repo_type="dataset", revision=self._revision, local_files_only=True)
            self._revision = Path(folder).name
            return folder
        except Exception as error:  # also for a name that no dataset can have
            raise CorpusError(
                f"data.dataset={name}: the hub cannot be reached from this machine, and HF_HOME has no copy of the "
                "dataset. Set data.dataset to a folder with a copy, or data.files to copies of its files; or set "
                "HF_HOME to a cache that has one; or run "
                "relora data prepare with the same settings on a machine with a network, and copy the folder that it "
                "names into runs_dir/corpora"
            ) from error
