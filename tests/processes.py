"""Runs of several ranks. Each rank is a fork of a process that has imported all, so that a run takes a second."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from relora.cli import main as cli
from relora.config.compose import compose
from relora.runs.metrics import read_rows
from relora.runs.rundir import RunDir

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "relora.training.job",
        "relora.training.trainer",
        "relora.runs.warmstart",
        "relora.data.corpus",
        "hydra",
        "torch.distributed",
    ]
)

WITHIN_SECONDS = 180.0

Sabotage = Callable[[int], None]
"""Each process calls this with its rank before it starts the run."""


def nothing(rank: int) -> None:
    """No sabotage."""


def at_step(step: int, action) -> None:
    """Call `action(trainer)` after the update of `step`."""
    from relora.training.trainer import Trainer

    update = Trainer.update

    def sabotaged(self, at: int, loss) -> None:
        update(self, at, loss)
        if at == step:
            action(self)

    Trainer.update = sabotaged  # type: ignore[method-assign]


def _process(rank: int, size: int, port: int, overrides: Sequence[str], log: Path, sabotage: Sabotage) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sabotage(rank)
    sys.exit(cli.run(overrides))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """`size` processes that train the run of `overrides` together.

    `composed`: overrides that give the run folder if the overrides of the run are wrong.
    """

    def __init__(
        self,
        size: int,
        overrides: Sequence[str],
        sabotage: Sabotage = nothing,
        *,
        composed: Sequence[str] | None = None,
    ) -> None:
        config = compose(composed or overrides)
        self.run = RunDir(config.run_dir)
        self.log = Path(config.runs_dir) / "log.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        port = free_port()
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_process, args=(rank, size, port, overrides, self.log, sabotage))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def ended(self, within_seconds: float = WITHIN_SECONDS) -> list[int | None]:
        """Wait until all ranks have ended, and return their exit codes. Fail after `within_seconds`."""
        limit = time.monotonic() + within_seconds
        for process in self.processes:
            process.join(max(0.0, limit - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, (codes, self.shown)
        return codes

    def until_step(self, step: int) -> None:
        """Wait until the run has logged this step."""
        while not any(row["step"] >= step for row in read_rows(self.run.metrics_file)):
            assert all(process.exitcode is None for process in self.processes), self.shown
            time.sleep(0.01)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    @property
    def shown(self) -> str:
        """What all ranks wrote to the terminal."""
        return self.log.read_text()


def trained(size: int, overrides: Sequence[str], sabotage: Sabotage = nothing) -> RunDir:
    """Train a run with `size` ranks to its end, and return it."""
    ranks = Ranks(size, overrides, sabotage)
    assert ranks.ended() == [0] * size, ranks.shown
    return ranks.run
