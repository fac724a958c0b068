"""The code that runs: its files, their hash and the commit they come from; and snapshots of it, from which jobs import.

A snapshot is a folder runs_dir/code/HASH with the package, what lies beside it in a checkout, and the packages of
plug-ins. A job that imports from there runs the code that was submitted, whatever happens to the checkout later.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from relora.common.errors import RunError
from relora.common.files import publishing, read_json, reason, write_json
from relora.config.choices import home

if TYPE_CHECKING:
    from relora.config.run import RunConfig

FOLDER = "code"
"""The folder of the snapshots in runs_dir, and of the changes in a run's folder."""
RECORD, CHANGES = "code.json", "code.diff"
"""What a snapshot knows about its origin: the commits, and the changes since then."""

HASH_DIGITS = 12
BESIDE = ("conf", "experiments", "sweeps")
"""Folders that a checkout has beside the package. An installed package has them inside."""
MOST_NEW_BYTES = 2**20
"""A new file above this size is named in the changes, and its text is left out."""
GIT_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code of this process, or of the runs that it submits."""

    content_hash: str
    """Of the names and bytes of all files. It depends on no commit and no folder."""
    commit: str | None
    """The commit of relora's checkout, with "-dirty" if it has changes; None outside a checkout."""
    changes: str
    """What differs from the commits, as a patch; empty without changes and outside checkouts."""


def modules_of(configs: Iterable["RunConfig"]) -> list[str]:
    """Return the top-level modules of the code that runs use: relora, and those of the plug-ins that they chose."""
    chosen = {type(part).__module__.partition(".")[0] for each in configs for part in (each.method, each.optimizer)}
    return ["relora", *sorted(chosen - {"relora"})]


def code_of(modules: Sequence[str]) -> Code:
    """Return the code of `modules` as it is now. In a snapshot, it is what the snapshot's record says.

    Raises RunError if a module has no files.
    """
    places = _places(modules)
    snapshot = places["relora"].parent
    if (snapshot / RECORD).is_file():
        record = read_json(snapshot / RECORD)
        return Code(
            content_hash=record["hash"],
            commit=record["commit"],
            changes=(snapshot / CHANGES).read_text(errors="replace"),
        )
    return Code(
        content_hash=_hash_of(places),
        commit=commit_of(places["relora"]),
        changes="".join(_changes_at(folder) for folder in _checkouts(places)),
    )


def take(modules: Sequence[str], runs_dir: Path) -> Path:
    """Copy the code of `modules` into runs_dir/code/HASH, unless it is there, and return that folder.

    Raises:
        RunError: A module has no files, or a file cannot be read.
        OSError: The snapshot cannot be written.
    """
    code, places = code_of(modules), _places(modules)
    folder = runs_dir / FOLDER / code.content_hash
    if (folder / RECORD).is_file():
        os.utime(folder / RECORD)  # relora clean keeps what was used a moment ago
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with publishing(folder) as temporary:
        # With the modification times, Python's caches of the files stay valid: no job compiles them again.
        for name, file in _files(places, with_caches=True):
            copy = temporary / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy2(file, copy)
            except OSError as error:
                raise RunError(f"the code snapshot misses {file}: {reason(error)}") from error
        (temporary / CHANGES).write_text(code.changes)
        origins = {name: os.fspath(place) for name, place in places.items()}
        write_json(temporary / RECORD, {"hash": code.content_hash, "commit": code.commit, "copied_from": origins})
    return folder


def shell_lines(snapshot: Path) -> list[str]:
    """Return lines of a job's shell script that let Python import from `snapshot` first.

    Without PYTHONSAFEPATH, `python -m` would import from the working directory, which may be the checkout.
    """
    import shlex

    return [f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(os.fspath(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}"]


# --------------------------------------------------------------------------------------------------------- its files


def _places(modules: Sequence[str]) -> dict[str, Path]:
    """Return the folder or file of each module, and of what lies beside relora in a checkout, by name."""
    found: dict[str, Path] = {}
    for module in modules:
        spec = importlib.util.find_spec(module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders and (spec is None or not spec.has_location):
            raise RunError(f"the code of {module} is not in files, so no snapshot of it can be made")
        place = Path(folders[0] if folders else str(spec and spec.origin)).resolve()
        found[place.name] = place
    beside = home()
    if beside != found["relora"]:
        found |= {name: beside / name for name in BESIDE}
    return found


def _files(places: dict[str, Path], *, with_caches: bool = False) -> Iterator[tuple[str, Path]]:
    """Yield the name in a snapshot and the path of every file, sorted by name; `with_caches` also those of Python."""
    for name, place in sorted(places.items()):
        if place.is_file():
            yield name, place
            continue
        for file in sorted(place.rglob("*")):
            inner = file.relative_to(place)
            is_cache = file.suffix == ".pyc"
            if file.is_file() and ".git" not in inner.parts and (with_caches or not is_cache):
                yield f"{name}/{inner.as_posix()}", file


def _hash_of(places: dict[str, Path]) -> str:
    whole = hashlib.sha256()
    for name, file in _files(places):
        content = file.read_bytes()
        whole.update(f"{name}\0{len(content)}\0".encode())
        whole.update(content)
    return whole.hexdigest()[:HASH_DIGITS]


# ----------------------------------------------------------------------------------------------------------- its git


def commit_of(place: Path) -> str | None:
    """Return the commit of the checkout with `place`, with "-dirty" if it has changes; None outside a checkout."""
    shown = _git(place, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None if shown is None else shown.strip()


def _checkouts(places: dict[str, Path]) -> list[Path]:
    """Return the places that are in a checkout of git, and tracked there."""
    return [place for place in places.values() if _git(place, "ls-files", "--error-unmatch", place.name, up=True)]


def _changes_at(place: Path) -> str:
    """Return the changes at `place` since its commit as a patch: of tracked files, and of new files that are not
    ignored."""
    changed = _git(place, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", place.name, up=True) or ""
    listed = _git(place, "ls-files", "--others", "--exclude-standard", "-z", "--", place.name, up=True) or ""
    for name in filter(None, listed.split("\0")):
        file = place.parent / name
        if file.stat().st_size > MOST_NEW_BYTES:
            changed += f"# new file, {file.stat().st_size:,} bytes, not shown: {name}\n"
        else:
            changed += _git(place, "diff", "--no-color", "--no-index", "--", os.devnull, name, up=True) or ""
    return changed


def _git(place: Path, *arguments: str, up: bool = False) -> str | None:
    """Return what a git command prints in the folder of `place`; None if it fails or there is no git.

    Args:
        place: A folder or a file.
        *arguments: The command.
        up: Run it in the folder that has `place`.
    """
    folder = place.parent if up or place.is_file() else place
    try:
        done = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    differs = "--no-index" in arguments and done.returncode == 1  # the exit code of a difference
    return done.stdout if done.returncode == 0 or differs else None
