from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora.common.checks import parse_bytes
from relora.common.errors import ConfigError
from relora.config.compose import Composer
from relora.config.peak import USABLE_SHARE, Phases, host_share_bytes

COMPOSER = Composer()
BASE = ["model=llama_60m", "data.vocab_size=32000", "trainer.sequences_per_step=96"]


def phases_of(*overrides: str) -> Phases:
    return Phases(config=COMPOSER.compose([*BASE, *overrides]), vocab_size=32_000)


@given(
    gib=st.floats(0.1, 60.0),
    method=st.sampled_from(["relora", "full", "galore", "cola"]),
    more=st.sampled_from([[], ["trainer.precision=bf16"], ["trainer.activation_checkpointing=true"]]),
)
def test_the_next_larger_divisor_of_the_share_would_not_fit(gib: float, method: str, more: list[str]) -> None:
    phases, device_bytes = phases_of(f"method={method}", *more), round(gib * 2**30)
    found = phases.fitting(device_bytes)
    assert 96 % max(found, 1) == 0
    assert found == 0 or phases.peak_bytes(found) <= USABLE_SHARE * device_bytes
    larger = [count for count in range(found + 1, 97) if 96 % count == 0]
    assert all(phases.peak_bytes(count) > USABLE_SHARE * device_bytes for count in larger)


def test_the_warm_start_needs_the_memory_of_full_rank() -> None:
    warm, without, full = (
        phases_of(*more) for more in (["method.warm_start_steps=100"], ["method.warm_start_steps=0"], ["method=full"])
    )
    assert without.peak_bytes(1) < warm.peak_bytes(1) == full.peak_bytes(1)


@pytest.mark.parametrize("more", [["trainer.sequences_per_micro_step=8"], ["trainer.update_in_backward=true"]])
def test_a_number_that_the_user_has_set_is_not_changed(more: list[str]) -> None:
    phases = phases_of("optimizer.max_grad_norm=null", "method=full", *more)
    size = 8 if "micro" in more[0] else 96
    needed = phases.peak_bytes(size) / USABLE_SHARE
    assert phases.fitting(round(needed) + 1) == phases.fitting(2**50) == size
    assert phases.fitting(round(needed) - 1) == 0


def test_each_process_has_its_share_of_the_batch() -> None:
    several = Phases(config=COMPOSER.compose([*BASE, "method=full"]), vocab_size=32_000, world_size=4)
    assert several.sequences == several.fitting(2**50) == 24
    one = phases_of("method=full", "trainer.sequences_per_step=24")
    assert several.peak_bytes(24) == one.peak_bytes(24) + 4 * one.of_method.cost.trainable_parameters


def test_local_runs_share_their_machine_and_jobs_have_their_limit() -> None:
    local = COMPOSER.compose([*BASE, "cluster.max_parallel=3"])
    assert host_share_bytes(local, 900, processes=1) == 300
    assert host_share_bytes(local, None, processes=1) is None
    job = COMPOSER.compose([*BASE, "cluster=slurm", "cluster.mem_gb=2", "cluster.max_parallel=9"])
    assert host_share_bytes(job, 2**40, processes=4) == 2**29
    assert host_share_bytes(job, 400, processes=4) == 100


@pytest.mark.parametrize(
    ("given_size", "size_bytes"),
    [
        ("80GiB", 80 * 2**30),
        ("80 gib", 80 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 2**29),
        (7, 7),
        ("12_000", 12_000),
    ],
)
def test_sizes_of_memory_are_read(given_size: Any, size_bytes: int) -> None:
    assert parse_bytes("plan.device_memory", given_size) == size_bytes


@pytest.mark.parametrize("wrong", ["80 apples", "-1", "0", "GiB", "80ib", "1e400GB", "9999999TiB", "80Gi"])
def test_other_sizes_are_refused_with_an_example(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^plan\.device_memory=.* (80GiB|at least one byte|no device)"):
        COMPOSER.compose([*BASE, f"plan.device_memory={wrong}"])
