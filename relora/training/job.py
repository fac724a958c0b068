"""One run from its folder to its end: the callable that every launcher runs."""

import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.common import signals
from relora.common.errors import ConfigError, DamagedFile, Interrupted, RunError, Stopped, WarmStartTrained
from relora.common.files import reason, set_aside
from relora.config import compose, credentials
from relora.config.plan import plan, warning
from relora.config.run import RunConfig
from relora.runs import slurm
from relora.runs.metrics import Broadcast, MetricsLog, read_rows, row_metrics
from relora.runs.results import RESULTS
from relora.runs.rundir import PROBE_SECONDS, Attempt, RunDir, Status, read_json, write_json
from relora.runs.spent import other_switches
from relora.runs.state import observe
from relora.tracking.console import Console
from relora.training.distributed import PeerLost, World
from relora.training.processes import (
    build_trainer,
    check_devices,
    choose_device,
    describe_machine,
    in_words,
    take_part,
    then_stop,
)

if TYPE_CHECKING:
    from relora.tracking.mirror import MirrorThread

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}

NODE_LOCK_SECONDS = 60.0
"""How long a requeued job waits for its killed predecessor's lock."""


def launch(config: RunConfig, overrides: Sequence[str] = ()) -> Status:
    """Freeze `config` into its run folder and run it here; the same launch again resumes or says that it is done."""
    run = RunDir(config.run_dir)
    if World.here().is_first:
        run.path.mkdir(parents=True, exist_ok=True)
        (state,) = observe([run])
        if run.submission_file.exists() and state.is_under_way:
            job_id = read_json(run.submission_file)["job"]
            raise RunError(
                f"{run.path} is {state.name} as SLURM job {job_id}; wait for it, or relora cancel {config.name}"
            )
        with run.locked():
            run.submission_file.unlink(missing_ok=True)
            compose.freeze(config, run.config_file)
            write_json(run.launch_file, {"overrides": credentials.without_passwords(overrides)})
    return job(run.path)


def job(path: Path, *, on_node: bool = False, warm_start_only: bool = False) -> Status:
    """Train the frozen run in `path` to its end and tell how it went; returns the final status.

    `on_node`: this is a cluster's node, which may come before the last attempt's process is quite gone and opens no
    MLflow store that is a file. `warm_start_only`: stop when the warm start stands for all runs that share it.

    Raises RunError when another process trains it. Any failure inside is told, recorded and returned, not raised.
    The processes of a World that call it together train it together; rank 0 alone writes and tells.
    """
    run, world = RunDir(path), World.here()
    if not world.is_first:
        with signals.held():
            return take_part(run, world, warm_start_only=warm_start_only)
    with signals.held(), run.locked(NODE_LOCK_SECONDS if on_node else PROBE_SECONDS):
        config, previous = compose.thaw(run.config_file), _previous_status(run)
        if previous is not None and previous.state == "finished":
            print(_already_done(run, config, previous))
            print(summary_text(run, config, previous))
            if _is_mirrored(config, on_node=on_node):
                from relora.tracking.mirror import mirror_all

                mirror_all([(run, config)], print, held_here=True)
            return previous
        status = Status(state="running", git_commit=git_commit(), ranks=world.size)
        if previous is not None:
            status.attempt, status.started_ms = previous.attempt + 1, previous.started_ms
            status.corpus, status.attempts = previous.corpus, previous.attempts
        status.attempts.append(Attempt(ranks=world.size))
        if on_node:
            status.slurm_job_id, status.requeues = slurm.own_job(), slurm.own_requeues()
        run.status = status
        for rank in run.rank_errors:
            run.error_file(rank).unlink()
        run.remove_leftovers()
        _Attempt(run, config, status, world, on_node=on_node, warm_start_only=warm_start_only).run_to_end()
        return status


def _previous_status(run: RunDir) -> Status | None:
    """What the last attempt left. Where that is damaged, the results of a finished run are read from its metrics."""
    try:
        return run.status
    except DamagedFile as error:
        told = f"{error.path} cannot be read: {error.why}; kept as {set_aside(run.status_file).name}"
        rows = [row_metrics(row) for row in read_rows(run.metrics_file)]
        prefix = "summary/"
        known = {name.removeprefix(prefix): row[name] for row in rows for name in row if name.startswith(prefix)}
        if not run.model.is_dir() or not all(name in known for name in RESULTS):
            print(f"note: {told}, going on without it", flush=True)
            return None
        print(f"note: {told}, its results are read from metrics.jsonl; where it was trained is lost", flush=True)
        about = read_json(run.model / "relora.json")
        corpus = {name: about[name] for name in ("corpus_digest", "tokenizer_digest") if name in about}
        counts = ("tokens", "parameters", "trainable_parameters", "restarts", "skipped_updates", "peak_memory_bytes")
        summary = {name: int(value) if name in counts else value for name, value in known.items()}
        run.status = Status(state="finished", host="", pid=0, corpus=corpus, summary={"sample": "", **summary})
        return run.status


