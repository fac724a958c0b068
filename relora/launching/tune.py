"""Search for the learning rates of a method. Only this module imports optuna, which is an optional extra.

A trial is one run for each seed. Its value is the mean of their validation losses. The search is stored in its study's
folder, so that the same command continues it. The best learning rates become the method's preset.
"""

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from relora.common import signals
from relora.common.errors import ConfigError, RunError
from relora.config import choices, compose, presets
from relora.config.identity import short_hash
from relora.config.overrides import written
from relora.config.run import RunConfig
from relora.launching.local import POLL_SECONDS, start_process, wait_for_stop
from relora.runs.metrics import read_rows
from relora.runs.results import mean
from relora.studies.manifest import study_dir
from relora.studies.study import Planned, prepare, write_manifest
from relora.studies.sweeps import Search, Sweep

if TYPE_CHECKING:
    from optuna import Study, Trial

MOST_FAILURES = 8
FAILED = "failed"
"""User attribute of the failed trials in Optuna whose runs failed, in contrast to trials of a stopped launcher."""
END_SHARE = 0.05
"""A best value in this share of its range, at either end, stands at the edge of the search."""
UNPRUNED_TRIALS = 4
"""The first trials run to their end, because there is nothing yet to compare them with."""


@dataclass(kw_only=True)
class _Attempt:
    """A trial whose runs, one for each seed, are trained one after the other."""

    trial: "Trial"
    runs: list[Planned]
    process: Popen[bytes] | None = None
    reported_step: int = 0

    @property
    def current(self) -> Planned | None:
        """The first run that is not finished, None if all are."""
        return next((item for item in self.runs if item.state != "finished"), None)

    def values(self) -> str:
        """The values of the trial as text for a message."""
        params = {name: f"{v:.3g}" if isinstance(v, float) else written(v) for name, v in self.trial.params.items()}
        return " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in params.items())


