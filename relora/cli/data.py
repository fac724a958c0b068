"""The actions of `relora data`: prepare the corpus of a run, and show what is in it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relora.common.errors import RunError
from relora.config import compose
from relora.config.run import RunConfig

if TYPE_CHECKING:
    from relora.data.corpus import Corpus


def prepare(arguments: argparse.Namespace) -> int:
    """Prepare the corpus, and print its folder."""
    config, corpora = _config_and_corpora(arguments.overrides)
    corpus = _prepared(config, corpora, arguments.workers)
    values = {"folder": str(corpus.folder), "vocab_size": corpus.vocab_size, "splits": corpus.splits, **corpus.identity}
    print(json.dumps(values) if arguments.json else f"corpus {corpus.folder}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print what is in a prepared corpus."""
    config, corpora = _config_and_corpora(arguments.overrides)

    from relora.data.corpus import folder_of, load
    from relora.data.inspection import inspect, text

    folder = folder_of(config.data, corpora)
    if not (folder / "meta.json").exists():
        raise RunError(f"{folder} is not prepared; run relora data prepare with the same settings first")
    corpus = load(folder)
    if not corpus.parts:
        found = inspect(corpus, config.data, config.trainer.seed)
        print(json.dumps(found) if arguments.json else text(found))
        return 0
    parts = {name: inspect(part, config.data, config.trainer.seed) for name, part in corpus.parts.items()}
    if arguments.json:
        print(json.dumps({"folder": str(folder), "shares": corpus.shares, "parts": parts, **corpus.identity}))
    else:
        blocks = [
            f"{name}, {corpus.shares[name] / 10:g}% of the mixture\n\n{text(part)}" for name, part in parts.items()
        ]
        print("\n\n\n".join(blocks))
    return 0


def _config_and_corpora(overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    config = compose.compose(overrides)
    return config, Path(config.runs_dir) / "corpora"


def _prepared(config: RunConfig, corpora: Path, workers: int | None) -> "Corpus":
    from relora.data.corpus import prepare

    def log_line(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    return prepare(config.data, corpora, log_line, workers=workers)
