"""Runs of a study that its last launch does not want any more."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from relora.common.errors import ConfigError, DamagedFile, RunError
from relora.common.tables import some_of
from relora.config import frozen
from relora.runs.rundir import RunDir, write_json
from relora.studies.manifest import manifest_of, studies, study_dir
from relora.studies.study import Planned


@dataclass(frozen=True, kw_only=True)
class Unwanted:
    """Runs of earlier launches of a study that a launch does not name."""

    names: list[str]
    elsewhere: list[str]
    """Those of them that another study has. They stay there."""

    @property
    def nowhere(self) -> list[str]:
        """Those that no other study has."""
        return [name for name in self.names if name not in self.elsewhere]

    def told(self, study: str) -> str:
        """Return a note for the user about them."""
        return (
            f"study {study} also has {len(self.names)} runs of earlier launches that this one does not want: "
            f"{some_of(self.names)}; they stay in it, and --prune takes them out and cancels those under way"
        )


def unwanted(runs_dir: Path, study: str, wanted: Collection[str]) -> Unwanted:
    """Return the runs of a study that are not in `wanted`. There are none if the study was never launched."""
    if study not in studies(runs_dir):
        return Unwanted(names=[], elsewhere=[])
    names = [name for name in _runs_of(runs_dir, study) if name not in wanted]
    others = [other for other in studies(runs_dir) if other != study] if names else []
    shared = {name for other in others for name in _runs_of(runs_dir, other)}
    return Unwanted(names=names, elsewhere=[name for name in names if name in shared])


def _runs_of(runs_dir: Path, study: str) -> list[str]:
    try:
        return list(manifest_of(runs_dir, study)["runs"])
    except DamagedFile:
        return []


def existing(runs_dir: Path, names: Sequence[str]) -> list[Planned]:
    """Return the runs with these names whose config can be read."""
    found: list[Planned] = []
    for name in names:
        try:
            found.append(Planned(config=frozen.read_frozen(runs_dir / name / "config.yaml"), role="arm"))
        except (ConfigError, DamagedFile):  # the folder was removed or is damaged
            continue
    return found


def take_out(runs_dir: Path, study: str, names: Collection[str], found: Sequence[Planned]) -> None:
    """Take runs out of a study: out of its manifest, and out of their configs. The runs stay in `runs_dir`.

    Args:
        runs_dir: The folder of all runs.
        study: The study.
        names: The names of the runs.
        found: Those of them whose config can be read.
    """
    folder = study_dir(runs_dir, study)
    with FileLock(folder / ".lock"):
        manifest = manifest_of(runs_dir, study)
        manifest["runs"] = {name: entry for name, entry in manifest["runs"].items() if name not in names}
        write_json(folder / "study.json", manifest)
    for item in found:
        if item.config.study != study:
            continue
        run = RunDir(runs_dir / item.config.name)
        try:
            with run.locked():
                frozen.freeze(replace(item.config, study=None), run.config_file)
        except RunError:  # the run is just stopping; MLflow may list it under the study until it is launched again
            continue
