"""The work of each process of a run: choose its device and build its trainer. Also all work of ranks above 0."""

import errno
import hashlib
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from relora.common import signals
from relora.common.errors import ConfigError, Interrupted, RunError, WarmStartTrained
from relora.common.files import write_whole
from relora.config import frozen
from relora.config.run import RunConfig
from relora.runs.metrics import Broadcast, Tracker
from relora.runs.rundir import PROBE_SECONDS, Attempt, RunDir, Status
from relora.training.distributed import PeerLost, World

if TYPE_CHECKING:
    import torch

    from relora.data.corpus import Corpus
    from relora.training.trainer import Trainer

RECORDED_SECONDS = 10.0
"""How long a failed process waits until rank 0 has recorded its failure. Launchers then give rank 0 about 30 s more."""

REPAIRABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
"""Errors of a full, forbidden or broken disk. A traceback does not help the user there."""


def run_worker(run: RunDir, world: World, *, warm_start_only: bool = False) -> Status:
    """Train the share of a process above rank 0.

    This process writes no files, except a file with its own error. Call this with signals held: a signal that comes
    before training reaches the other processes with the first step.

    Args:
        run: The folder of the run.
        world: The processes that train together.
        warm_start_only: Stop when the warm start is trained.

    Returns:
        The status of this process, after rank 0 has recorded it.
    """
    previous = run.known_status
    if previous is not None and previous.state == "finished":
        return previous
    status = Status(state="failed")
    try:
        with world.joined(), signals.asked(lambda name: None), _left_for_first(run, world.rank):
            _train_share(run, world, warm_start_only)
        status.state = "finished"
    except BaseException as error:  # rank 0 must be able to report every error
        status.message = in_words(error)
        if isinstance(error, (Interrupted, WarmStartTrained)):
            status.state = "interrupted"
    if status.state != "finished":
        _wait_until_recorded(run)
        # If rank 0 is interrupted, the others lose their connection. A launcher must see them as interrupted too.
        recorded = run.known_status
        if recorded is not None and recorded.state == "interrupted":
            status.state = "interrupted"
    return status


