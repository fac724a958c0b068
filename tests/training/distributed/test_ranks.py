"""Several ranks train one run: real processes, tiny models, gloo on the CPU."""

import hashlib
import os
import re
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import Ranks, at_step, trained
from safetensors.torch import load_file
from small import TINY

from relora.core.lowrank import low_rank_layers
from relora.runs.checkpoint import latest_step
from relora.runs.metrics import read_rows, row_metrics
from relora.runs.rundir import RunDir
from relora.runs.state import observe

pytestmark = pytest.mark.slow


TOLERANCE = 1e-5
"""Absolute tolerance of losses and weights. Another number of ranks sums fp32 gradients in another order. After 14
steps the losses differ by 4e-7 and the weights by 2e-7. A restart may increase the difference: the pruning of the
optimizer state has a threshold, and a value near the threshold may be kept or pruned. The ranks of one run are
bit-equal."""

BF16_LOSS_TOLERANCE, BF16_WEIGHT_TOLERANCE = 1e-3, 5e-3
"""Absolute tolerances with bf16_autocast. Gradients are still summed in fp32, but a weight that differs in its last bit
may be rounded to another bf16 value. The two values differ by 4e-3 of their size. After 14 steps the losses differ by
3e-4 and the weights by 2e-5, and with other texts the weights by 1.3e-3: if a gradient is nearly 0, the first steps of
Adam depend only on its sign."""

LONG = ["trainer.total_steps=2003", "method.reset_interval_steps=1000", "trainer.validation_interval_steps=1000"]


