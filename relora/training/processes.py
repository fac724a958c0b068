"""A run's part on each rank: its device, its trainer, and all that the ranks other than the first do."""

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
"""How long a rank that fails waits for rank 0 to record it; launchers give rank 0 some 30 s more then."""

MENDABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
"""A full, forbidden or broken disk: nothing a traceback could explain."""


def run_worker(run: RunDir, world: World, *, warm_start_only: bool = False) -> Status:
    """What a rank other than the first does: it trains its share, and writes nothing but what ended it alone.

    Returns how it went, after rank 0 has recorded it. Called where signals are held: one that came early reaches the
    other ranks with the first update.
    """
    previous = run.known_status
    if previous is not None and previous.state == "finished":
        return previous
    status = Status(state="failed")
    try:
        with world.joined(), signals.asked(lambda name: None), _left_for_first(run, world.rank):
            _train_share(run, world, warm_start_only)
        status.state = "finished"
    except BaseException as error:  # whatever it is, rank 0 must be able to tell
        status.message = in_words(error)
        if isinstance(error, (Interrupted, WarmStartTrained)):
            status.state = "interrupted"
    if status.state != "finished":
        _wait_until_recorded(run)
        # An interrupted rank 0 leaves the others with a lost connection: for a launcher they are interrupted too.
        recorded = run.known_status
        if recorded is not None and recorded.state == "interrupted":
            status.state = "interrupted"
    return status


@contextmanager
def _left_for_first(run: RunDir, rank: int) -> Iterator[None]:
    """Write down what ends this rank alone, before the others learn that it is gone: rank 0 then tells it.

    Where the disk takes no more, this rank tells it.
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
    """Wait for rank 0 to prepare what there is to prepare, and train with it."""
    with signals.held():
        from relora.data import corpus as corpora

    config = frozen.thaw(run.config_file)
    device = choose_device(config.trainer.device, world)
    check_devices(device, world)
    folder, trains_warm_start = world.broadcast(("", False))
    on_warm_start = (lambda: None) if trains_warm_start else None
    if warm_start_only:
        on_warm_start = then_stop(on_warm_start)
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


def then_stop(on_warm_start: Callable[[], None] | None) -> Callable[[], None]:
    """`on_warm_start`, and no further. Raises WarmStartTrained at once where the warm start stands already."""
    if on_warm_start is None:
        raise WarmStartTrained

    def stop_after_it() -> None:
        on_warm_start()
        raise WarmStartTrained

    return stop_after_it


def _wait_until_recorded(run: RunDir) -> None:
    """Until rank 0 lets go of the run: launchers stop all ranks as soon as one has ended badly."""
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
    """The same on every rank, but for `tracker`, `stop`, what `on_warm_start` does and the first's `attempt`."""
    with signals.held():
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
        corpus.sequences("train", config.data.sequence_length_tokens),
        corpus.sequences("validation", config.data.sequence_length_tokens),
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
    """The device that `trainer.device` means here; several ranks take a GPU each. Raises RunError where there is none.

    A launcher that shows each rank its own GPU alone is fine too.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if world.size == 1:
        if int(name.partition(":")[2] or 0) >= seen:
            raise RunError(f"trainer.device={name}: torch sees {seen} CUDA devices; take trainer.device=auto or cpu")
        return torch.device(name)
    if ":" in name:
        raise RunError(f"trainer.device={name} names one GPU for {world.size} ranks; take trainer.device=cuda")
    own = 0 if seen == 1 else world.local_rank
    if own >= seen:
        raise RunError(
            f"trainer.device={name}: rank {world.rank} is number {own} on its machine, where torch sees {seen} CUDA "
            "devices; start a rank for each of them, or take trainer.device=cpu"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def check_devices(device: "torch.device", world: World) -> None:
    """Raise RunError, on all ranks, where two have the same GPU, or some have a GPU and others have none."""
    if world.size == 1:
        return
    owners: dict[int, list[int]] = {}
    for rank, (owned,) in enumerate(world.gathered([identity(device)])):
        owners.setdefault(owned, []).append(rank)
    with_cpu = owners.pop(0, [])
    if with_cpu and owners:
        raise RunError(
            f"rank {', '.join(map(str, with_cpu))} of {world.size} has no GPU and the others have one; start a rank "
            "for each GPU, or take trainer.device=cpu"
        )
    for ranks in owners.values():
        if len(ranks) > 1:
            raise RunError(
                f"ranks {', '.join(map(str, ranks))} have the same GPU, and NCCL connects one rank a GPU; start a rank "
                "for each GPU (torchrun --nproc-per-node, cluster.gpus_per_node), or take trainer.device=cpu"
            )


def identity(device: "torch.device") -> int:
    """0 for a CPU; for a GPU an integer of 63 bits that no other GPU of any machine has."""
    if device.type == "cpu":
        return 0
    import torch

    named = f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest()) >> 1


def describe_machine(attempt: Attempt, device: "torch.device") -> None:
    """Fill in what the bits of the attempt's results depend on."""
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
    """What a person reads of it: the message alone where that is meant to stand alone."""
    mendable = isinstance(error, (ConfigError, RunError, Interrupted, WarmStartTrained)) or (
        isinstance(error, OSError) and error.errno in MENDABLE_ERRNOS
    )
    return str(error) if mendable else f"{type(error).__name__}: {error}"
