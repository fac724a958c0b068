"""The command line: `python run.py` (also `relora train`) and the verbs of `relora`."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from relora.cli.parser import build_parser
from relora.common import signals
from relora.common.errors import ConfigError, RunError, print_note, printable
from relora.config import compose, credentials, tuned
from relora.config.tuned import Presets
from relora.studies import sweeps
from relora.training.distributed import World

DRY_RUN, PRUNE = "--dry-run", "--prune"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `relora VERB ...` and return the exit code. `argv` is without the program's name; None means sys.argv."""
    arguments = _without_passwords(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return run(arguments[1:])
    parser = build_parser()
    # argparse does not accept more positionals after an option, but overrides may be anywhere on the command line.
    known, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(known, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        known.overrides = [*known.overrides, *rest]
    return _reported(lambda: known.verb(known))


def run(argv: Sequence[str]) -> int:
    """Run `python run.py ...` with these arguments and return the exit code."""
    arguments = _without_passwords(argv)
    return _reported(lambda: _train(arguments))


def _without_passwords(argv: Sequence[str]) -> list[str]:
    """The arguments without passwords, so that they can be stored and shown. Prints a note if there was a password."""
    arguments = credentials.without_passwords(argv)
    if arguments != list(argv) and World.here().is_first:
        print(
            "note: other users can see a command's arguments, also the password in tracker.uri; set "
            f"{credentials.VARIABLE}=... in the environment instead to hide it",
            file=sys.stderr,
        )
    return arguments


def _reported(action: Callable[[], int]) -> int:
    """Run a command. An error that the user can fix becomes one message and an exit code instead of a traceback."""

    def show(message: object) -> None:
        if World.here().is_first:
            print_note(credentials.redacted(str(message)))

    try:
        with signals.raising():
            return _stoppable(action)
    except ConfigError as error:
        show(error)
        return 2
    except RunError as error:
        show(error)
        return 1
    except KeyboardInterrupt:
        show("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # such as a missing file, a folder without permission or a full disk
        show(printable(str(error)))
        return 1


def _stoppable(action: Callable[[], int]) -> int:
    """Raise KeyboardInterrupt again if a library has turned the one of a signal into another error."""
    try:
        return action()
    except BaseException as error:
        if signals.interrupted():
            raise KeyboardInterrupt from error
        raise


# --------------------------------------------------------------------------------------------------------- train


def _train(argv: Sequence[str]) -> int:
    """Compose, check and run one run, or with -m a study.

    Hydra handles other options (--help, --cfg, ...), and also a sweep that names one of Hydra's launchers or sweepers.
    """
    from relora.training.job import EXIT_CODES, launch

    if DRY_RUN in argv:
        return main(["plan", *(argument for argument in argv if argument not in (DRY_RUN, PRUNE))])
    options = [argument for argument in argv if argument.startswith("-")]
    hydras = any(argument.startswith(("hydra/launcher=", "hydra/sweeper=")) for argument in argv)
    prune = PRUNE in options
    options = [option for option in options if option != PRUNE]
    is_study = options in (["-m"], ["--multirun"]) and not hydras
    if prune and not is_study:
        raise ConfigError(f"{PRUNE} takes runs out of a study, so it needs -m and no launcher of Hydra")
    if is_study:
        if World.here().size > 1:
            raise ConfigError(
                "-m starts the processes of a study itself; give torchrun a single run, or do not use torchrun"
            )
        from relora.launching.launch import launch_study
        from relora.launching.tune import tune

        overrides = [argument for argument in argv if not argument.startswith("-")]
        search = sweeps.search(overrides)
        if search is not None:
            if prune:
                raise ConfigError(f"a search keeps its trials, so it cannot be given {PRUNE}")
            return 0 if tune(search, overrides) else 1
        return 0 if launch_study(sweeps.expand(overrides), overrides, prune=prune) else 1
    if any(argument.startswith("-") for argument in argv):
        compose.hydra_main(argv, _hydra_job)
        return 0
    sweep = next((argument for argument in argv if argument.startswith("sweeps=")), None)
    if sweep is not None:
        raise ConfigError(f"{sweep} is a sweep and this is a single run; write python run.py -m {' '.join(argv)}")
    config = compose.compose(argv)
    config = Presets().noted(config, argv)
    for remark in (*sweeps.without_preset(argv, config), *tuned.remarks([config]), *config.remarks):
        print(f"note: {remark}")
    if config.cluster.name == "slurm":
        if World.here().size > 1:
            raise ConfigError("cluster=slurm starts the processes of a run itself; do not use torchrun")
        from relora.launching.launch import submit_run

        return 0 if submit_run(config, argv) else 1
    return EXIT_CODES[launch(config, argv).state]


def _hydra_job(composed: Any, overrides: list[str]) -> None:
    """Run one job of Hydra's launcher."""
    from relora.training.job import EXIT_CODES, launch

    code = _reported(
        lambda: EXIT_CODES[launch(Presets().noted(compose.to_run_config(composed), overrides), overrides).state]
    )
    if code:
        sys.exit(code)
