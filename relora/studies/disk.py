"""The disk space of checkpoints, models, warm starts, corpora and snapshots, and which files no run needs any more."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relora.common.errors import ConfigError, DamagedFile, RunError, first_line
from relora.common.files import check_weights, is_locked, size_bytes
from relora.common.tables import some_of
from relora.config import frozen
from relora.config.run import RunConfig
from relora.runs.rundir import RunDir
from relora.studies.corpora import CorpusCost, corpora_of
from relora.studies.manifest import manifest_of, unknown_study
from relora.studies.snapshots import SnapshotCost, snapshots_of

CHECKPOINT = re.compile(r"step-\d+\.pt")
NO_RUNS = ("studies", "corpora", "warm_starts", "code")
"""Folders of a runs_dir that are not runs."""
WARM_START = re.compile(r"([0-9a-f]{8})(\.tmp)?")


@dataclass(kw_only=True)
class RunCost:
    """The disk space of a run before the deletion. `why` is the reason why its checkpoints are deletable or kept."""

    run: RunDir
    state: str
    checkpoints_bytes: int
    model_bytes: int
    deletable: list[Path]
    deletable_bytes: int
    why: str
    deleted_bytes: int = 0


@dataclass(kw_only=True)
class WarmStartCost:
    """The disk space of a warm start before the deletion. `runs` fork from it. `why` is why it is deletable or kept."""

    folder: Path
    runs: list[str]
    warm_start_bytes: int = 0
    deletable: list[Path] = field(default_factory=list)
    deletable_bytes: int = 0
    why: str = ""
    deleted_bytes: int = 0

    @property
    def lock_file(self) -> Path:
        """The lock. A run holds it while it trains the warm start or forks from it."""
        return self.folder.with_name(self.folder.name + ".lock")

    @property
    def leftover(self) -> Path:
        """The temporary name while the warm start is written or deleted. No run uses it under that name."""
        return self.folder.with_name(self.folder.name + ".tmp")


@dataclass(kw_only=True)
class Disk:
    """The disk space of the runs of some studies, or of all runs of a folder."""

    runs_dir: Path
    studies: list[str]
    runs: list[RunCost]
    warm_starts: list[WarmStartCost]
    corpora: list[CorpusCost] = field(default_factory=list)
    """Empty if only the runs of some studies are listed: a corpus belongs to no study."""
    snapshots: list[SnapshotCost] = field(default_factory=list)
    """Empty in the same case."""
    failures: list[str] = field(default_factory=list)
    """Deletions that failed."""

    @property
    def totals(self) -> dict[str, int]:
        """The sums over all runs, warm starts, corpora and snapshots."""
        everything = [*self.runs, *self.warm_starts, *self.corpora, *self.snapshots]
        return {
            "checkpoints_bytes": sum(cost.checkpoints_bytes for cost in self.runs),
            "model_bytes": sum(cost.model_bytes for cost in self.runs),
            "warm_starts_bytes": sum(cost.warm_start_bytes for cost in self.warm_starts),
            "corpora_bytes": sum(cost.corpus_bytes for cost in self.corpora),
            "snapshots_bytes": sum(cost.snapshot_bytes for cost in self.snapshots),
            "deletable_bytes": sum(cost.deletable_bytes for cost in everything),
            "deleted_bytes": sum(cost.deleted_bytes for cost in everything),
        }


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run folder. `problem` names the files that could not be read."""

    run: RunDir
    state: str
    config: RunConfig | None
    problem: str

    @property
    def name(self) -> str:
        return self.run.path.name


def survey(runs_dir: Path, studies: Sequence[str] = ()) -> Disk:
    """List the disk space of all runs, or of the runs of `studies`. Raises ConfigError for an unknown study."""
    if not runs_dir.is_dir():
        raise ConfigError(
            f"runs_dir={runs_dir} does not exist: no run was made there; give the runs_dir=... of the runs"
        )
    manifests = _manifests(runs_dir)
    for study in studies:
        if study not in manifests:
            raise unknown_study(runs_dir, study)
    runs = [_read(RunDir(path)) for path in sorted(runs_dir.iterdir()) if _is_run(path)]
    chosen = {name for study in studies for name in manifests[study]} if studies else None
    return Disk(
        runs_dir=runs_dir,
        studies=list(studies),
        runs=[_run_cost(found) for found in runs if chosen is None or found.name in chosen],
        warm_starts=_warm_starts(runs_dir, runs, manifests, chosen),
        corpora=[] if studies else corpora_of(runs_dir),
        snapshots=[] if studies else snapshots_of(runs_dir, {found.name: found.state for found in runs}),
    )


def _manifests(runs_dir: Path) -> dict[str, list[str]]:
    """Return the runs of every study."""
    found: dict[str, list[str]] = {}
    for file in sorted(runs_dir.glob("studies/*/study.json")):
        try:
            found[file.parent.name] = list(manifest_of(runs_dir, file.parent.name)["runs"])
        except DamagedFile as error:
            raise RunError(f"{error}; until then it is unknown which files its runs need") from error
    return found


# ----------------------------------------------------------------------------------------------------------- runs


def _is_run(path: Path) -> bool:
    try:
        files = ("config.yaml", "status.json", "checkpoints")
        return path.name not in NO_RUNS and any((path / name).exists() for name in files)
    except PermissionError:  # it is listed as a run that cannot be read
        return True