@contextmanager
def _left_for_first(run: RunDir, rank: int) -> Iterator[None]:
    """Write an error of this process to a file, before the others notice that it is gone. Rank 0 then reports it.

    If the file cannot be written, this process prints the error.
    """
    try:
        yield
    except (Interrupted, WarmStartTrained, PeerLost, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = f"{in_words(error)}\n\n{''.join(traceback.format_exception(error))}"
        try:
            write_whole(run.error_file(rank), text)
        except OSError:
            print(f"rank {rank} failed: {text}", file=sys.stderr, flush=True)
        raise


def _train_share(run: RunDir, world: World, warm_start_only: bool) -> None:
    """Wait until rank 0 has prepared the corpus and the warm start. Then train."""
    with signals.importing():
        from relora.data import corpus as corpora

    config = frozen.thaw(run.config_file)
    device = choose_device(config.trainer.device, world)
    check_devices(device, world)
    folder, trains_warm_start = world.broadcast(("", False))
    on_warm_start = (lambda: None) if trains_warm_start else None
    if warm_start_only:
        on_warm_start = stopping_after(on_warm_start)
    trainer = build_trainer(
        run,
        config,
        corpora.load(Path(folder)),
        Broadcast([]),
        world=world,
        device=device,
        stop=signals.reason,
        on_warm_start=on_warm_start,
    )
    trainer.train()


def stopping_after(on_warm_start: Callable[[], None] | None) -> Callable[[], None]:
    """Return a function that calls `on_warm_start` and then raises WarmStartTrained, so that training stops there.

    Raises:
        WarmStartTrained: At once if `on_warm_start` is None, because the warm start is trained already.
    """
    if on_warm_start is None:
        raise WarmStartTrained

    def publish_and_stop() -> None:
        on_warm_start()
        raise WarmStartTrained

    return publish_and_stop


def _wait_until_recorded(run: RunDir) -> None:
    """Wait until rank 0 releases the lock of the run. Launchers stop all processes as soon as one has failed."""
    limit = time.monotonic() + RECORDED_SECONDS
    while run.is_locked and time.monotonic() < limit:
        time.sleep(PROBE_SECONDS / 10)


def build_trainer(
    run: RunDir,
    config: RunConfig,
    corpus: "Corpus",
    tracker: Tracker,
    *,
    world: World,
    device: "torch.device",
    stop: Callable[[], str | None],
    on_warm_start: Callable[[], None] | None,
    attempt: Attempt | None = None,
) -> "Trainer":
    """Build the trainer of a process.

    The arguments are the same in all processes, except `tracker`, `stop`, `attempt` (only rank 0 has one), and what
    `on_warm_start` does.

    Args:
        run: The folder of the run, for its checkpoints.
        config: The run.
        corpus: Provides the training and validation sequences and the size of the vocabulary.
        tracker: Receives metrics and log lines.
        world: The processes that train together.
        device: Where to train.
        stop: Returns the reason to stop, or None.
        on_warm_start: Called when the warm start is trained and saved.
        attempt: Describes this machine for the run's record.

    Raises:
        RunError: model.vocab_size is smaller than the vocabulary of the tokenizer.
    """
    with signals.importing():
        from relora.training.model import build
        from relora.training.trainer import Trainer

    vocab_size = config.model.vocab_size or corpus.vocab_size
    if vocab_size < corpus.vocab_size:
        raise RunError(
            f"model.vocab_size={vocab_size} is below the tokenizer's {corpus.vocab_size}; leave model.vocab_size null"
        )
    shape, end_of_text_id = config.trained_shape(vocab_size), corpus.end_of_text_id
    return Trainer(
        config,
        build(config.model, shape, end_of_text_id=end_of_text_id, seed=config.trainer.seed),
        corpus.sequences("train", config.data),
        corpus.sequences("validation", config.data),
        tracker,
        vocab_size=vocab_size,
        checkpoint_folder=run.checkpoints,
        device=device,
        stop=stop,
        on_warm_start=on_warm_start,
        world=world,
        machine={} if attempt is None else vars(attempt),
    )


def choose_device(name: str, world: World) -> "torch.device":
    """Return the device of this process for `trainer.device`. With several processes, each uses its own GPU.

    A launcher may also make only one GPU visible to each process.

    Args:
        name: The value of trainer.device.
        world: The processes that train together.

    Raises:
        RunError: torch sees no such GPU, or `name` is one GPU for several processes.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world.size == 1:
        if int(name.partition(":")[2] or 0) >= seen:
            raise RunError(f"trainer.device={name}: torch sees {seen} CUDA devices; use trainer.device=auto or cpu")
        return torch.device(name)
    if ":" in name:
        raise RunError(f"trainer.device={name} names one GPU for {world.size} ranks; use trainer.device=cuda")
    own = 0 if seen == 1 else world.local_rank
    if own >= seen:
        raise RunError(
            f"trainer.device={name}: rank {world.rank} is number {own} on its machine, where torch sees {seen} CUDA "
            "devices; start one rank for each of them, or use trainer.device=cpu"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def check_devices(device: "torch.device", world: World) -> None:
    """Raise RunError, in all processes, if two use the same GPU, or if some use a GPU and others the CPU."""
    if world.size == 1:
        return
    owners: dict[int, list[int]] = {}
    for rank, (owned,) in enumerate(world.gathered([identity(device)])):
        owners.setdefault(owned, []).append(rank)
    with_cpu = owners.pop(0, [])
    if with_cpu and owners:
        raise RunError(
            f"rank {', '.join(map(str, with_cpu))} of {world.size} has no GPU and the others have one; start one rank "
            "for each GPU, or use trainer.device=cpu"
        )
    for ranks in owners.values():
        if len(ranks) > 1:
            raise RunError(
                f"ranks {', '.join(map(str, ranks))} have the same GPU, and NCCL allows one rank per GPU; start one "
                "rank for each GPU (torchrun --nproc-per-node, cluster.gpus_per_node), or use trainer.device=cpu"
            )


def identity(device: "torch.device") -> int:
    """Return 0 for a CPU. For a GPU, return an integer of 63 bits that no other GPU of any machine has."""
    if device.type == "cpu":
        return 0
    import torch

    named = f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest()) >> 1


def describe_machine(attempt: Attempt, device: "torch.device") -> None:
    """Record the device, CPU, torch version and threads in `attempt`: the bits of the results depend on them."""
    import torch

    attempt.device = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
    attempt.cpu = f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"
    attempt.torch, attempt.threads = str(torch.__version__), torch.get_num_threads()


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def in_words(error: BaseException) -> str:
    """Return the message of an error for the user. The class is added unless the message is clear without it."""
    mendable = isinstance(error, (ConfigError, RunError, Interrupted, WarmStartTrained)) or (
        isinstance(error, OSError) and error.errno in REPAIRABLE_ERRNOS
    )
    return str(error) if mendable else f"{type(error).__name__}: {error}"
