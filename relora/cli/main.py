"""The command line: `python run.py` (also `relora train`) and the verbs of `relora`."""

import argparse
import codecs
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from relora.common import signals
from relora.common.errors import ConfigError, RunError, printable
from relora.common.files import read_json
from relora.config import compose, credentials, frozen, tuned
from relora.config.tuned import Presets
from relora.runs.rundir import RunDir
from relora.studies import sweeps
from relora.training.distributed import World


def main(argv: Sequence[str] | None = None) -> int:
    """`relora VERB ...`: returns the exit code."""
    arguments = _without_passwords(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return run(arguments[1:])
    parser = _parser()
    # argparse takes no second row of positionals after an option: overrides may stand anywhere.
    known, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(known, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        known.overrides = [*known.overrides, *rest]
    return _reported(lambda: known.verb(known))


def run(argv: Sequence[str]) -> int:
    """`python run.py ...`: returns the exit code."""
    arguments = _without_passwords(argv)
    return _reported(lambda: _train(arguments))


def _without_passwords(argv: Sequence[str]) -> list[str]:
    """The arguments as they may be written down and shown."""
    arguments = credentials.without_passwords(argv)
    if arguments != list(argv) and World.here().is_first:
        print(
            f"note: others see a command's arguments, the password in tracker.uri too; {credentials.VARIABLE}=... "
            "in the environment keeps it from them",
            file=sys.stderr,
        )
    return arguments


def _reported(action: Callable[[], int]) -> int:
    """Run a command; what a person can mend becomes one message and an exit code, never a traceback."""

    def print_note(message: object) -> None:
        if World.here().is_first:
            print(f"relora: {credentials.redacted(str(message))}", file=sys.stderr)

    try:
        with signals.raising():
            return _stoppable(action)
    except ConfigError as error:
        print_note(error)
        return 2
    except RunError as error:
        print_note(error)
        return 1
    except KeyboardInterrupt:
        print_note("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a file that is missing, a folder of someone else, a disk that is full
        print_note(printable(str(error)))
        return 1


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without the page of usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"relora: {printable(message)}; {self.prog} --help shows what it takes\n")


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """An argument's type: a number from `low` to `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be from {low} to {high}")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def _stoppable(action: Callable[[], int]) -> int:
    """A library may turn the KeyboardInterrupt of a signal into an error of its own; here it is one again."""
    try:
        return action()
    except BaseException as error:
        if signals.interrupted():
            raise KeyboardInterrupt from error
        raise


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="relora",
        description="Pre-train with ReLoRA, and look at what came out.",
        epilog="relora train [key=value ...] is python run.py [key=value ...]; python run.py --help shows the config.",
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="one JSON object instead of text")
        sub.set_defaults(verb=action)
        return sub

    verbs.add_parser("train", help="train: the same as python run.py", add_help=False)

    sub = verb("plan", _plan, "What a run will take, beside full rank: parameters, FLOPs, memory; starts nothing.")
    sub.add_argument("overrides", nargs="*", help="as for python run.py")

    sub = verb("evaluate", _evaluate, "Perplexity of an exported model on held-out text.")
    sub.add_argument("folder", type=Path, help="the model folder of a run, or any local Hugging Face folder")
    sub.add_argument("--split", choices=("test", "validation"), default="test")
    sub.add_argument(
        "overrides", nargs="*", help="data=..., runs_dir=..., trainer.device=... (default: as its run did)"
    )

    sub = verb("sample", _sample, "Let an exported model write.")
    sub.add_argument("folder", type=Path, help="the model folder of a run")
    sub.add_argument("--prompt", default="", help="what it goes on from (default: the beginning of a text)")
    sub.add_argument(
        "--tokens", type=_number(int, 1, 10**6), default=80, help="how many to write at most (default: %(default)s)"
    )
    sub.add_argument(
        "--temperature",
        type=_number(float, 0, 1000),
        default=0.8,
        help="0: always the likeliest (default: %(default)s)",
    )
    sub.add_argument("--seed", type=_number(int, 0, 2**63 - 1), default=0)
    sub.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)

    sub = verb("report", _report, "Tables and pictures of a study, as report.md, report.html and results.csv.")
    sub.add_argument("study")
    sub.add_argument("overrides", nargs="*", help="runs_dir=..., as the study was launched with")

    where = "runs_dir=..., as it was launched with"
    sub = verb("status", _status, "How the runs of a study stand: state, step, time left, perplexity, what went wrong.")
    sub.add_argument("study", help="a study, or the name of a run")
    sub.add_argument("--watch", action="store_true", help="show it again and again until every run has ended")
    sub.add_argument("overrides", nargs="*", help=where)

    sub = verb("logs", _logs, "What a run that was submitted, or belongs to a study, has printed.")
    sub.add_argument("run", metavar="[STUDY/]RUN", help="its name, or a part of it that no other has")
    sub.add_argument("overrides", nargs="*", help=where)

    sub = verb("cancel", _cancel, "Stop what is queued or running of a study, or one run; it can be launched again.")
    sub.add_argument("study", help="a study, or the name of a run")
    sub.add_argument("overrides", nargs="*", help=where)

    sub = verb("retry", _retry, "Launch again, from their frozen configs, a study's runs that failed or were stopped.")
    sub.add_argument("study")
    sub.add_argument("overrides", nargs="*", help=where + ", and cluster settings to change, like cluster.mem_gb=32")

    sub = verb("ui", _ui, "Open the MLflow UI on the runs' store; prints the link and serves until Ctrl-C.")
    sub.add_argument("--port", type=_number(int, 0, 65535), default=None, help="default: 5000, or a free one")
    text = "accept other machines at this name or address of this one; creates the store where there is none"
    sub.add_argument("--host", metavar="NAME", default=None, help=text)
    text = "ask for a password, by MLflow's basic auth; needs pip install 'mlflow[auth]'"
    sub.add_argument("--auth", action="store_true", help=text)
    sub.add_argument("overrides", nargs="*", help="runs_dir=..., tracker.uri=..., as the runs were launched with")

    sub = verb("sync", _sync, "Send to MLflow what it does not have of some runs, and correct the state of dead ones.")
    sub.add_argument("runs", type=Path, nargs="+", help="run folders")

    sub = verb("clean", _clean, "What checkpoints, models and warm starts cost on disk; with --delete, less of it.")
    sub.add_argument("--delete", action="store_true", help="delete what the list calls deletable (default: list alone)")
    text = "whose runs (default: all), and runs_dir=..., as the runs were launched with"
    sub.add_argument("overrides", metavar="STUDY", nargs="*", help=text)
    return parser


# --------------------------------------------------------------------------------------------------------- train


def _train(argv: Sequence[str]) -> int:
    """Compose, check and run: one run, or with -m a study; other options (--help, --cfg, ...) are Hydra's own.

    A sweep that names one of Hydra's launchers or sweepers is left to Hydra as well.
    """
    from relora.training.job import EXIT_CODES, launch

    options = [argument for argument in argv if argument.startswith("-")]
    hydras = any(argument.startswith(("hydra/launcher=", "hydra/sweeper=")) for argument in argv)
    if options in (["-m"], ["--multirun"]) and not hydras:
        if World.here().size > 1:
            raise ConfigError("-m starts the runs of a study by itself; give torchrun a single run, or leave it out")
        from relora.launching.launch import launch_study
        from relora.launching.tune import tune

        overrides = [argument for argument in argv if argument not in options]
        search = sweeps.search(overrides)
        if search is not None:
            return 0 if tune(search, overrides) else 1
        return 0 if launch_study(sweeps.expand(overrides), overrides) else 1
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
            raise ConfigError("cluster=slurm starts a run's processes by itself; leave torchrun out")
        from relora.launching.launch import submit_run

        return 0 if submit_run(config, argv) else 1
    return EXIT_CODES[launch(config, argv).state]


def _hydra_job(composed: Any, overrides: list[str]) -> None:
    """One job of Hydra's own launcher."""
    from relora.training.job import EXIT_CODES, launch

    code = _reported(
        lambda: EXIT_CODES[launch(Presets().noted(compose.to_run_config(composed), overrides), overrides).state]
    )
    if code:
        sys.exit(code)


# ------------------------------------------------------------------------------------------------ exported models


def _plan(arguments: argparse.Namespace) -> int:
    from relora.config import plan

    config = compose.compose(arguments.overrides)
    made = plan.run_plan(config)
    print(json.dumps(plan.as_dict(made, config)) if arguments.json else plan.text(made, config))
    return 0


def _model_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is no model folder: it has no config.json; a run leaves its model in RUN_DIR/model"
        )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and file.read_bytes().startswith(codecs.BOM_UTF8):
            raise ConfigError(
                f"{file} begins with a byte-order mark, which transformers does not read; save it without"
            )
    return folder.absolute()


def _evaluate(arguments: argparse.Namespace) -> int:
    folder = _model_folder(arguments.folder)
    run = read_json(folder / "relora.json")
    limit = read_json(folder / "config.json").get("max_position_embeddings", 1024)
    config = compose.compose([*_as_trained(folder, run, limit), *arguments.overrides])

    from relora.data.corpus import prepare
    from relora.training.evaluate import evaluate
    from relora.training.pretrained import load_pretrained
    from relora.training.processes import choose_device

    def log_line(message: str) -> None:
        print(message, file=sys.stderr)

    device = choose_device(config.trainer.device, World())
    corpus = prepare(config.data, Path(config.runs_dir) / "corpora", log_line)
    if run.get("corpus_digest", corpus.corpus_digest) != corpus.corpus_digest:
        log_line(
            f"note: data={config.data.name} is another text than {run['run']} was trained on, or split in another way: "
            "what is held out here may have been trained on, and no perplexity of that run compares"
        )
    result = evaluate(
        load_pretrained(folder, device),
        corpus.sequences(arguments.split, config.data.sequence_length_tokens),
        sequences_per_batch=run.get("sequences_per_batch", config.trainer.sequences_per_step),
        precision=config.trainer.precision,
        device=device,
    )
    values = {"perplexity": result.perplexity, "loss": result.loss, "tokens": result.tokens, "split": arguments.split}
    text = (
        f"perplexity {result.perplexity:.4f} (loss {result.loss:.5f}) on {result.tokens:,} tokens of {arguments.split}"
    )
    print(json.dumps(values) if arguments.json else text)
    return 0


def _as_trained(folder: Path, run: dict[str, Any], limit: int) -> list[str]:
    """Overrides under which the folder's own run evaluated it; the user's come after them and win."""
    overrides = ["method=full", f"model.max_position_embeddings={limit}", f"data.tokenizer={folder}"]
    if run:
        overrides += [
            f"data.sequence_length_tokens={run['sequence_length_tokens']}",
            f"trainer.precision={run['precision']}",
        ]
    return overrides


def _sample(arguments: argparse.Namespace) -> int:
    folder = _model_folder(arguments.folder)

    from relora.training.sampling import sample

    try:
        text = sample(
            folder,
            arguments.prompt,
            max_new_tokens=arguments.tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(json.dumps({"text": text}) if arguments.json else text)
    return 0


# -------------------------------------------------------------------------------------------------------- MLflow


def _sync(arguments: argparse.Namespace) -> int:
    from relora.runs.state import observe
    from relora.tracking.mirror import Mirror
    from relora.tracking.store import mlflow_errors, print_note

    results, code = {}, 0
    for path in arguments.runs:
        run = RunDir(path.absolute())
        try:
            config = frozen.read_frozen(run.config_file)
            observe([run])
            with mlflow_errors(config):
                sent = Mirror(run, config).sync()
        except (ConfigError, RunError) as error:  # the other runs are sent all the same
            print_note(credentials.redacted(str(error)))
            code = max(code, 2 if isinstance(error, ConfigError) else 1)
            continue
        results[str(path)] = {"rows": sent.rows, "status": sent.status}
        if not arguments.json:
            print(f"{path}: {sent.rows} rows sent, status {sent.status}")
    if arguments.json:
        print(json.dumps(results))
    return code


def _report(arguments: argparse.Namespace) -> int:
    from relora.studies.publish import publish_report

    runs_dir = Path(compose.compose(arguments.overrides).runs_dir)
    if not arguments.json:
        publish_report(runs_dir, arguments.study)
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        study = publish_report(runs_dir, arguments.study)
    from relora.studies.report import as_json

    print(as_json(study))
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from relora.cli import ui

    config = compose.compose(arguments.overrides)
    found = ui.links(config, create=arguments.host is not None)

    def ready(server: str, store: str) -> None:
        urls = {name: f"{server}/{fragment}" for name, fragment in found.items()}
        everything = urls.pop("all")
        if arguments.json:
            print(json.dumps({"url": everything, "studies": urls}), flush=True)
            return
        lines = [f"MLflow UI: {everything}", *(f"study {study}: {url}" for study, url in urls.items())]
        lines += [f"runs of other machines record here with tracker.uri={store}"] if arguments.host else []
        print("\n".join(lines), flush=True)

    if config.mlflow_uri.startswith("http"):
        server = config.mlflow_uri.rstrip("/")
        ready(server, server)
        return 0
    return ui.serve(config, port=arguments.port, host=arguments.host, auth=arguments.auth, ready=ready)


# -------------------------------------------------------------------------------------------------- launched studies


def _runs_dir(overrides: Sequence[str]) -> Path:
    return Path(compose.compose([text for text in overrides if not text.startswith("cluster")]).runs_dir)


def _status(arguments: argparse.Namespace) -> int:
    from relora.launching import manage as control

    runs_dir = _runs_dir(arguments.overrides)
    if arguments.json:
        print(json.dumps(control.status_json(runs_dir, arguments.study)))
        return 0
    return 0 if control.show_status(runs_dir, arguments.study, watch=arguments.watch) else 1


def _logs(arguments: argparse.Namespace) -> int:
    from relora.launching import manage as control

    file = control.log_file(_runs_dir(arguments.overrides), arguments.run)
    print(json.dumps({"file": str(file)}) if arguments.json else file.read_text(errors="replace"), end="")
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from relora.launching import manage as control

    names = control.cancel(_runs_dir(arguments.overrides), arguments.study)
    text = "\n".join([*(f"{name}: cancelled" for name in names), f"{len(names)} runs cancelled"])
    print(json.dumps({"cancelled": names}) if arguments.json else text)
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    from relora.launching import manage as control

    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        done = control.retry(_runs_dir(arguments.overrides), arguments.study, arguments.overrides)
    if arguments.json:
        print(json.dumps({"launched": done}))
    return 0 if done else 1


# ---------------------------------------------------------------------------------------------------------- disk


def _clean(arguments: argparse.Namespace) -> int:
    from relora.studies import clean, disk

    overrides = [word for word in arguments.overrides if "=" in word]
    studies = [word for word in arguments.overrides if "=" not in word]
    found = disk.survey(Path(compose.compose(overrides).runs_dir), studies)
    if arguments.delete:
        clean.delete(found)
    print(json.dumps(clean.as_json(found)) if arguments.json else clean.text(found, deleted=arguments.delete))
    for failure in found.failures:
        print(f"relora: {failure}", file=sys.stderr)
    return 1 if found.failures else 0