def _read(run: RunDir) -> _Run:
    config, state, problems = None, "unreadable", []
    try:
        config = frozen.thaw(run.config_file)
    except Exception as error:  # a file that is not a config can raise anything
        problems.append(f"its config.yaml cannot be read ({first_line(error)})")
    try:
        state = state_of_idle(run)
        # `is_locked` would create a lock file that does not exist.
        if (run.path / ".lock").exists() and run.is_locked:
            state = "running"
    except OSError as error:
        problems.append(f"its status and lock cannot be read ({error})")
    except DamagedFile as error:
        problems.append(f"its status.json cannot be read ({error.why})")
    return _Run(run=run, state=state, config=config, problem=" and ".join(problems))


def state_of_idle(run: RunDir) -> str:
    """Return the state of a run that no process trains."""
    status = run.status
    if status is None:
        return "missing"
    return "interrupted" if status.state == "running" else status.state


def _run_cost(found: _Run) -> RunCost:
    run = found.run
    deletable, why = ([], f"left alone: {found.problem}") if found.problem else judge(run, found.state)
    return RunCost(
        run=run,
        state=found.state,
        checkpoints_bytes=size_bytes(run.checkpoints),
        model_bytes=size_bytes(run.model),
        deletable=deletable,
        deletable_bytes=sum(size_bytes(path) for path in deletable),
        why=why,
    )


def judge(run: RunDir, state: str) -> tuple[list[Path], str]:
    """Return the files of a run that are not needed, and the reason."""
    for path in (run.path, run.checkpoints):
        if path.is_symlink():
            return [], f"left alone: {path.name} is a link to {path.readlink()}, and nothing is deleted through links"
    checkpoints = sorted(path for path in run.checkpoints.glob("step-*.pt") if CHECKPOINT.fullmatch(path.name))
    leftovers = sorted(run.checkpoints.glob("*.tmp"))
    if state == "running":
        return [], "kept: running"
    torn = "; an interrupted write left *.tmp" if leftovers else ""
    if not checkpoints:
        return leftovers, f"no checkpoint{torn}"
    if state != "finished":
        return leftovers, f"kept: {'no status' if state == 'missing' else state}, resumes from it{torn}"
    if not any(run.model.glob("*.safetensors")):
        return leftovers, f"kept: finished, but model/ has no weights: the checkpoints are the only copy{torn}"
    try:
        check_weights(run.model)
    except DamagedFile as error:
        return leftovers, f"kept: finished, but {error}: the checkpoints are the only copy{torn}"
    return [*checkpoints, *leftovers], f"finished: never resumed, its result is the model{torn}"


# ---------------------------------------------------------------------------------------------------- warm starts


def _warm_starts(
    runs_dir: Path, runs: Sequence[_Run], manifests: dict[str, list[str]], chosen: set[str] | None
) -> list[WarmStartCost]:
    """Return the warm starts from which the `chosen` runs fork, or all warm starts if `chosen` is None."""
    folder = runs_dir / "warm_starts"
    matches = [WARM_START.fullmatch(path.name) for path in folder.glob("*") if path.is_dir()]
    keys = sorted({match[1] for match in matches if match})
    if not keys:
        return []
    from relora.runs.warmstart import key

    forks = [(found, key(found.config)) for found in runs if found.config is not None]
    unknown = [
        f"{found.name} (its config.yaml cannot be read)"
        for found in runs
        if found.config is None and found.state != "finished"
    ]
    begun = {found.name for found in runs}
    unknown += [
        f"{name} (listed in study {study}, not started)"
        for study, names in manifests.items()
        for name in names
        if name not in begun
    ]
    costs = [
        _warm_start_cost(folder / wanted, [found for found, forked in forks if forked == wanted], unknown)
        for wanted in keys
    ]
    return [cost for cost in costs if chosen is None or chosen & set(cost.runs)]


def _warm_start_cost(folder: Path, users: Sequence[_Run], unknown: Sequence[str]) -> WarmStartCost:
    cost = WarmStartCost(folder=folder, runs=[found.name for found in users])
    cost.warm_start_bytes = size_bytes(folder) + size_bytes(cost.leftover)
    for path in (folder.parent, folder, cost.leftover, cost.lock_file):
        if path.is_symlink():
            cost.why = f"left alone: {path.name} is a link to {path.readlink()}, and nothing is deleted through links"
            return cost
    try:
        locked = is_locked(cost.lock_file)
    except OSError as error:
        cost.why = f"left alone: its lock cannot be read ({error})"
        return cost
    unfinished = [f"{found.name} ({found.state})" for found in users if found.state != "finished"]
    if locked:
        cost.why = "kept: a run trains it or forks from it now"
        return cost
    cost.deletable = [cost.leftover] if cost.leftover.exists() else []
    if unfinished:
        cost.why = f"kept: {some_of(unfinished)} forks from it"
    elif unknown:
        cost.why = f"kept: unknown whether it is forked by {some_of(unknown)}"
    else:
        cost.why = "every run that forks from it is finished" if users else "no run forks from it"
        cost.deletable += [folder] if folder.exists() else []
    cost.deletable_bytes = sum(size_bytes(path) for path in cost.deletable)
    return cost