class _Attempt:
    """One try at a run: builds the parts, trains, exports, and leaves a true status whatever happens."""

    def __init__(
        self, run: RunDir, config: RunConfig, status: Status, world: World, *, on_node: bool, warm_start_only: bool
    ) -> None:
        self.run, self.config, self.status, self.world = run, config, status, world
        self.attempt, self.earlier = status.attempts[-1], [a for a in status.attempts[:-1] if a.has_trained]
        self.on_node, self.warm_start_only = on_node, warm_start_only
        self.console = Console(config.tokens_per_step)
        self.began = time.perf_counter()

    def run_to_end(self) -> None:
        """Called where signals are held: after training, nothing interrupts the recording of how it went."""
        mirror = None
        try:
            self.console.say(f"run {self.run.path}")
            with signals.asked(self._say_stopping):
                signals.check()
                mirror = self._start_mirror()
                with self.world.joined():
                    self.status.summary = self._train_and_export()
            self.status.state = "finished"
        except BaseException as error:  # the status must be true even for KeyboardInterrupt and SystemExit
            self._record(error)
        finally:
            self.attempt.ended_ms = self.status.ended_ms = time.time_ns() // 1_000_000
            self._write_status()  # first: what prints may fail, as its log may be on a full disk
            self.console.close()
            if mirror is not None:
                mirror.close()
        if self.status.state == "finished":
            print(summary_text(self.run, self.config, self.status))
        else:
            print(f"{self.status.state}: {self.status.message}\ngo on with: {relaunch_command(self.run)}", flush=True)

    def _say_stopping(self, name: str) -> None:
        self.console.say(f"{name}: stopping with a checkpoint, as soon as one can be written (once more: at once)")

    def _write_status(self) -> None:
        """Where that fails, the attempt has failed: a run is finished only if its status says so."""
        try:
            self.run.end_with(self.status)
        except OSError as error:
            if self.status.state == "finished":
                self.status.state, self.status.message = "failed", "the model is trained and exported"
            self.status.message += f"; {self.run.status_file} cannot be written: {reason(error)}"

    def _start_mirror(self) -> "MirrorThread | None":
        if not _is_mirrored(self.config, on_node=self.on_node):
            return None
        from relora.tracking.mirror import Mirror, MirrorThread

        return MirrorThread(Mirror(self.run, self.config), self.console.say)

    def _record(self, error: BaseException) -> None:
        self.console.close()
        self.status.state, self.status.stopped_by = "failed", signals.reason() or ""
        causes = self.run.told_by_ranks if isinstance(error, (PeerLost, KeyboardInterrupt)) else []
        if causes:
            self.status.message = f"{'; '.join(causes)} (in full: {self.run.path}/rank-*.error)"
        elif isinstance(error, WarmStartTrained):
            self.status.state, self.status.message = "interrupted", str(error)
        elif isinstance(error, Interrupted):
            self.status.state = "interrupted"
            self.status.message = f"{error}; a checkpoint is written"
        elif isinstance(error, (KeyboardInterrupt, Stopped)) or signals.interrupted():
            # A library may turn the interruption into an error of its own.
            self.status.state = "interrupted"
            self.status.message = f"{signals.reason() or str(error) or 'Ctrl-C'}; the newest checkpoint stands"
        else:
            self.status.message = in_words(error)
            if self.status.message != str(error):
                traceback.print_exception(error)

    def _train_and_export(self) -> dict[str, Any]:
        with signals.held():  # an interrupted import fails with whatever the library makes of it, or aborts
            from relora.data import corpus as corpora
            from relora.runs import warmstart
            from relora.training.export import check_finite, export
            from relora.training.microsteps import share
            from relora.training.model import loadable_tokenizer_config, peak_memory_bytes, reset_peak_memory

        signals.check()
        config, say, world = self.config, self.console.say, self.world
        share(config, world)  # refused before hours go into the preparation of a text
        device = choose_device(config.trainer.device, world)
        check_devices(device, world)
        describe_machine(self.attempt, device)
        self.status.device = self.attempt.device
        corpus = corpora.prepare_apart(config.data, Path(config.runs_dir) / "corpora", say)
        signals.check()
        self._check_corpus(corpus.identity)
        tokenizer_config, note = loadable_tokenizer_config(corpus.tokenizer_file)
        if note is not None:
            say(note)
        origin = {**corpus.identity, "device": device.type}
        exact = device.type == "cpu" and not any(self.attempt.differs_from(earlier) for earlier in self.earlier)
        with (
            warmstart.shared(config, self.run, origin, say) as publish_warm_start,
            MetricsLog.opened(self.run.metrics_file, exact=exact) as log,
        ):
            world.told_by_first((os.fspath(corpus.folder), publish_warm_start is not None))
            if self.warm_start_only:
                publish_warm_start = then_stop(publish_warm_start)
            trainer = build_trainer(
                self.run,
                config,
                corpus,
                Broadcast([log, self.console]),
                world=world,
                device=device,
                stop=signals.reason,
                on_warm_start=publish_warm_start,
                attempt=self.attempt,
            )
            self._note_begin(trainer.first_step, trainer.counters.training_seconds)
            for lost in log.begin(trainer.first_step):
                say(f"{lost}: " + ("computed again now" if lost.recomputed else "what stood there stays lost"))
            epochs = config.total_steps * config.trainer.sequences_per_step / trainer.training.count
            cost, ranks = trainer.method_cost, f"{world.size} ranks of " if world.size > 1 else ""
            say(
                f"{config.method.name} on {ranks}{device}: {cost.parameters / 1e6:.2f}M parameters, "
                f"{cost.trainable_parameters / 1e6:.2f}M trainable; {config.total_steps} steps of "
                f"{config.tokens_per_step:,} tokens, {epochs:.2f} epochs of the training text"
            )
            if above := warning(plan(config), config):
                say(above)
            reset_peak_memory(device)
            validation = trainer.train()
            self.console.close()
            signals.check()
            check_finite("validation", validation, config)
            exported = export(trainer, corpus, self.run, tokenizer_config)
            self.status.spent = trainer.counters.spent
            summary = {
                "eval_loss": validation.loss,
                "eval_perplexity": validation.perplexity,
                "peak_memory_bytes": max(trainer.counters.peak_memory_bytes, peak_memory_bytes(device)),
                "test_loss": exported.test.loss,
                "test_perplexity": exported.test.perplexity,
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
            log.log(0, {f"summary/{name}": value for name, value in summary.items()})
            log.flush()
        for doubt in exported.doubts:
            self._warn(doubt)
        return summary | self._closing_sample()

    def _note_begin(self, first_step: int, seconds: float) -> None:
        """Record where this attempt goes on, and tell of a machine that is another than before."""
        self.attempt.first_step, self.attempt.seconds_before = first_step, seconds
        self.run.status = self.status
        if self.earlier and self.attempt.differs_from(self.earlier[-1]):
            self.console.say(
                f"note: this machine ({self.attempt.machine}) is another one than before "
                f"({self.earlier[-1].machine}); from step {first_step} on the results can differ in their last digits"
            )

    def _check_corpus(self, identity: dict[str, str]) -> None:
        """The text under a run must not change between its attempts."""
        if self.status.corpus and self.status.corpus != identity:
            raise RunError(
                f"the text of data={self.config.data.name} has changed since this run began: {identity} instead of "
                f"{self.status.corpus}; restore it, or remove {self.run.path} to start anew"
            )
        self.status.corpus = identity
        self.run.status = self.status

    def _closing_sample(self) -> dict[str, str]:
        """A decoration: where it fails, that is a warning and the run is finished all the same."""
        from relora.training.export import closing_sample

        try:
            return {"sample": closing_sample(self.run.model, prompt_for(self.config), self.config.trainer.seed)}
        except Exception as error:  # whatever it is, the results stand
            self._warn(f"the closing sample could not be written: {in_words(error)}")
            return {}

    def _warn(self, doubt: str) -> None:
        """Tell a doubt, and keep it in the status of a run that is finished all the same."""
        self.console.say(f"warning: {doubt}")
        self.status.message = "; ".join(filter(None, (self.status.message, doubt)))


# ------------------------------------------------------------------------------------------------ small questions


def _is_mirrored(config: RunConfig, *, on_node: bool) -> bool:
    return config.tracker.name == "mlflow" and not (on_node and config.mlflow_uri.startswith("sqlite:"))


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


def _already_done(run: RunDir, config: RunConfig, status: Status) -> str:
    text = f"{run.path} is finished already; change a setting or trainer.seed for another run, or remove the folder"
    commit = git_commit()
    if commit != status.git_commit:
        text += f"\nnote: it was trained by commit {status.git_commit}, this is {commit}"
    if switches := other_switches(config, status.spent):
        text += f"\nnote: it was trained with {switches}; its speed and memory are theirs"
    return text


def _overrides(run: RunDir) -> list[str]:
    return credentials.without_passwords(read_json(run.launch_file).get("overrides", []))


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
        *(("machine", f"another one from step {step} on: {machine}") for step, machine in status.machine_changes),
        ("peak memory", f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("model", f"{run.model}"),
        ("run", f"{run.path}"),
        ("write more", _verb("sample", os.fspath(run.model), "--prompt", prompt_for(config), run=run)),
    ]
    if config.tracker.name == "mlflow":
        rows.append(("MLflow UI", _verb("ui", run=run)))
    # In a study the baselines come by themselves.
    if not config.method.is_full_rank and "-m" not in _overrides(run):
        rows.append(("baseline", baseline_command(run)))
    if status.message:
        rows.append(("warning", status.message))
    width = max(len(name) for name, _ in rows)
    lines = ["", *(f"{name:<{width}}  {value}" for name, value in rows)]
    if "sample" in found:
        text = "\n".join(f"  | {line}" for line in found["sample"].splitlines())
        lines = ["", "the model writes:", text, *lines]
    return "\n".join(lines)


if __name__ == "__main__":
    with signals.whole_process():
        try:
            sys.exit(EXIT_CODES[job(Path(sys.argv[1])).state])
        except (ConfigError, RunError, OSError) as problem:
            sys.exit(f"relora: {problem}" if World.here().is_first else 1)