@pytest.fixture
def few(tiny: list[str]) -> list[str]:
    """The tiny run with checkpoints at steps 4, 8 and 12, and one sequence at a time."""
    return [*tiny, "trainer.checkpoint_interval_steps=4", "trainer.sequences_per_micro_step=1"]


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunDir]:
    """The same run, trained by 1, 2 and 4 ranks."""
    return trained_by_each_size(text, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def in_bf16(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunDir]:
    """The same runs with bf16_autocast."""
    return trained_by_each_size(text, tmp_path_factory.mktemp("bf16"), "trainer.precision=bf16_autocast")


def trained_by_each_size(text: Path, folder: Path, *overrides: str) -> dict[int, RunDir]:
    settings = [*TINY, "trainer.checkpoint_interval_steps=4", "trainer.sequences_per_micro_step=1", "tracker=jsonl"]
    changes = ["data=text", f"data.path={text}", *overrides]
    return {size: trained(size, [*settings, *changes, f"runs_dir={folder / str(size)}"]) for size in (1, 2, 4)}


def digest(run: RunDir) -> str:
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()


def weight_gap(one: RunDir, other: RunDir) -> float:
    """The largest difference between weights of the exported models."""
    first, second = (load_file(run.model / "model.safetensors") for run in (one, other))
    return max((value - second[name]).abs().max().item() for name, value in first.items())


def series(run: RunDir, name: str) -> dict[int, float]:
    rows = [row for row in read_rows(run.metrics_file) if name in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[name] for row in rows}


def message(run: RunDir) -> str:
    status = run.status
    assert status is not None
    assert status.state == "failed"
    return status.message


# --------------------------------------------------------------------------------------------------------- sabotage


def kill(*ignored, **settings) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_step_9(rank: int) -> None:
    at_step(9, kill)


def killed_in_a_merge(rank: int) -> None:
    import relora.core.reset

    relora.core.reset.reset_optimizer = kill


def one_fails(rank: int) -> None:
    if rank == 1:
        at_step(9, lambda trainer: 1 / 0)


def one_changes_a_factor(rank: int) -> None:
    def change(trainer) -> None:
        _, layer = next(low_rank_layers(trainer.model))
        with torch.no_grad():
            layer.lora_B[0, 0] += 1e-6

    if rank == 1:
        at_step(9, change)


def little_memory_on_rank_1(rank: int) -> None:
    """Rank 1 runs out of memory with more than one sequence at a time."""
    import relora.training.evaluate
    import relora.training.microsteps
    from relora.training.model import summed_cross_entropy

    def limited(model, inputs, targets, **settings):
        if len(inputs) > 1 and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return summed_cross_entropy(model, inputs, targets, **settings)

    relora.training.microsteps.summed_cross_entropy = relora.training.evaluate.summed_cross_entropy = limited


def rank_1_has_little_memory(rank: int) -> None:
    """By the plan, one sequence at a time does not even fit on rank 1. Rank 0 has the memory of the machine."""
    import relora.training.microsteps

    if rank == 1:
        relora.training.microsteps.available_bytes = lambda device, held_bytes: 1000


def same_gpu(rank: int) -> None:
    import relora.training.processes

    relora.training.processes.identity = lambda device: 7


def only_rank_1_has_a_gpu(rank: int) -> None:
    import relora.training.processes

    relora.training.processes.identity = lambda device: rank


def no_memory_on_rank_1(rank: int) -> None:
    import relora.training.microsteps

    def full(*ignored, **settings) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if rank == 1:
        relora.training.microsteps.gradient_buffer = full


def wait_ten_seconds(rank: int) -> None:
    """In a step, the ranks wait for each other for at most 10 seconds."""
    import relora.training.distributed

    relora.training.distributed.WATCHED_SECONDS, relora.training.distributed.TIMEOUT = 10.0, timedelta(seconds=16)


def one_hangs(rank: int) -> None:
    wait_ten_seconds(rank)
    if rank == 1:
        at_step(9, lambda trainer: os.kill(os.getpid(), signal.SIGSTOP))


def one_is_slow_to_fail(rank: int) -> None:
    """Rank 1 fails while rank 0 waits in a step. The process of rank 1 ends much later.

    So rank 0 can learn of the failure only from the report of rank 1. gloo cannot end a wait early, as NCCL can: rank 0
    ends at TIMEOUT.
    """
    from torch import distributed

    import relora.training.distributed

    relora.training.distributed.TIMEOUT = timedelta(seconds=16)
    destroy, check = distributed.destroy_process_group, relora.training.distributed.World._check_others

    def destroy_late() -> None:
        time.sleep(120)
        destroy()

    def check_and_print(world: relora.training.distributed.World) -> None:
        try:
            check(world)
        except relora.training.distributed.PeerLost as lost:
            print(f"rank {rank} received: {lost}", flush=True)
            raise

    one_fails(rank)
    if rank == 1:
        distributed.destroy_process_group = destroy_late
    else:
        relora.training.distributed.World._check_others = check_and_print  # type: ignore[method-assign]


def first_takes_long(rank: int) -> None:
    """The work that only rank 0 does takes longer than the ranks wait for each other in a step."""
    import relora.data.corpus
    import relora.runs.checkpoint
    import relora.training.export

    wait_ten_seconds(rank)
    for module, name in (
        (relora.data.corpus, "prepare_apart"),
        (relora.runs.checkpoint, "save"),
        (relora.training.export, "export"),
    ):
        setattr(module, name, after_seconds(12, getattr(module, name)))


def after_seconds(seconds: float, function):
    """Return `function` with a delay of `seconds` at its first call."""
    waits = [seconds]

    def slow(*arguments, **settings):
        time.sleep(waits.pop() if waits else 0)
        return function(*arguments, **settings)

    return slow


def first_cannot_prepare(rank: int) -> None:
    import relora.data.corpus
    from relora.common.errors import RunError

    def fail(*ignored, **settings) -> None:
        time.sleep(1)
        raise RunError("the text is missing")

    relora.data.corpus.prepare_apart = fail


def seeds_shown(rank: int) -> None:
    # The line and its end are one write: two ranks share the file, and print writes the end apart.
    at_step(9, lambda trainer: os.write(1, f"rank {rank} has dropout seed {torch.initial_seed()}\n".encode()))


# ------------------------------------------------------------------------------------------------ any number of ranks


@pytest.mark.parametrize("size", [2, 4])
def test_another_number_of_ranks_learns_the_same(undisturbed: dict[int, RunDir], size: int) -> None:
    single, several = undisturbed[1], undisturbed[size]
    losses, others = series(single, "train/loss"), series(several, "train/loss")
    assert losses.keys() == others.keys()
    assert max(abs(losses[step] - others[step]) for step in losses) < TOLERANCE
    assert 0 < weight_gap(single, several) < TOLERANCE


@pytest.mark.parametrize("size", [2, 4])
def test_another_number_of_ranks_learns_the_same_in_bf16(in_bf16: dict[int, RunDir], size: int) -> None:
    single, several = in_bf16[1], in_bf16[size]
    losses, others = series(single, "train/loss"), series(several, "train/loss")
    assert losses.keys() == others.keys()
    assert max(abs(losses[step] - others[step]) for step in losses) < BF16_LOSS_TOLERANCE
    assert weight_gap(single, several) < BF16_WEIGHT_TOLERANCE


def test_ranks_draw_the_same_projections(text: Path, tmp_path: Path) -> None:
    """APOLLO draws a projection in every step. Different ones give unequal weights, and a run ends with an error."""
    tiny = [item for item in TINY if not item.startswith("method")]
    arm = ["method=apollo", "method.rank=4", "method.update_interval_steps=5", "data=text", f"data.path={text}"]
    run = trained(2, [*tiny, *arm, "tracker=jsonl", f"runs_dir={tmp_path}"])
    losses = series(run, "train/loss")
    assert losses[14] < losses[1]


def test_evaluation_gives_the_same_bits_for_any_number_of_ranks(undisturbed: dict[int, RunDir]) -> None:
    assert len({series(run, "eval/loss")[0] for run in undisturbed.values()}) == 1


def test_only_rank_0_writes(undisturbed: dict[int, RunDir]) -> None:
    files = {
        size: sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*"))
        for size, run in undisturbed.items()
    }
    assert files[1] == files[2] == files[4]
    rows = [(row["step"], name) for row in read_rows(undisturbed[4].metrics_file) for name in row_metrics(row)]
    assert len(rows) == len(set(rows))
    shown = (undisturbed[4].path.parent / "log.txt").read_text()
    assert shown.count("restart 1, merged") == shown.count("perplexity  ") == 1
    assert "on 4 ranks of cpu" in shown
    steps = [torch.load(path)["step"] for path in sorted(undisturbed[4].checkpoints.iterdir())]
    assert steps == [12, 14]


def test_a_second_launch_of_a_finished_run_says_that_it_is_finished(
    undisturbed: dict[int, RunDir], few: list[str]
) -> None:
    runs_dir = undisturbed[2].path.parent
    ranks = Ranks(2, [*few, f"runs_dir={runs_dir}"])
    assert ranks.ended() == [0, 0]
    assert ranks.shown.count("is finished already") == 1


def test_ranks_that_cannot_share_a_batch_are_refused(few: list[str]) -> None:
    ranks = Ranks(3, few)
    assert ranks.ended() == [1, 1, 1]
    found = message(ranks.run)
    assert re.match(r"WORLD_SIZE=3 .*trainer\.sequences_per_step=4; use one of \[1, 2, 4\]", found)
    assert ranks.shown.count(found) == 1
    assert "Traceback" not in ranks.shown


def test_memory_that_runs_out_on_one_rank_halves_the_micro_step_of_all(
    undisturbed: dict[int, RunDir], tiny: list[str]
) -> None:
    run = trained(2, tiny, little_memory_on_rank_1)
    assert torch.load(run.checkpoints / "step-00000014.pt")["counters"]["sequences_per_micro_step"] == 1
    losses, others = series(run, "train/loss"), series(undisturbed[2], "train/loss")
    assert losses == others, "the first evaluation halves the micro-step, so all steps have one sequence at a time"


def test_all_ranks_take_the_micro_step_that_fits_on_the_smallest(
    undisturbed: dict[int, RunDir], tiny: list[str]
) -> None:
    run = trained(2, [*tiny, "trainer.checkpoint_interval_steps=4"], rank_1_has_little_memory)
    assert torch.load(run.checkpoints / "step-00000014.pt")["counters"]["sequences_per_micro_step"] == 1
    assert digest(run) == digest(undisturbed[2])


def test_a_wrong_option_is_reported_once(tiny: list[str]) -> None:
    for wrong, expected in (
        ("method.rank=0", "method.rank=0 must be at least 1"),
        ("-m", "give torchrun a single run"),
    ):
        ranks = Ranks(2, [*tiny, wrong], composed=tiny)
        assert ranks.ended() == [2, 2]
        assert ranks.shown.count(expected) == 1, ranks.shown


# ------------------------------------------------------------------------------------------------ killed and resumed


@pytest.mark.parametrize(("size", "sabotage"), [(2, killed_in_a_merge), (4, killed_at_step_9)])
def test_a_killed_run_resumed_by_the_same_number_of_ranks_ends_with_the_same_bits(
    undisturbed: dict[int, RunDir], few: list[str], size: int, sabotage
) -> None:
    killed = Ranks(size, few, sabotage)
    assert set(killed.ended()) == {-signal.SIGKILL}
    run = trained(size, few)
    assert digest(run) == digest(undisturbed[size])
    assert series(run, "train/loss") == series(undisturbed[size], "train/loss")


def test_dropout_differs_between_ranks_and_resumes_to_the_bit(few: list[str], tmp_path: Path) -> None:
    overrides = [*few, "method.dropout=0.2"]
    whole = trained(2, [*overrides, f"runs_dir={tmp_path / 'whole'}"], seeds_shown)
    assert Ranks(2, overrides, killed_at_step_9).ended() == [-signal.SIGKILL] * 2
    resumed = trained(2, overrides, seeds_shown)
    assert digest(resumed) == digest(whole)
    seeds = [
        sorted(line for line in (run.path.parent / "log.txt").read_text().splitlines() if " has dropout seed " in line)
        for run in (whole, resumed)
    ]
    assert seeds[0] == seeds[1]
    assert len({line.split()[-1] for line in seeds[0]}) == 2


def test_a_run_resumes_with_another_number_of_ranks(
    undisturbed: dict[int, RunDir], few: list[str], tmp_path: Path
) -> None:
    killed = Ranks(2, few, killed_at_step_9)
    killed.ended()
    for size in (1, 4):
        folder = tmp_path / str(size)
        shutil.copytree(killed.run.path.parent, folder)
        run = trained(size, [*few, f"runs_dir={folder}"])
        assert "resumed at step 8 of 14" in (folder / "log.txt").read_text()
        losses, others = series(run, "train/loss"), series(undisturbed[2], "train/loss")
        assert max(abs(losses[step] - others[step]) for step in losses) < TOLERANCE
        assert 0 < weight_gap(run, undisturbed[2]) < TOLERANCE


# ------------------------------------------------------------------------------------------------- stopped and failed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(few: list[str], rank: int) -> None:
    ranks = Ranks(2, [*few, *LONG, "trainer.checkpoint_interval_steps=1000"])
    ranks.until_step(20)
    ranks.send(rank, signal.SIGTERM)
    assert ranks.ended() == [130, 130], ranks.shown
    status = ranks.run.status
    assert status is not None
    assert status.state == "interrupted"
    stopped = max(series(ranks.run, "train/loss"))
    reason = "SIGTERM" if rank == 0 else "another rank .*stop"
    assert re.fullmatch(rf"{reason} after step {stopped}; .*checkpoint is written", status.message)
    assert latest_step(ranks.run.checkpoints) == stopped
    assert ranks.shown.count("go on with: ") == 1


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_a_killed_rank_ends_all_ranks_within_a_minute(few: list[str], size: int, rank: int) -> None:
    ranks = Ranks(size, [*few, *LONG])
    ranks.until_step(20)
    ranks.send(rank, signal.SIGKILL)
    began = time.monotonic()
    codes = ranks.ended()
    assert time.monotonic() - began < 60, "much sooner than TIMEOUT"
    assert codes == [-signal.SIGKILL if number == rank else 1 for number in range(size)]
    assert not ranks.run.is_locked
    if rank:
        assert re.search(r"another rank ended .*\(killed", message(ranks.run))
    assert "Traceback" not in ranks.shown
    resumed = Ranks(size, [*few, *LONG])
    resumed.until_step(max(series(ranks.run, "train/loss")) + 5)
    resumed.send(0, signal.SIGTERM)
    assert resumed.ended() == [130] * size
    assert "resumed at step" in resumed.shown


def test_a_rank_that_hangs_ends_the_others_at_the_limit(few: list[str]) -> None:
    ranks = Ranks(2, few, one_hangs)
    ranks.processes[0].join(40)
    assert ranks.processes[0].exitcode == 1, ranks.shown
    assert re.search("another rank .*respond for 10 s", message(ranks.run))
    ranks.send(1, signal.SIGKILL)


def test_a_rank_that_fails_says_so_before_its_connections_close(few: list[str]) -> None:
    ranks = Ranks(2, few, one_is_slow_to_fail)
    began = time.monotonic()
    while (status := ranks.run.status) is None or status.state == "running":
        assert time.monotonic() - began < 100
        time.sleep(0.1)
    assert "rank 0 received: rank 1 failed" in ranks.shown
    assert message(ranks.run).startswith("rank 1 failed: ZeroDivisionError: division by zero")
    for process in ranks.processes:
        process.kill()


def test_the_others_wait_until_rank_0_has_done_its_work(few: list[str], undisturbed: dict[int, RunDir]) -> None:
    assert digest(trained(2, few, first_takes_long)) == digest(undisturbed[2])


def test_an_error_while_rank_0_prepares_ends_all_ranks(few: list[str]) -> None:
    ranks = Ranks(2, few, first_cannot_prepare)
    assert ranks.ended() == [1, 1]
    assert message(ranks.run) == "the text is missing"
    assert ranks.shown.count("the text is missing") == 1


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [(same_gpu, "ranks 0, 1 have the same GPU"), (only_rank_1_has_a_gpu, "rank 0 of 2 has no GPU")],
)
def test_ranks_without_a_separate_gpu_are_refused_before_a_corpus_is_made(
    few: list[str], sabotage, reason: str
) -> None:
    ranks = Ranks(2, few, sabotage)
    assert ranks.ended() == [1, 1]
    found = message(ranks.run)
    assert re.match(rf"{reason}.*; start one rank .*trainer\.device=cpu", found)
    assert ranks.shown.count(found) == 1
    assert not (ranks.run.path.parent / "corpora").exists()


