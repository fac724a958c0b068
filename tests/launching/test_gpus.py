import signal
import time
from functools import cache
from pathlib import Path

import pytest

from relora.config.compose import compose
from relora.launching import gpus
from relora.launching.device import planned_device
from relora.launching.local import start_process
from relora.studies.study import Planned

pytestmark = pytest.mark.slow


LISTED = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}{i}{i})\n" for i in range(2))
FREE = "0, GPU-000, 81000\n1, GPU-111, 4000\n"


@pytest.fixture(autouse=True)
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    answers = f"if [ $1 = -L ]; then cat <<'END'\n{LISTED}END\nelse cat <<'END'\n{FREE}END\nfi\n"
    script.write_text(f"#!/bin/sh\n{answers}")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_listed", cache(gpus._listed.__wrapped__))  # tests share no cache
    monkeypatch.setattr(gpus, "_taken", [])
    monkeypatch.setattr(gpus, "_warned", set())


def seen(tmp_path: Path, device: str, count: int, max_parallel: int) -> list[str | None]:
    """Start child processes that live at the same time. Return the CUDA_VISIBLE_DEVICES of each."""
    processes, found = [], []
    configs = [compose([f"runs_dir={tmp_path}", f"trainer.seed={seed}"]) for seed in range(count)]
    try:
        for config in configs:
            config.trainer.device = device
            item = Planned(config=config, role="arm")
            item.run.path.mkdir(parents=True)
            processes.append(start_process(item, max_parallel))
            processes[-1].send_signal(signal.SIGSTOP)  # it would end soon, and that frees its GPU
            environment = Path(f"/proc/{processes[-1].pid}/environ")
            deadline = time.monotonic() + 120
            while not (pairs := environment.read_text().split("\0"))[0] and time.monotonic() < deadline:
                time.sleep(0.01)  # it is empty for a moment while the process starts
            found.append(dict(pair.split("=", 1) for pair in pairs if "=" in pair).get("CUDA_VISIBLE_DEVICES"))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def test_each_local_run_gets_a_gpu_and_more_runs_share_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seen(tmp_path, "auto", 3, 3) == ["GPU-000", "GPU-111", "GPU-000"]
    assert capsys.readouterr().out.count("cluster.max_parallel=3 is more than 2 GPUs") == 1


def test_the_gpus_that_the_user_names_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,5")
    assert seen(tmp_path, "auto", 2, 2) == ["GPU-abc", "5"]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_run_that_needs_no_choice_of_a_gpu_keeps_its_environment(tmp_path: Path, device: str) -> None:
    assert seen(tmp_path, device, 1, 2) == [None]


@pytest.mark.parametrize(
    ("chosen", "device", "free_mib"),
    [
        (None, "auto", 81000),
        (None, "cuda:1", 4000),
        (None, "cuda:2", None),
        ("1", "cuda", 4000),
        ("GPU-111", "auto", 4000),
        ("1,0", "cuda:1", 81000),
        ("", "auto", None),
    ],
)
def test_the_free_memory_is_that_of_the_gpu_that_the_run_would_use(
    chosen: str | None, device: str, free_mib: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.free_gpu_bytes(device) == (None if free_mib is None else free_mib * 2**20)


def test_the_plan_of_a_run_is_for_the_free_gpu(tmp_path: Path) -> None:
    device = planned_device(compose([f"runs_dir={tmp_path}"]))
    assert (device.memory_bytes, device.name, device.is_gpu) == (81000 * 2**20, "free on the GPU", True)
    on_cpu = planned_device(compose([f"runs_dir={tmp_path}", "trainer.device=cpu"]))
    assert (on_cpu.name, on_cpu.is_gpu) == ("available on this machine", False)
