"""One run from its folder to its end: `job`, the function that every launcher calls."""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relora.common import signals
from relora.common.errors import ConfigError, Interrupted, RunError, Stopped, WarmStartTrained
from relora.common.files import reason, write_whole
from relora.config import credentials, frozen
from relora.config.plan import run_plan
from relora.config.plan_text import warnings
from relora.config.run import RunConfig
from relora.runs import slurm
from relora.runs.code import code_of, modules_of
from relora.runs.metrics import Broadcast, MetricsLog
from relora.runs.recovery import previous_status
from relora.runs.rundir import PROBE_SECONDS, Attempt, RunDir, Status, read_json, write_json
from relora.runs.state import observe
from relora.tracking.console import Console
from relora.training.distributed import PeerLost, World
from relora.training.processes import (
    build_trainer,
    check_devices,
    choose_device,
    describe_machine,
    in_words,
    run_worker,
    stopping_after,
)
from relora.training.summary import finished_already, prompt_for, relaunch_command, summary_text

if TYPE_CHECKING:
    from relora.tracking.mirror import MirrorThread

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}

NODE_LOCK_SECONDS = 60.0
"""How long a requeued job waits for the lock of its killed predecessor."""


def launch(config: RunConfig, overrides: Sequence[str] = ()) -> Status:
    """Freeze `config` into its run folder and run it on this machine.

    The same launch again resumes the run, or prints that it is finished.

    Args:
        config: The run.
        overrides: The command-line overrides, kept for the commands that the run prints.

    Returns:
        The final status.

    Raises:
        RunError: The run is under way, here or as a SLURM job.
    """
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
            frozen.freeze(config, run.config_file)
            write_json(run.launch_file, {"overrides": credentials.without_passwords(overrides)})
    return job(run.path)


def job(path: Path, *, on_node: bool = False, warm_start_only: bool = False) -> Status:
    """Train the frozen run in `path` to its end and print its result.

    All processes of a World call this together and train the run together. Only rank 0 writes files and prints.

    Args:
        path: The folder of the run.
        on_node: Whether this runs on a node of a cluster. A node waits longer for the lock, because the process of the
            last attempt may still be ending. It does not open an MLflow store that is a file.
        warm_start_only: Stop when the warm start is trained and published for all runs that share it.

    Returns:
        The final status. An error inside the run is printed and recorded in it, not raised.

    Raises:
        RunError: Another process trains this run.
    """
    run, world = RunDir(path), World.here()
    if not world.is_first:
        with signals.held():
            return run_worker(run, world, warm_start_only=warm_start_only)
    with signals.held(), run.locked(NODE_LOCK_SECONDS if on_node else PROBE_SECONDS):
        config, previous = frozen.thaw(run.config_file), previous_status(run)
        if previous is not None and previous.state == "finished":
            print(finished_already(run, config, previous, commit=code_of(modules_of([config])).commit))
            print(summary_text(run, config, previous))
            if _is_mirrored(config, on_node=on_node):
                from relora.tracking.mirror import mirror_all

                mirror_all([(run, config)], print, held_here=True)
            return previous
        code = code_of(modules_of([config]))
        status = Status(state="running", git_commit=code.commit, ranks=world.size)
        if previous is not None:
            status.attempt, status.started_ms = previous.attempt + 1, previous.started_ms
            status.corpus, status.attempts = previous.corpus, previous.attempts
        status.attempts.append(Attempt(ranks=world.size, code=code.content_hash))
        if on_node:
            status.slurm_job_id, status.requeues = slurm.own_job(), slurm.own_requeues()
        run.status = status
        for rank in run.rank_errors:
            run.error_file(rank).unlink()
        run.remove_leftovers()
        if code.changes:
            file = run.changes_file(code.content_hash)
            file.parent.mkdir(exist_ok=True)
            write_whole(file, code.changes)
        _Attempt(run, config, status, world, on_node=on_node, warm_start_only=warm_start_only).run_to_end()
        return status