def test_a_buffer_that_does_not_fit_on_one_rank_is_reported_before_the_first_step(few: list[str]) -> None:
    ranks = Ranks(2, few, no_memory_on_rank_1)
    assert ranks.ended() == [1, 1]
    expected = r"out of memory on cpu, .*another rank, .*buffer.*; use .*trainer\.activation_checkpointing=true"
    assert re.match(expected, message(ranks.run))
    assert series(ranks.run, "train/loss") == {}


def test_the_error_of_another_rank_is_shown_if_rank_0_recorded_none(few: list[str]) -> None:
    ranks = Ranks(2, [*few, *LONG])
    ranks.until_step(20)
    ranks.run.error_file(1).write_text("RuntimeError: an illegal memory access\n\nTraceback ...")
    for rank in (0, 1):
        ranks.send(rank, signal.SIGKILL)
    ranks.ended()
    (state,) = observe([ranks.run])
    assert state.name == "interrupted"
    expected = r"rank 1 failed: RuntimeError: an illegal memory access; .*died; .*checkpoint is kept"
    assert re.fullmatch(expected, state.message)


def test_a_rank_that_fails_alone_is_named(few: list[str]) -> None:
    ranks = Ranks(2, few, one_fails)
    assert ranks.ended() == [1, 1]
    assert message(ranks.run).startswith("rank 1 failed: ZeroDivisionError: division by zero")
    assert "failed: rank 1 failed: ZeroDivisionError" in ranks.shown
    assert "Traceback" in ranks.run.error_file(1).read_text()
    assert trained(2, few).rank_errors == {}


def test_an_error_of_all_ranks_is_reported_once(few: list[str]) -> None:
    ranks = Ranks(2, [*few, "optimizer.learning_rate=1e30", "trainer.max_consecutive_skipped_updates=2"])
    assert ranks.ended() == [1, 1]
    assert message(ranks.run).startswith("the run diverged")
    assert ranks.shown.count("failed: the run diverged") == 1


def test_a_factor_that_differs_on_one_rank_is_found_after_the_next_merge(few: list[str]) -> None:
    ranks = Ranks(4, [*few, "trainer.checkpoint_interval_steps=100"], one_changes_a_factor)
    assert ranks.ended() == [1, 1, 1, 1]
    expected = "step 11: .*weights of rank 1 differ .*rank 0, .*; give all processes the same"
    assert re.match(expected, message(ranks.run))
