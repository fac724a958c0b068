"""The runs of a study before training: the arms, the baselines that they need, and the manifest."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from relora.common.errors import ConfigError, DamagedFile, RunError
from relora.common.files import reason, set_aside
from relora.config import credentials, frozen
from relora.config.frozen import read_frozen
from relora.config.run import RunConfig
from relora.runs.rundir import RunDir, write_json
from relora.runs.state import observe
from relora.studies.baselines import Baselines
from relora.studies.gaps import is_full_rank
from relora.studies.manifest import manifest_of, study_dir
from relora.studies.sweeps import Sweep


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of a study: an arm that the user asked for, or a baseline that was added."""

    config: RunConfig
    role: str
    """"arm" or "baseline"."""

    @property
    def run(self) -> RunDir:
        """The folder of the run."""
        return RunDir(self.config.run_dir)

    @property
    def state(self) -> str:
        """The state of the run now. For many runs, call `observe` instead: it asks SLURM once for all of them."""
        return observe([self.run])[0].name


def planned_runs(sweep: Sweep) -> list[Planned]:
    """Return the runs of a sweep and the full-rank runs that they need as baselines. The added baselines come first.

    Each comparison key and seed needs a full-rank run. A full-rank run of the sweep is enough if its rates were tuned
    for the setting or given by the user. Otherwise full-rank runs at several rates are added.

    Raises:
        ConfigError: A full-rank run that is needed cannot be made.
    """
    own = [run for run in sweep.runs if is_full_rank(run)]
    arms = {run.config_hash for run in sweep.runs}
    served = {_pairing(run) for run in own if run.rates.basis != "untuned"}
    bases = {_pairing(run): run for run in own}
    full_rank = Baselines(sweep)
    baselines: dict[str, RunConfig] = {}
    for config in sweep.runs:
        if is_full_rank(config) or _pairing(config) in served:
            continue
        base = bases.get(_pairing(config)) or full_rank.of(config)
        baselines |= {run.config_hash: run for run in full_rank.ladder(base) if run.config_hash not in arms}
    found = [Planned(config=config, role="baseline") for config in baselines.values()]
    return [*found, *(Planned(config=config, role="arm") for config in sweep.runs)]


def _pairing(config: RunConfig) -> tuple[str, int]:
    """Return the comparison key and the seed. A run and its baseline must have the same."""
    return (config.comparison_key, config.trainer.seed)


def prepare(pending: Sequence[Planned], command: Sequence[str]) -> None:
    """Write each config into the folder of its run, unless another launcher has started the run.

    Args:
        pending: The runs to launch.
        command: The arguments of run.py, which resume the run.
    """
    for item in pending:
        item.run.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(RunError), item.run.locked():
            frozen.freeze(item.config, item.run.config_file)
            write_json(item.run.launch_file, {"overrides": credentials.without_passwords(command)})


def write_manifest(runs_dir: Path, sweep: Sweep, planned: Sequence[Planned], overrides: Sequence[str]) -> None:
    """Add the runs of a launch to study.json. The runs of earlier launches stay there.

    Args:
        runs_dir: The folder of all runs.
        sweep: The sweep, with the name and the question of the study.
        planned: The arms and baselines to add.
        overrides: The command line of this launch. It is stored without passwords.
    """
    folder = study_dir(runs_dir, sweep.study)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        manifest = _earlier_manifest(runs_dir, sweep.study)
        runs: dict[str, Any] = manifest.get("runs", {})
        for item in planned:
            known = runs.get(item.config.name, {})
            role = "arm" if "arm" in (item.role, known.get("role")) else "baseline"
            runs[item.config.name] = {
                "role": role,
                "config_hash": item.config.config_hash,
                "comparison_key": item.config.comparison_key,
                "variant": item.config.variant,
                "seed": item.config.trainer.seed,
            }
        launches = [credentials.without_passwords(launch) for launch in [*manifest.get("launches", []), overrides]]
        unique = [launch for number, launch in enumerate(launches) if launch not in launches[:number]]
        question = sweep.question or manifest.get("question", "")
        # A study may be launched again on another cluster. `relora retry` uses the last one.
        cluster = asdict(planned[0].config.cluster)
        values = {"study": sweep.study, "question": question, "launches": unique, "cluster": cluster, "runs": runs}
        write_json(folder / "study.json", values)


def _earlier_manifest(runs_dir: Path, study: str) -> dict[str, Any]:
    """Return the manifest of earlier launches. A damaged file is renamed, and the manifest starts empty again."""
    file = study_dir(runs_dir, study) / "study.json"
    try:
        return manifest_of(runs_dir, study) if file.exists() else {}
    except DamagedFile as error:
        aside = set_aside(file)
        print(f"note: {error}; it is kept as {aside.name}; the new file lacks the runs of other launches", flush=True)
        return {}


def of_manifest(runs_dir: Path, study: str) -> list[Planned]:
    """Return the runs of a launched study, from their frozen configs. Raises ConfigError if there is no such study."""
    damaged = damaged_of(runs_dir, study)
    return [
        Planned(config=read_frozen(runs_dir / name / "config.yaml"), role=entry["role"])
        for name, entry in manifest_of(runs_dir, study)["runs"].items()
        if name not in damaged and (runs_dir / name / "config.yaml").is_file()  # a folder may have been removed
    ]


def damaged_of(runs_dir: Path, study: str) -> dict[str, tuple[str, str]]:
    """Return the runs of a study whose frozen config cannot be read: name -> (role, reason)."""
    found: dict[str, tuple[str, str]] = {}
    for name, entry in manifest_of(runs_dir, study)["runs"].items():
        file = runs_dir / name / "config.yaml"
        try:
            if file.exists():
                read_frozen(file)
        except (ConfigError, DamagedFile) as error:
            found[name] = (entry["role"], reason(error))
    return found
