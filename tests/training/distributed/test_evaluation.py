"""An evaluation has the same bits on several ranks, and so has the figure as the paper's code prints it."""

import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from processes import CONTEXT, free_port, trained
from small import TINY
from trainers import VOCAB, config_of, tokens

from relora.training.distributed import World
from relora.training.evaluate import Evaluation, evaluate
from relora.training.model import build

pytestmark = pytest.mark.slow


def evaluated(folder: Path, world: World) -> Evaluation:
    config = config_of("method=relora")
    model = build(config.model, config.trained_shape(VOCAB), end_of_text_id=0, seed=0)
    data = tokens(folder, f"rank-{world.rank}-of-{world.size}", 19 * 16 + 9)
    data.tokens = tokens(folder, "held-out", 19 * 16 + 9).tokens
    device = torch.device("cpu")
    return evaluate(model, data, sequences_per_batch=3, precision="fp32", device=device, world=world)


def one_rank(rank: int, size: int, port: int, folder: Path, results: Connection) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = World(rank=rank, size=size, local_rank=rank)
    with world.joined():
        results.send(evaluated(folder / str(rank), world))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_losses_of_all_batches_to_the_bit(tmp_path: Path, size: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = evaluated(tmp_path / "alone", World())
    finally:
        torch.set_num_threads(threads)
    port, pipes = free_port(), [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CONTEXT.Process(target=one_rank, args=(rank, size, port, tmp_path, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for receiver, _ in pipes:
            assert receiver.poll(180)
            assert receiver.recv() == alone
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    assert len(alone.batches) == 7


def test_a_run_on_two_ranks_has_the_published_figure_of_a_run_on_one(text: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "experiments=paper/galore_60m", "method=relora", "data=text", f"data.path={text}"]
    overrides += ["data.packing=packed"]
    overrides += ["trainer.precision=fp32", "tracker=jsonl", "method.dropout=0"]
    overrides += ["published.micro_batch_sequences=6", "published.gpus=2"]
    one, two = (trained(size, [*overrides, f"runs_dir={tmp_path / str(size)}"]).status for size in (1, 2))
    assert one is not None
    assert two is not None
    for name in ("test_perplexity", "test_perplexity_as_published"):
        assert two.summary[name] == pytest.approx(one.summary[name], rel=1e-5)
    assert one.summary["test_perplexity_as_published"] < one.summary["test_perplexity"]
    assert one.summary["test_batches_as_published"] == two.summary["test_batches_as_published"] > 1
