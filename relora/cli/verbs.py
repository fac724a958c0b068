"""The verbs of `relora`, except train. Each gets its parsed arguments and returns the exit code."""

import argparse
import codecs
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora.cli import evaluation
from relora.common.errors import ConfigError, RunError, print_note
from relora.common.files import read_json
from relora.config import compose, credentials, frozen
from relora.config.data import SEQUENCE_KEYS
from relora.runs.rundir import RunDir
from relora.training.distributed import World

# ------------------------------------------------------------------------------------------------ exported models


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan of a run, or with -m of a study: parameters, FLOPs, memory, time and disk. Start nothing."""
    from relora.launching import preview

    overrides, measure = arguments.overrides, arguments.measure
    if arguments.multirun:
        values, text = preview.launch_values, preview.launch_text
        print(json.dumps(values(overrides, measure=measure)) if arguments.json else text(overrides, measure=measure))
        return 0
    config = compose.compose(overrides)
    values, text = preview.run_values, preview.run_text
    print(json.dumps(values(config, measure=measure)) if arguments.json else text(config, measure=measure))
    return 0


def _model_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a model folder: it has no config.json; a run exports its model to RUN_DIR/model"
        )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and file.read_bytes().startswith(codecs.BOM_UTF8):
            raise ConfigError(
                f"{file} begins with a byte-order mark, which transformers does not accept; save the file without it"
            )
    return folder.absolute()


def evaluate(arguments: argparse.Namespace) -> int:
    """Print the perplexity of an exported model on held-out text."""
    folder = _model_folder(arguments.folder)
    run = read_json(folder / "relora.json")
    limit = read_json(folder / "config.json").get("max_position_embeddings", 1024)
    as_trained = _as_trained(folder, run, limit)
    config = compose.compose([*as_trained, *arguments.overrides])

    from relora.data.corpus import prepare, prepared_with
    from relora.training.evaluate import evaluate
    from relora.training.pretrained import load_pretrained
    from relora.training.processes import choose_device

    def log_line(message: str) -> None:
        print(message, file=sys.stderr)

    device = choose_device(config.trainer.device, World())
    corpora, corpus = Path(config.runs_dir) / "corpora", None
    if "tokenizer_digest" in run:  # the run's own corpus has these tokens: it is not prepared again
        of_text = [override for override in as_trained if not override.startswith("data.tokenizer=")]
        own = compose.compose([*of_text, *arguments.overrides])
        corpus = prepared_with(own.data, corpora, run["tokenizer_digest"])
    if corpus is None:
        corpus = prepare(config.data, corpora, log_line)
    if run.get("corpus_digest", corpus.corpus_digest) != corpus.corpus_digest:
        log_line(
            f"note: data={config.data.name} is not the text, or not the split, of the training of {run['run']}: the "
            "held-out text may be in its training data, and this perplexity cannot be compared with the run's"
        )
    sequences = corpus.sequences(arguments.split, config.data)
    as_in_the_run = run.get("sequences_per_batch", config.trainer.sequences_per_step)
    result = evaluate(
        load_pretrained(folder, device),
        sequences,
        sequences_per_batch=config.trainer.sequences_per_micro_step or as_in_the_run,
        precision=config.trainer.precision,
        device=device,
    )
    values = evaluation.values(result, sequences.count, config.data, corpus, arguments.split)
    print(json.dumps(values) if arguments.json else evaluation.text(values))
    return 0


def _as_trained(folder: Path, run: dict[str, Any], limit: int) -> list[str]:
    """The overrides with which the model's run evaluated it. The user's overrides come after them and win."""
    overrides = ["method=full", f"model.max_position_embeddings={limit}"]
    if any(folder.glob("token*")) or any(folder.glob("*.model")):
        overrides.append(f"data.tokenizer={folder}")
    if run:
        # A model that an earlier version exported has no packing: its run attended across documents.
        overrides += [f"data.{key}={run[key]}" for key in SEQUENCE_KEYS if key in run]
        overrides.append(f"trainer.precision={run['precision']}")
    return overrides


def sample(arguments: argparse.Namespace) -> int:
    """Print text that an exported model generates."""
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


def sync(arguments: argparse.Namespace) -> int:
    """Send the data that MLflow lacks of the given runs."""
    from relora.runs.state import observe
    from relora.tracking.mirror import Mirror
    from relora.tracking.store import mlflow_errors

    results, code = {}, 0
    for path in arguments.runs:
        run = RunDir(path.absolute())
        try:
            config = frozen.read_frozen(run.config_file)
            observe([run])
            with mlflow_errors(config):
                sent = Mirror(run, config).sync()
        except (ConfigError, RunError) as error:  # the other runs are still sent
            print_note(credentials.redacted(str(error)))
            code = max(code, 2 if isinstance(error, ConfigError) else 1)
            continue
        results[str(path)] = {"rows": sent.rows, "status": sent.status}
        if not arguments.json:
            print(f"{path}: {sent.rows} rows sent, status {sent.status}")
    if arguments.json:
        print(json.dumps(results))
    return code


def report(arguments: argparse.Namespace) -> int:
    """Write the report of a study, and print its answer."""
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


def ui(arguments: argparse.Namespace) -> int:
    """Serve the MLflow UI and print its links."""
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
        lines += [f"runs on other machines record here with tracker.uri={store}"] if arguments.host else []
        print("\n".join(lines), flush=True)

    if config.mlflow_uri.startswith("http"):
        server = config.mlflow_uri.rstrip("/")
        ready(server, server)
        return 0
    return ui.serve(config, port=arguments.port, host=arguments.host, auth=arguments.auth, ready=ready)


# -------------------------------------------------------------------------------------------------- launched studies


def _runs_dir(overrides: Sequence[str]) -> Path:
    return Path(compose.compose([text for text in overrides if not text.startswith("cluster")]).runs_dir)


def status(arguments: argparse.Namespace) -> int:
    """Print the state of a study's runs."""
    from relora.launching import manage

    runs_dir = _runs_dir(arguments.overrides)
    if arguments.json:
        print(json.dumps(manage.status_json(runs_dir, arguments.study)))
        return 0
    return 0 if manage.show_status(runs_dir, arguments.study, watch=arguments.watch) else 1