def tune(search: Search, overrides: Sequence[str]) -> bool:
    """Search until `search.trials` trials are judged, that is complete or pruned, and write the preset.

    Args:
        search: The settings of the sweeps/ file.
        overrides: The arguments of run.py without -m, for the study's manifest and the preset's comment.

    Returns:
        Whether the search is complete. False after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: optuna is not installed, or the cluster is SLURM.
        RunError: Another process does the same search, too many trials failed, or no trial ran to its end.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("a search needs optuna; install it with: pip install -e '.[tune]'")
    lowest = {name: low for name, (low, _) in search.ranges.items()}
    first = _runs(search, lowest | {name: values[0] for name, values in search.choices.items()})[0].config
    if first.cluster.name == "slurm":
        raise ConfigError("a search trains its trials on its own machine; use cluster=local, inside a SLURM job")
    folder = study_dir(Path(first.runs_dir), search.study)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), signals.raising():
        study = _open(folder / "optuna.db", search, first)
        print(f"study {search.study}: {_judged(study)} of {search.trials} trials are judged already", flush=True)
        complete = _run_trials(study, search, overrides, first.cluster.max_parallel)
        if complete:
            _write_preset(study, search, folder, overrides)
        else:
            print("the search is not finished; the same command continues it", flush=True)
    return complete


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let only one process run a search. A second process would take the first one's trials for dead."""
    lock = FileLock(folder / ".search.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process runs the search of {folder}; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _open(file: Path, search: Search, config: RunConfig) -> "Study":
    """Open the stored search. Trials whose process died are queued again with the same values."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=_question_key(search, config),
        storage=f"sqlite:///{file}",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS),
    )
    # A new process starts a new random stream. Change its seed, or the first trials would be drawn again.
    seed = config.trainer.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=UNPRUNED_TRIALS)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _question_key(search: Search, config: RunConfig) -> str:
    """The name of the search in Optuna: a hash of its setting, ranges, choices and seeds."""
    searched = (*search.ranges, *search.choices, "trainer.seed")
    fixed = {name: value for name, value in config.identity.items() if name not in searched}
    choices = [search.choices] if search.choices else []
    return f"{config.method.name} {short_hash([fixed, search.ranges, search.seeds, *choices])}"


def _judged(study: "Study") -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _drawn(trial: "Trial", search: Search) -> dict[str, Any]:
    """Let Optuna choose the values of a trial."""
    for name, limits in search.ranges.items():
        trial.suggest_float(name, *limits, log=True)
    for name, values in search.choices.items():
        trial.suggest_categorical(name, values)
    return trial.params


def _rounded(search: Search, params: dict[str, Any]) -> dict[str, Any]:
    """Give the values of ranges three digits, so that a repeated trial has the same runs. Choices stay as they are."""
    return {name: float(f"{value:.3g}") if name in search.ranges else value for name, value in params.items()}


def _runs(search: Search, values: dict[str, Any]) -> list[Planned]:
    """The runs of one trial, one for each seed."""
    chosen = [f"{name}={written(value)}" for name, value in _rounded(search, values).items()]
    configs = [compose.compose([*search.overrides, *chosen, f"trainer.seed={seed}"]) for seed in search.seeds]
    return [Planned(config=config, role="arm") for config in configs]


def _run_trials(study: "Study", search: Search, overrides: Sequence[str], max_parallel: int) -> bool:
    running: list[_Attempt] = []
    try:
        while running or _judged(study) < search.trials:
            while len(running) < max_parallel and _judged(study) + len(running) < search.trials:
                trial = study.ask()
                attempt = _Attempt(trial=trial, runs=_runs(search, _drawn(trial, search)))
                _note_in_study(search, attempt.runs, overrides)
                running.append(attempt)
                print(f"trial {trial.number}: {attempt.values()}", flush=True)
            running = [attempt for attempt in running if _keeps_running(study, attempt, max_parallel)]
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        signals.forget()  # a second Ctrl-C ends the wait below
        print("stopping the trials, each with a checkpoint", flush=True)
        return False
    finally:
        for attempt in running:
            _stop(attempt)
    return True


def _note_in_study(search: Search, runs: Sequence[Planned], overrides: Sequence[str]) -> None:
    sweep = Sweep(study=search.study, question=search.question, runs=[item.config for item in runs])
    write_manifest(Path(runs[0].config.runs_dir), sweep, runs, overrides)
    prepare([item for item in runs if item.state != "finished"], ["-m", *overrides])


def _keeps_running(study: "Study", attempt: _Attempt, max_parallel: int) -> bool:
    """Start the next run of a trial, or check the running one. Return False when the trial has ended."""
    from optuna.trial import TrialState

    number = attempt.trial.number
    if attempt.process is not None and attempt.process.poll() is None:
        if _is_hopeless(attempt):
            _stop(attempt)
            _mark_pruned(attempt)
            study.tell(number, state=TrialState.PRUNED)
            print(f"trial {number}: stopped early", flush=True)
            return False
        return True
    item = attempt.current
    if item is None:
        losses = [run.run.status.summary["eval_loss"] for run in attempt.runs if run.run.status]
        if not all(map(math.isfinite, losses)):  # Optuna would count such a loss as a failed trial
            study.tell(number, state=TrialState.PRUNED)
            print(f"trial {number}: {attempt.values()}: diverged", flush=True)
            return False
        study.tell(number, mean(losses))
        print(f"trial {number}: {attempt.values()}: validation loss {mean(losses):.4f}", flush=True)
        return False
    if attempt.process is not None and item.state in ("failed", "interrupted"):
        status = item.run.status
        message = status.message if status else ""
        print(f"trial {number}: {item.state}: {message}", flush=True)
        # A run that diverges says that its learning rates are bad. After any other failure, try the trial again.
        if "diverged" in message:
            study.tell(number, state=TrialState.PRUNED)
        else:
            _try_again(study, attempt)
        return False
    if attempt.process is not None and attempt.process.returncode:
        print(f"trial {number}: its process ended with {attempt.process.returncode}; see {item.run.path}/log.txt")
        _try_again(study, attempt)
        return False
    attempt.process = start_process(item, max_parallel)
    return True


def _try_again(study: "Study", attempt: _Attempt) -> None:
    """Put a failed trial back in the queue. Raises RunError when too many trials have failed.

    Trials that a stopped launcher left behind do not count as failed.
    """
    from optuna.trial import TrialState

    attempt.trial.set_user_attr(FAILED, True)
    study.tell(attempt.trial.number, state=TrialState.FAIL)
    failed = sum(FAILED in trial.user_attrs for trial in study.get_trials(deepcopy=False))
    if failed > MOST_FAILURES:
        raise RunError(f"{failed} trials have failed, the last in {attempt.runs[0].run.path}; see its log.txt")
    study.enqueue_trial(attempt.trial.params)


def _is_hopeless(attempt: _Attempt) -> bool:
    """Report the new evaluations of the first seed's run to Optuna. Return whether Optuna would prune the trial."""
    if attempt.current is not attempt.runs[0]:
        return False
    for row in read_rows(attempt.runs[0].run.metrics_file):
        if "eval/loss" in row and row["step"] > attempt.reported_step:
            attempt.reported_step = row["step"]
            attempt.trial.report(row["eval/loss"], row["step"])
    return attempt.reported_step > 0 and attempt.trial.should_prune()


def _stop(attempt: _Attempt) -> None:
    if attempt.process is not None and attempt.process.poll() is None and attempt.current is not None:
        attempt.process.terminate()
        wait_for_stop(attempt.current, attempt.process)


def _mark_pruned(attempt: _Attempt) -> None:
    run = attempt.runs[0].run
    status = run.status
    if status is not None:
        status.message = f"stopped early by the search: worse than the median at step {attempt.reported_step}"
        run.status = status


# -------------------------------------------------------------------------------------------------------- the preset


def _write_preset(study: "Study", search: Search, folder: Path, overrides: Sequence[str]) -> None:
    """Write the best learning rates as the experiment's preset, or to the study's folder if that is not possible."""
    if not any(trial.state.name == "COMPLETE" for trial in study.trials):
        raise RunError(
            f"no trial of {search.study} ran to its end: each one diverged or was stopped; lower tune.ranges"
        )
    values = _rounded(search, study.best_params)
    text = " ".join(f"{name}={written(value)}" for name, value in values.items())
    print(f"best on validation: {text} (mean loss {study.best_value:.4f} over {len(search.seeds)} seeds)")
    at_an_end = _at_an_end(values, search.ranges)
    for name in at_an_end:
        low, high = search.ranges[name]
        print(
            f"note: {name}={written(values[name])} is near an end of its range [{low:g}, {high:g}], so a better value "
            f"may lie outside; search again with a wider tune.ranges.{name}"
        )
    own = [item for item in _without_paths(overrides) if not item.startswith(KEYS_SET_BY_THE_EXPERIMENT)]
    if search.experiment is None or own:
        why = f"{' '.join(own)} differs from the experiment's setting" if own else "no experiments=... was given"
        print(f"{why}, so no preset is written")
        return
    remark = (
        f"Learning rates: the best of {search.trials} trials on validation, {len(search.seeds)} seeds each "
        f"(loss {study.best_value:.4f}), by\n  python run.py -m {' '.join(_without_paths(overrides))}"
    )
    if at_an_end:
        remark += f"\nNear an end of its range, so a better value may lie outside: {', '.join(at_an_end)}"
    file = choices.new_preset_file(search.experiment, search.method)
    try:
        presets.write_preset(file, values, remark)
    except OSError as error:
        file = folder / f"{search.method}.yaml"
        presets.write_preset(file, values, remark)
        print(f"the preset could not be written to the presets folder ({error})")
    print(f"preset: {file}", flush=True)


def _at_an_end(values: dict[str, Any], ranges: dict[str, tuple[float, float]]) -> list[str]:
    """Return the names of the values in the lowest or highest END_SHARE of their range, on its log scale."""
    places = {
        name: math.log(values[name] / low) / math.log(high / low)
        for name, (low, high) in ranges.items()
        if name in values
    }
    return [name for name, place in places.items() if not END_SHARE < place < 1 - END_SHARE]


KEYS_SET_BY_THE_EXPERIMENT = ("sweeps=", "experiments=", "method=", "trainer.seed=", "tune.")


def _without_paths(overrides: Sequence[str]) -> list[str]:
    """The overrides without paths and settings of the machine, for a file that other users read."""
    return [item for item in overrides if not item.startswith(("runs_dir=", "cluster", "tracker", "study="))]
