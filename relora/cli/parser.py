"""The arguments of each verb of `relora`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from relora.cli import data, verbs
from relora.common.errors import printable


class _Parser(argparse.ArgumentParser):
    """A parser that prints an error in one line, without the usage page."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"relora: {printable(message)}; {self.prog} --help shows its options\n")


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """Return an argument type: a number from `low` to `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be from {low} to {high}")
        return value

    number.__name__ = kind.__name__  # argparse shows this name when the text is not a number
    return number


def build_parser() -> argparse.ArgumentParser:
    """The parser of `relora VERB`. Each verb sets `verb` to its function in relora.cli.verbs."""
    parser = _Parser(
        prog="relora",
        description="Pre-train with ReLoRA and inspect the results.",
        epilog="relora train [key=value ...] is python run.py [key=value ...]; python run.py --help shows the config.",
    )
    subparsers = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(
        name: str, action: Callable[[argparse.Namespace], int], text: str, among: Any = subparsers
    ) -> argparse.ArgumentParser:
        sub = among.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.set_defaults(verb=action)
        return sub

    subparsers.add_parser("train", help="train: the same as python run.py", add_help=False)

    sub = verb(
        "plan",
        verbs.plan,
        "Show what a run will need compared with full rank: parameters, FLOPs, memory, time. Nothing is started.",
    )
    text = "the runs of a study, as python run.py -m would launch them, and what exists already"
    sub.add_argument("-m", "--multirun", action="store_true", help=text)
    text = "train some steps on random tokens here to measure the time (default: the speed of finished runs)"
    sub.add_argument("--measure", action="store_true", help=text)
    sub.add_argument("overrides", nargs="*", help="as for python run.py")

    text = "Prepare the corpus of a run, or show what is in it: relora data prepare, relora data inspect."
    actions = subparsers.add_parser("data", help=text, description=text).add_subparsers(required=True, metavar="ACTION")
    sub = verb("prepare", data.prepare, "Turn the text into tokens. After a kill, the same command goes on.", actions)
    sub.add_argument(
        "--workers",
        type=_number(int, 1, 1024),
        default=None,
        help="processes that encode (default: one for each CPU; 1: this process, with the threads of its tokenizer)",
    )
    sub.add_argument("overrides", nargs="*", help="as for python run.py; data=... and runs_dir=... matter")
    sub = verb("inspect", data.inspect, "Show sizes, lengths, tokens and samples of a prepared corpus.", actions)
    sub.add_argument("overrides", nargs="*", help="as for python run.py; data=... and runs_dir=... matter")

    sub = verb("evaluate", verbs.evaluate, "Print the perplexity of an exported model on held-out text.")
    sub.add_argument("folder", type=Path, help="the model folder of a run, or any local Hugging Face folder")
    sub.add_argument("--split", choices=("test", "validation"), default="test")
    text = "data=..., runs_dir=..., trainer.device=..., trainer.sequences_per_micro_step=... (default: as in its run)"
    sub.add_argument("overrides", nargs="*", help=text)

    sub = verb("sample", verbs.sample, "Print text that an exported model generates.")
    sub.add_argument("folder", type=Path, help="the model folder of a run")
    sub.add_argument("--prompt", default="", help="the text to continue (default: the beginning of a document)")
    sub.add_argument(
        "--tokens",
        type=_number(int, 1, 10**6),
        default=80,
        help="the maximum number of tokens to generate (default: %(default)s)",
    )
    sub.add_argument(
        "--temperature",
        type=_number(float, 0, 1000),
        default=0.8,
        help="0 always picks the most likely token (default: %(default)s)",
    )
    sub.add_argument("--seed", type=_number(int, 0, 2**63 - 1), default=0)
    sub.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)

    sub = verb("report", verbs.report, "Write a study's tables and pictures: report.md, report.html and results.csv.")
    sub.add_argument("study")
    sub.add_argument("overrides", nargs="*", help="runs_dir=..., as at the study's launch")

    where = "runs_dir=..., as at the launch"
    sub = verb("status", verbs.status, "Show the runs of a study: state, step, time left, perplexity, problems.")
    sub.add_argument("study", help="a study, or the name of a run")
    sub.add_argument("--watch", action="store_true", help="show the table again until every run has ended")
    sub.add_argument("overrides", nargs="*", help=where)

    sub = verb("logs", verbs.logs, "Show the log of a run that was submitted or is part of a study.")
    sub.add_argument("run", metavar="[STUDY/]RUN", help="the run's name, or a unique part of the name")
    sub.add_argument("overrides", nargs="*", help=where)

    sub = verb(
        "cancel", verbs.cancel, "Stop the queued and running runs of a study, or one run. They can be launched again."
    )
    sub.add_argument("study", help="a study, or the name of a run")
    sub.add_argument("overrides", nargs="*", help=where)

    sub = verb("retry", verbs.retry, "Launch the failed and stopped runs of a study again, from their frozen configs.")
    sub.add_argument("study")
    sub.add_argument("overrides", nargs="*", help=where + ", and cluster settings to change, such as cluster.mem_gb=32")

    sub = verb("ui", verbs.ui, "Serve the MLflow UI on the runs' store until Ctrl-C, and print its link.")
    sub.add_argument(
        "--port", type=_number(int, 0, 65535), default=None, help="default: 5000, or a free port if 5000 is in use"
    )
    text = "accept other machines at this name or address of this machine; creates the store if there is none"
    sub.add_argument("--host", metavar="NAME", default=None, help=text)
    text = "ask for a password, with MLflow's basic auth; needs pip install 'mlflow[auth]'"
    sub.add_argument("--auth", action="store_true", help=text)
    sub.add_argument("overrides", nargs="*", help="runs_dir=..., tracker.uri=..., as at the launch of the runs")

    sub = verb(
        "sync", verbs.sync, "Send the data that MLflow lacks of the given runs, and correct the state of dead runs."
    )
    sub.add_argument("runs", type=Path, nargs="+", help="run folders")

    sub = verb("clean", verbs.clean, "Show the disk space of checkpoints, models and warm starts. --delete frees it.")
    sub.add_argument(
        "--delete", action="store_true", help="delete the files listed as deletable (default: only list them)"
    )
    text = "the studies of the runs (default: all runs), and runs_dir=..., as at their launch"
    sub.add_argument("overrides", metavar="STUDY", nargs="*", help=text)
    return parser
