"""One run from its folder to its end: the callable that every launcher runs."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from relora import compose
from relora.config import RunConfig
from relora.console import Console
from relora.errors import ConfigError, RunError
from relora.metrics import Broadcast, MetricsLog
from relora.rundir import PROBE_SECONDS, RunDir, Status, read_json, write_json

if TYPE_CHECKING:
    import torch

    from relora.corpus import Corpus
    from relora.tracking import MirrorThread
    from relora.trainer import Trainer

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}
SAMPLE_TOKENS = 80
SAMPLE_TEMPERATURE = 0.8

NODE_LOCK_SECONDS = 60.0
"""How long a requeued job waits for its killed predecessor's lock."""

STOP_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR2: "SIGUSR2"}

WARM_START_STANDS = "the warm start is trained; the runs that share it go on from there"

MENDABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
"""A full disk and its kin: nothing a traceback could explain."""

MERGE_TOLERANCE = {"fp32": 1e-3, "bf16_autocast": 1e-3, "bf16": 5e-2}
"""How far the merged model's logits may be from the factored one's, relative to the largest: storage rounding."""


def launch(config: RunConfig, overrides: Sequence[str] = ()) -> Status:
    """Freeze `config` into its run folder and run it here; the same launch again resumes or says that it is done."""
    run = RunDir(config.run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    with run.locked():
        compose.freeze(config, run.config_file)
        write_json(run.launch_file, {"overrides": list(overrides)})
    return job(run.path)


def job(path: Path, *, on_node: bool = False, warm_start_only: bool = False) -> Status:
    """Train the frozen run in `path` to its end and tell how it went; returns the final status.

    `on_node`: this is a cluster's node, which may come before the last attempt's process is quite gone and opens no
    MLflow store that is a file. `warm_start_only`: stop when the warm start stands for all runs that share it.

    Raises RunError when another process trains it. Any failure inside is told, recorded and returned, not raised.
    """
    run = RunDir(path)
    with run.locked(NODE_LOCK_SECONDS if on_node else PROBE_SECONDS):
        config, previous = compose.thaw(run.config_file), run.status
        if previous is not None and previous.state == "finished":
            print(_already_done(run, previous))
            print(summary_text(run, config, previous))
            return previous
        status = Status(state="running", git_commit=git_commit())
        if previous is not None:
            status.attempt, status.started_ms = previous.attempt + 1, previous.started_ms
            status.corpus = previous.corpus
        status.slurm_job_id = os.environ.get("SLURM_JOB_ID", "") if on_node else ""
        run.status = status
        _Attempt(run, config, status, on_node=on_node, warm_start_only=warm_start_only).run_to_end()
        return status


class _Attempt:
    """One try at a run: builds the parts, trains, exports, and leaves a true status whatever happens."""

    def __init__(self, run: RunDir, config: RunConfig, status: Status, *, on_node: bool, warm_start_only: bool) -> None:
        self.run, self.config, self.status = run, config, status
        self.on_node, self.warm_start_only = on_node, warm_start_only
        self.console = Console(config.tokens_per_step)
        self.signals = StopSignals(self.console.say)
        self.began = time.perf_counter()

    def run_to_end(self) -> None:
        self.console.say(f"run {self.run.path}")
        with self.signals.installed():
            mirror = self._start_mirror()
            try:
                self.status.summary = self._train_and_export()
                self.status.state = "finished"
            except BaseException as error:  # the status must be true even for KeyboardInterrupt and SystemExit
                self._record(error)
            finally:
                self.console.close()
                self.status.ended_ms = time.time_ns() // 1_000_000
                self._write_status()
                if mirror is not None:
                    mirror.close()
        if self.status.state == "finished":
            print(summary_text(self.run, self.config, self.status))
        else:
            print(f"{self.status.state}: {self.status.message}\ngo on with: {relaunch_command(self.run)}", flush=True)

    def _write_status(self) -> None:
        try:
            self.run.status = self.status
        except OSError as error:
            print(f"{self.run.path} still says that the run is running: {error}", flush=True)

    def _start_mirror(self) -> "MirrorThread | None":
        if self.config.tracker.name != "mlflow" or (self.on_node and self.config.mlflow_uri.startswith("sqlite:")):
            return None
        from relora.tracking import Mirror, MirrorThread

        return MirrorThread(Mirror(self.run, self.config), self.console.say)

    def _record(self, error: BaseException) -> None:
        from relora.trainer import Interrupted

        self.console.close()
        self.status.state, self.status.stopped_by = "failed", self.signals.reason or ""
        if isinstance(error, WarmStartTrained):
            self.status.state, self.status.message = "interrupted", WARM_START_STANDS
        elif isinstance(error, Interrupted):
            self.status.state = "interrupted"
            self.status.message = f"{error}; a checkpoint is written"
        elif isinstance(error, KeyboardInterrupt):
            self.status.state = "interrupted"
            self.status.message = f"{self.signals.reason or 'Ctrl-C'}; the newest checkpoint stands"
        elif isinstance(error, (ConfigError, RunError)) or (
            isinstance(error, OSError) and error.errno in MENDABLE_ERRNOS
        ):
            self.status.message = str(error)
        else:
            traceback.print_exception(error)
            self.status.message = f"{type(error).__name__}: {error}"

    def _train_and_export(self) -> dict[str, Any]:
        import torch

        from relora import corpus as corpora
        from relora import warmstart
        from relora.model import build, peak_memory_bytes, reset_peak_memory
        from relora.trainer import Trainer

        config, say = self.config, self.console.say
        device = choose_device(config.trainer.device)
        self.status.device = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
        corpus = corpora.prepare_apart(config.data, Path(config.runs_dir) / "corpora", say)
        self._check_corpus(corpus.identity)
        vocab_size = config.model.vocab_size or corpus.vocab_size
        if vocab_size < corpus.vocab_size:
            raise RunError(
                f"model.vocab_size={vocab_size} is below the tokenizer's {corpus.vocab_size}; "
                "leave model.vocab_size null"
            )
        length = config.data.sequence_length_tokens
        training = corpus.sequences("train", length)
        origin = {**corpus.identity, "device": device.type}
        with (
            warmstart.shared(config, self.run, origin, say) as publish_warm_start,
            MetricsLog.opened(self.run.metrics_file, exact=device.type == "cpu") as log,
        ):
            if self.warm_start_only:
                publish_warm_start = _then_stop(publish_warm_start)
            trainer = Trainer(
                config,
                build(
                    config.model,
                    config.trained_shape(vocab_size),
                    end_of_text_id=corpus.end_of_text_id,
                    seed=config.trainer.seed,
                ),
                training,
                corpus.sequences("validation", length),
                Broadcast([log, self.console]),
                vocab_size=vocab_size,
                checkpoint_folder=self.run.checkpoints,
                device=device,
                stop=lambda: self.signals.reason,
                on_warm_start=publish_warm_start,
            )
            epochs = config.total_steps * config.trainer.sequences_per_step / training.count
            cost = trainer.method_cost
            say(
                f"{config.method.name} on {device}: {cost.parameters / 1e6:.2f}M parameters, "
                f"{cost.trainable_parameters / 1e6:.2f}M trainable; {config.total_steps} steps of "
                f"{config.tokens_per_step:,} tokens, {epochs:.2f} epochs of the training text"
            )
            reset_peak_memory(device)
            with self.signals.asking():
                validation = trainer.train()
            self.console.close()
            summary = {
                "eval_loss": validation.loss,
                "eval_perplexity": validation.perplexity,
                "peak_memory_bytes": max(trainer.counters.peak_memory_bytes, peak_memory_bytes(device)),
                **self._export(trainer, corpus),
                **trainer.progress_metrics(config.total_steps),
                "restarts": trainer.clock.restarts_before(config.total_steps),
                "skipped_updates": trainer.counters.skipped_updates,
                "parameters": cost.parameters,
                "trainable_parameters": cost.trainable_parameters,
                "training_seconds": trainer.counters.training_seconds,
                "tokens_per_second": config.total_steps * config.tokens_per_step / trainer.counters.training_seconds,
                "wall_clock_seconds": time.perf_counter() - self.began,
            }
            summary = {name.removeprefix("progress/"): value for name, value in summary.items()}
            numbers = {f"summary/{name}": value for name, value in summary.items() if not isinstance(value, str)}
            log.log(0, numbers)
        return summary

    def _check_corpus(self, identity: dict[str, str]) -> None:
        """The text under a run must not change between its attempts."""
        if self.status.corpus and self.status.corpus != identity:
            raise RunError(
                f"the text of data={self.config.data.name} has changed since this run began: {identity} instead of "
                f"{self.status.corpus}; restore it, or remove {self.run.path} to start anew"
            )
        self.status.corpus = identity
        self.run.status = self.status

    def _export(self, trainer: "Trainer", corpus: "Corpus") -> dict[str, Any]:
        """Leave the model as a Hugging Face folder, checked; evaluate and sample what is in that folder."""
        import numpy as np
        import torch

        from relora.evaluate import evaluate
        from relora.model import load_pretrained, logits, sample, save_pretrained

        config, device, model = self.config, trainer.device, trainer.model.eval()
        batch = trainer.counters.sequences_per_micro_step
        length = config.data.sequence_length_tokens
        probe_BxT = trainer.validation.batch(np.arange(1, dtype=np.int64))[0].to(device)
        with torch.no_grad():
            trained = logits(model, probe_BxT).float()
            trainer.method.finish(model)
            merged = logits(model, probe_BxT).float()
            settings = {"sequences_per_batch": batch, "precision": config.trainer.precision}
            run = {"run": config.name, "sequence_length_tokens": length, **settings, **corpus.identity}
            save_pretrained(model, corpus.tokenizer_file, self.run.model, run)
            exported = load_pretrained(self.run.model, device)
            loaded = logits(exported, probe_BxT).float()
        scale = trained.abs().max().item()
        merge_error = (merged - trained).abs().max().item() / scale
        load_error = (loaded - merged).abs().max().item() / scale
        if not (merge_error <= MERGE_TOLERANCE[config.trainer.precision] and load_error <= 1e-5):
            raise RunError(
                f"the exported model does not compute what was trained: logits off by {merge_error:.1e} after the "
                f"merge and {load_error:.1e} after loading, relative to the largest; the training state stands in "
                f"{self.run.checkpoints}"
            )
        test = evaluate(exported, corpus.sequences("test", length), device=device, **settings)
        text = sample(
            self.run.model,
            prompt_for(config),
            max_new_tokens=SAMPLE_TOKENS,
            temperature=SAMPLE_TEMPERATURE,
            seed=config.trainer.seed,
        )
        return {"test_loss": test.loss, "test_perplexity": test.perplexity, "sample": text}


class WarmStartTrained(Exception):  # noqa: N818 -- no error
    """The warm start stands, and this job was to do no more."""


def _then_stop(publish: Callable[[], None] | None) -> Callable[[], None]:
    """`publish`, and then no further; at once where there is nothing to publish."""
    if publish is None:
        raise WarmStartTrained

    def publish_and_stop() -> None:
        publish()
        raise WarmStartTrained

    return publish_and_stop


class StopSignals:
    """Ctrl-C, SIGTERM and SLURM's SIGUSR2: a wish while the trainer asks for it, an interruption elsewhere.

    The same signal once more is an interruption too, but for SIGUSR2, which SLURM may send at any time.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.reason: str | None = None
        self._asking = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = STOP_SIGNALS[signal.Signals(number)]
        again = self.reason == name and number != signal.SIGUSR2
        self.reason = name
        if again or not self._asking:
            raise KeyboardInterrupt
        self.say(f"{self.reason}: stopping after this update, with a checkpoint (once more: at once, without)")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle them inside."""
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, the first signal only sets `reason`."""
        self._asking = True
        try:
            yield
        finally:
            self._asking = False


# ------------------------------------------------------------------------------------------------ small questions


def choose_device(name: str) -> "torch.device":
    """The device that `trainer.device` means here. Raises RunError where there is none."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= seen:
            raise RunError(f"trainer.device={name}: torch sees {seen} CUDA devices; take trainer.device=auto or cpu")
    return torch.device(name)


def prompt_for(config: RunConfig) -> str:
    """What a trained model is asked to go on from: a Python definition, or the beginning of a text."""
    return "def " if config.data.name == "stdlib" else ""


def git_commit() -> str | None:
    """The commit of this package's checkout, with "-dirty" where it is changed; None outside one."""
    command = [
        "git",
        "-C",
        os.fspath(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --------------------------------------------------------------------------------------------- what a person reads


def _already_done(run: RunDir, status: Status) -> str:
    text = f"{run.path} is finished already; change a setting or trainer.seed for another run, or remove the folder"
    commit = git_commit()
    if commit != status.git_commit:
        text += f"\nnote: it was trained by commit {status.git_commit}, this is {commit}"
    return text


def _overrides(run: RunDir) -> list[str]:
    return list(read_json(run.launch_file).get("overrides", []))


def relaunch_command(run: RunDir) -> str:
    """What resumes the run."""
    return shlex.join(["python", "run.py", *_overrides(run)])


def baseline_command(run: RunDir) -> str:
    """The full-rank run that compares with this one: its overrides less what belongs to the method."""
    rates = ("optimizer.learning_rate", "optimizer.embedding_learning_rate")
    own = ("method", "+method", *rates, "schedule.restart_warmup_steps")
    kept = [override for override in _overrides(run) if not override.startswith(own)]
    return shlex.join(["python", "run.py", "method=full", *kept])


def _verb(verb: str, *arguments: str, run: RunDir) -> str:
    """A relora command, with the overrides that say where this run's store is."""
    where = [override for override in _overrides(run) if override.startswith(("runs_dir=", "tracker."))]
    return shlex.join(["relora", verb, *arguments, *where])


def summary_text(run: RunDir, config: RunConfig, status: Status) -> str:
    """What a finished run says of itself."""
    found = status.summary
    rows = [
        ("perplexity", f"{found['test_perplexity']:.2f} on test, {found['eval_perplexity']:.2f} on validation"),
        ("tokens", f"{found['tokens']:,} in {config.total_steps} updates, {found['skipped_updates']} skipped"),
        ("restarts", f"{found['restarts']}"),
        (
            "parameters",
            f"{found['parameters'] / 1e6:.2f}M, {found['trainable_parameters'] / 1e6:.2f}M trainable",
        ),
        (
            "wall-clock",
            f"{found['wall_clock_seconds']:.0f} s"
            + (f" in attempt {status.attempt}" if status.attempt > 1 else "")
            + f", {found['training_seconds']:.0f} s of it in updates"
            + f" ({found['tokens'] / found['training_seconds']:,.0f} tokens/s)",
        ),
        ("peak memory", f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("model", f"{run.model}"),
        ("run", f"{run.path}"),
        ("write more", _verb("sample", os.fspath(run.model), "--prompt", prompt_for(config), run=run)),
    ]
    if config.tracker.name == "mlflow":
        rows.append(("MLflow UI", _verb("ui", run=run)))
    # In a study the baselines come by themselves.
    if config.method.name != "full" and "-m" not in _overrides(run):
        rows.append(("baseline", baseline_command(run)))
    text = "\n".join(f"  | {line}" for line in found["sample"].splitlines())
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", "the model writes:", text, "", *(f"{name:<{width}}  {value}" for name, value in rows)])


if __name__ == "__main__":
    try:
        sys.exit(EXIT_CODES[job(Path(sys.argv[1])).state])
    except (ConfigError, RunError) as problem:
        sys.exit(f"relora: {problem}")