def logs(arguments: argparse.Namespace) -> int:
    """Print the log of a run."""
    from relora.launching import manage

    file = manage.log_file(_runs_dir(arguments.overrides), arguments.run)
    print(json.dumps({"file": str(file)}) if arguments.json else file.read_text(errors="replace"), end="")
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """Stop the queued and running runs of a study."""
    from relora.launching import manage

    names = manage.cancel(_runs_dir(arguments.overrides), arguments.study)
    text = "\n".join([*(f"{name}: cancelled" for name in names), f"{len(names)} runs cancelled"])
    print(json.dumps({"cancelled": names}) if arguments.json else text)
    return 0


def retry(arguments: argparse.Namespace) -> int:
    """Launch failed and stopped runs of a study again."""
    from relora.launching import manage

    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        done = manage.retry(_runs_dir(arguments.overrides), arguments.study, arguments.overrides)
    if arguments.json:
        print(json.dumps({"launched": done}))
    return 0 if done else 1


# ---------------------------------------------------------------------------------------------------------- disk


def clean(arguments: argparse.Namespace) -> int:
    """Print the disk space of runs. With --delete, delete the files that are not needed."""
    from relora.studies import clean, disk

    overrides = [word for word in arguments.overrides if "=" in word]
    studies = [word for word in arguments.overrides if "=" not in word]
    found = disk.survey(Path(compose.compose(overrides).runs_dir), studies)
    if arguments.delete:
        clean.delete(found)
    print(json.dumps(clean.as_json(found)) if arguments.json else clean.text(found, deleted=arguments.delete))
    for failure in found.failures:
        print_note(str(failure))
    return 1 if found.failures else 0