class _Attempt:
    """One attempt at a run: build the parts, train, export, and write a correct status in every case."""

    def __init__(
        self, run: RunDir, config: RunConfig, status: Status, world: World, *, on_node: bool, warm_start_only: bool
    ) -> None:
        self.run, self.config, self.status, self.world = run, config, status, world
        self.attempt, self.earlier = status.attempts[-1], [a for a in status.attempts[:-1] if a.has_trained]
        self.on_node, self.warm_start_only = on_node, warm_start_only
        self.console = Console()
        self.began = time.perf_counter()

    def run_to_end(self) -> None:
        """Train, export and record the result.

        Call this with signals held. Then no signal interrupts the recording.
        """
        mirror = None
        try:
            self.console.log_line(f"run {self.run.path}")
            before = next((each.code for each in reversed(self.earlier) if each.code), self.attempt.code)
            if before != self.attempt.code:
                self.console.log_line(f"note: its code was {before} until now, and is {self.attempt.code} from here on")
            with signals.asked(self._log_stopping):
                signals.check()
                mirror = self._start_mirror()
                with self.world.joined():
                    self.status.summary = self._train_and_export()
            self.status.state = "finished"
        except BaseException as error:  # the status must be correct also after KeyboardInterrupt and SystemExit
            self._record(error)
        finally:
            self.attempt.ended_ms = self.status.ended_ms = time.time_ns() // 1_000_000
            self._write_status()  # before anything is printed: printing fails if the log is on a full disk
            self.console.close()
            if self.status.state != "finished":  # before MLflow, whose import takes seconds
                print(f"{self.status.state}: {self.status.message}", flush=True)
            if mirror is not None:
                mirror.close()
        if self.status.state == "finished":
            print(summary_text(self.run, self.config, self.status))
        else:
            print(f"go on with: {relaunch_command(self.run)}", flush=True)

    def _log_stopping(self, name: str) -> None:
        self.console.log_line(f"{name}: stopping as soon as a checkpoint can be written (same signal again: at once)")

    def _write_status(self) -> None:
        """Write the final status. If that fails, the attempt has failed: a finished run has a status that says so."""
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

        return MirrorThread(Mirror(self.run, self.config), self.console.log_line)

    def _record(self, error: BaseException) -> None:
        self.console.close()
        self.status.state, self.status.stopped_by = "failed", signals.reason() or ""
        causes = self.run.rank_messages if isinstance(error, (PeerLost, KeyboardInterrupt)) else []
        if causes:
            self.status.message = f"{'; '.join(causes)} (in full: {self.run.path}/rank-*.error)"
        elif isinstance(error, WarmStartTrained):
            self.status.state, self.status.message = "interrupted", str(error)
        elif isinstance(error, Interrupted):
            self.status.state = "interrupted"
            self.status.message = f"{error}; a checkpoint is written"
        elif isinstance(error, (KeyboardInterrupt, Stopped)) or signals.interrupted():
            # A library may turn the KeyboardInterrupt into another error.
            self.status.state = "interrupted"
            self.status.message = f"{signals.reason() or str(error) or 'Ctrl-C'}; the newest checkpoint is kept"
        else:
            self.status.message = in_words(error)
            if self.status.message != str(error):
                traceback.print_exception(error)

    def _train_and_export(self) -> dict[str, Any]:
        from relora.data import corpus as corpora

        # Before torch is imported, which takes seconds: a dataset that cannot be reached ends the run here.
        place = Path(self.config.runs_dir) / "corpora"
        corpus_folder = corpora.located(self.config.data, place)
        signals.check()
        with signals.importing():
            from relora.runs import warmstart
            from relora.training.device_memory import peak_memory_bytes, reset_peak_memory
            from relora.training.export import check_finite, export
            from relora.training.figures import summary_figures
            from relora.training.microsteps import share
            from relora.training.pretrained import loadable_tokenizer_config

        signals.check()
        config, log_line, world = self.config, self.console.log_line, self.world
        share(config, world)  # checked before the corpus, which may take hours to prepare
        device = choose_device(config.trainer.device, world)
        check_devices(device, world)
        describe_machine(self.attempt, device)
        self.status.device = self.attempt.device
        corpus = corpora.prepare_apart(config.data, place, log_line, folder=corpus_folder)
        signals.check()
        self._check_corpus(corpus.identity)
        tokenizer_config = None
        if corpus.tokenizer_file is not None:
            tokenizer_config, note = loadable_tokenizer_config(corpus.tokenizer_file)
            if note is not None:
                log_line(note)
        origin = {**corpus.identity, "device": device.type}
        exact = device.type == "cpu" and not any(
            self.attempt.differs_from(earlier) or self.attempt.code != earlier.code for earlier in self.earlier
        )
        with (
            warmstart.shared(config, self.run, origin, log_line) as publish_warm_start,
            MetricsLog.opened(self.run.metrics_file, exact=exact) as log,
        ):
            world.broadcast((os.fspath(corpus.folder), publish_warm_start is not None))
            if self.warm_start_only:
                publish_warm_start = stopping_after(publish_warm_start)
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
                log_line(f"{lost}: " + ("computed again now" if lost.recomputed else "these rows stay lost"))
            epochs = trainer.training.epochs(config.total_steps * config.trainer.sequences_per_step)
            cost, ranks = trainer.reporter.method_cost, f"{world.size} ranks of " if world.size > 1 else ""
            per_step = f"{config.tokens_per_step:,} tokens"
            if config.data.packing == "pad":
                share = trainer.training.target_tokens / (trainer.training.count * config.data.sequence_length_tokens)
                per_step = f"{config.trainer.sequences_per_step:,} documents (padding is {1 - share:.0%})"
            log_line(
                f"{config.method.name} on {ranks}{device}: {cost.parameters / 1e6:.2f}M parameters, "
                f"{cost.trainable_parameters / 1e6:.2f}M trainable; {config.total_steps} steps of "
                f"{per_step}, {epochs}"
            )
            for warning in warnings(run_plan(config), config):
                log_line(warning)
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
                **summary_figures(exported.test, corpus.splits["test"], config.published),
                **trainer.reporter.progress_metrics(config.total_steps),
                "restarts": trainer.clock.restarts_before(config.total_steps),
                "skipped_updates": trainer.counters.skipped_updates,
                "parameters": cost.parameters,
                "trainable_parameters": cost.trainable_parameters,
                "state_bytes": run_plan(config, config.model.vocab_size or corpus.vocab_size).state_bytes,
                "training_seconds": trainer.counters.training_seconds,
                "tokens_per_second": trainer.counters.tokens / trainer.counters.training_seconds,
                "wall_clock_seconds": time.perf_counter() - self.began,
            }
            summary = {name.removeprefix("progress/"): value for name, value in summary.items()}
            log.log(0, {f"summary/{name}": value for name, value in summary.items()})
            log.flush()
        for doubt in exported.doubts:
            self._warn(doubt)
        return summary if tokenizer_config is None else summary | self._closing_sample()

    def _note_begin(self, first_step: int, seconds: float) -> None:
        """Record the step at which this attempt starts, and log a note if the machine differs from the last one."""
        self.attempt.first_step, self.attempt.seconds_before = first_step, seconds
        self.run.status = self.status
        if self.earlier and self.attempt.differs_from(self.earlier[-1]):
            self.console.log_line(
                f"note: this machine ({self.attempt.machine}) differs from that of the last attempt "
                f"({self.earlier[-1].machine}); from step {first_step} on the results can differ in their last digits"
            )

    def _check_corpus(self, identity: dict[str, str]) -> None:
        """Raise RunError if the text of the run has changed since an earlier attempt. Otherwise record its identity."""
        if self.status.corpus and self.status.corpus != identity:
            raise RunError(
                f"the text of data={self.config.data.name} has changed since this run began: {identity} instead of "
                f"{self.status.corpus}; restore it, or remove {self.run.path} to start again"
            )
        self.status.corpus = identity
        self.run.status = self.status

    def _closing_sample(self) -> dict[str, str]:
        """Generate a sample text. If that fails, the run gets a warning and is still finished."""
        from relora.training.export import closing_sample

        try:
            return {"sample": closing_sample(self.run.model, prompt_for(self.config), self.config.trainer.seed)}
        except Exception as error:  # the results are valid after any error here
            self._warn(f"the closing sample could not be written: {in_words(error)}")
            return {}

    def _warn(self, doubt: str) -> None:
        """Log a warning and add it to the message of the status. The run is still finished."""
        self.console.log_line(f"warning: {doubt}")
        self.status.message = "; ".join(filter(None, (self.status.message, doubt)))


def _is_mirrored(config: RunConfig, *, on_node: bool) -> bool:
    return config.tracker.name == "mlflow" and not (on_node and config.mlflow_uri.startswith("sqlite:"))


if __name__ == "__main__":
    with signals.handled_signals():
        try:
            sys.exit(EXIT_CODES[job(Path(sys.argv[1])).state])
        except (ConfigError, RunError, OSError) as problem:
            sys.exit(f"relora: {problem}" if World.here().is_first else 1)
