"""The disk space of prepared corpora, and preparations that stopped and that nobody goes on with."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from relora.common.files import is_locked, size_bytes

STOPPED_SECONDS = 24 * 3600.0
"""A preparation that stopped less than this time ago may still go on."""
BUSY = "kept: it is being prepared now"
PARTIAL = ".partial"
"""Ending of the folder in which a corpus is prepared (relora.data.corpus)."""
STATE = "state.json"
"""The file there from which a preparation goes on (relora.data.building)."""


@dataclass(kw_only=True)
class CorpusCost:
    """The disk space of a prepared corpus, or of a preparation that stopped. `why` is why it is deletable or kept."""

    folder: Path
    corpus_bytes: int
    deletable: list[Path] = field(default_factory=list)
    deletable_bytes: int = 0
    why: str = "kept: prepared; runs and relora evaluate read it"
    deleted_bytes: int = 0

    @property
    def lock_file(self) -> Path:
        """The lock that a preparation holds."""
        return self.folder.with_name(f"{self.folder.name.removesuffix(PARTIAL)}.lock")


def corpora_of(runs_dir: Path) -> list[CorpusCost]:
    """List the prepared corpora, and the folders of preparations that are not complete."""
    found: list[CorpusCost] = []
    for folder in sorted((runs_dir / "corpora").glob("*")):
        if not folder.is_dir() or not (folder.name.endswith(PARTIAL) or (folder / "meta.json").exists()):
            continue
        cost = CorpusCost(folder=folder, corpus_bytes=size_bytes(folder))
        if folder.is_symlink():
            cost.why = f"left alone: it is a link to {folder.readlink()}, and nothing is deleted through links"
        elif folder.name.endswith(PARTIAL):
            _judge_partial(cost)
        found.append(cost)
    return found


def _judge_partial(cost: CorpusCost) -> None:
    try:
        is_busy = is_locked(cost.lock_file)
        seconds = idle_seconds(cost.folder)
    except OSError as error:
        cost.why = f"left alone: it cannot be read ({error})"
        return
    if is_busy:
        cost.why = BUSY
    elif seconds < STOPPED_SECONDS:
        cost.why = "kept: its preparation stopped less than a day ago, and the same command goes on with it"
    else:
        cost.why = "its preparation stopped more than a day ago"
        cost.deletable, cost.deletable_bytes = [cost.folder], cost.corpus_bytes


def idle_seconds(folder: Path) -> float:
    """Return the seconds since the last change of a folder or of a file in it."""
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
