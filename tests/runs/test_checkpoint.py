import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import flip
from small import fill

from relora.config.compose import compose
from relora.config.frozen import freeze
from relora.runs.checkpoint import KEPT, CheckpointError, load, load_latest, save
from relora.runs.rundir import write_json


def state(step: int, size: int = 100) -> dict[str, Any]:
    """A state that can be checked: every entry of x equals the step."""
    return {"step": step, "x": torch.full((size,), float(step))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_whole(loaded: dict[str, Any] | None) -> bool:
    return loaded is not None and bool((loaded["x"] == loaded["step"]).all())


def silent(message: str) -> None:
    raise AssertionError(f"no message is expected, but: {message}")


def loaded_step(folder: Path) -> int:
    loaded = load_latest(folder, silent)
    assert loaded is not None
    assert is_whole(loaded)
    return loaded["step"]


# ---------------------------------------------------------------------------------------------------- save and load


def test_a_saved_state_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(7, 5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(3, 7, generator=generator)).sum().backward()
    optimizer.step()
    saved = {
        "step": 9,
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "counters": {"skipped": 3, "seconds": 0.1 + 0.2, "name": "größe", "nothing": None, "yes": True, "list": [1, 2]},
    }
    path = save(tmp_path, 9, saved)
    assert path == tmp_path / "step-00000009.pt"
    loaded = load_latest(tmp_path, silent)
    assert loaded is not None
    assert loaded.keys() == saved.keys()
    for part in ("model", "optimizer", "half"):
        torch.testing.assert_close(loaded[part], saved[part], rtol=0, atol=0)
    assert loaded["counters"] == saved["counters"]
    assert loaded["step"] == 9


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_checkpoints_has_none(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        folder.mkdir()
    assert load_latest(folder, silent) is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert KEPT == 2
    for step in (5, 10, 15, 20):
        save(tmp_path, step, state(step))
        assert loaded_step(tmp_path) == step
    assert names(tmp_path) == ["step-00000015.pt", "step-00000020.pt"]


def test_the_newest_checkpoint_is_chosen_by_step_and_not_by_name(tmp_path: Path) -> None:
    for step in (7, 99_999_999, 100_000_000):
        save(tmp_path, step, state(step))
    assert loaded_step(tmp_path) == 100_000_000
    assert names(tmp_path) == ["step-100000000.pt", "step-99999999.pt"]


def test_saving_the_same_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, state(4))
    save(tmp_path, 5, state(5))
    assert names(tmp_path) == ["step-00000005.pt"]
    assert loaded_step(tmp_path) == 5


def test_other_files_are_neither_read_nor_removed(tmp_path: Path) -> None:
    for name in ("notes.txt", "step-9.pt.bak", "step-best.pt"):
        (tmp_path / name).write_text("mine")
    for step in (1, 2, 3):
        save(tmp_path, step, state(step))
    assert loaded_step(tmp_path) == 3
    assert {"notes.txt", "step-9.pt.bak", "step-best.pt"} < set(names(tmp_path))


# ------------------------------------------------------------------------------------------------- unreadable files


def test_files_of_an_interrupted_save_are_ignored_and_the_next_save_removes_them(tmp_path: Path) -> None:
    save(tmp_path, 5, state(5))
    whole = (tmp_path / "step-00000005.pt").read_bytes()
    (tmp_path / "step-00000010.tmp").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "step-00000008.tmp").write_bytes(whole)
    assert loaded_step(tmp_path) == 5
    save(tmp_path, 10, state(10))
    assert names(tmp_path) == ["step-00000005.pt", "step-00000010.pt"]


@pytest.mark.parametrize("kept_share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_newest_checkpoint_is_named_and_the_previous_one_is_loaded(
    tmp_path: Path, kept_share: float
) -> None:
    for step in (5, 10):
        save(tmp_path, step, state(step, size=10_000))
    newest = tmp_path / "step-00000010.pt"
    os.truncate(newest, int(newest.stat().st_size * kept_share))
    messages: list[str] = []
    loaded = load_latest(tmp_path, messages.append)
    assert is_whole(loaded)
    assert loaded is not None
    assert loaded["step"] == 5
    assert len(messages) == 1
    assert str(newest) in messages[0]
    assert "trying the one before it" in messages[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_a_flipped_bit_in_the_newest_is_reported_and_the_previous_one_is_loaded(tmp_path: Path, share: float) -> None:
    for step in (5, 10):
        save(tmp_path, step, state(step, size=10_000))
    newest = tmp_path / "step-00000010.pt"
    flip(newest, share)
    messages: list[str] = []
    loaded = load_latest(tmp_path, messages.append)
    assert loaded is not None
    assert loaded["step"] == 5
    assert len(messages) == 1
    assert f"{newest} is damaged" in messages[0]


def test_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 5, state(5, size=4))
    whole = path.read_bytes()
    for number in range(len(whole)):
        path.write_bytes(whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            load(path)
    path.write_bytes(whole)
    assert is_whole(load(path))


@pytest.mark.parametrize("kind", ["folder", "empty", "dangling link"])
def test_a_path_that_is_no_checkpoint_is_named_and_later_saves_work(tmp_path: Path, kind: str) -> None:
    for step in (5, 10):
        save(tmp_path, step, state(step))
    newest = tmp_path / "step-00000010.pt"
    newest.unlink()
    if kind == "folder":
        newest.mkdir()
        (newest / "mine").write_text("a file of the user")
    elif kind == "empty":
        newest.touch()
    else:
        newest.symlink_to(tmp_path / "nowhere")
    messages: list[str] = []
    loaded = load_latest(tmp_path, messages.append)
    assert loaded is not None
    assert loaded["step"] == 5
    assert len(messages) == 1
    assert str(newest) in messages[0]
    for step in (8, 10, 12):
        save(tmp_path, step, state(step))
        assert loaded_step(tmp_path) == step
    kept = ["step-00000010.pt", "step-00000012.pt"]
    assert names(tmp_path) == sorted([*kept, "step-00000010.pt.damaged"] if kind == "folder" else kept)


def test_a_damaged_newest_checkpoint_does_not_remove_the_good_one_before_it(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step, state(step))
    flip(tmp_path / "step-00000010.pt", 0.5)
    save(tmp_path, 8, state(8))
    assert names(tmp_path) == ["step-00000005.pt", "step-00000008.pt"]


def test_an_old_checkpoint_without_a_checksum_loads(tmp_path: Path) -> None:
    path = tmp_path / "step-00000005.pt"
    torch.save(state(5), path)
    assert loaded_step(tmp_path) == 5
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="its end is missing"):
        load(path)


def test_torch_without_relora_reads_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 5, state(5))
    assert is_whole(torch.load(path, weights_only=True))
    assert is_whole(torch.load(path, weights_only=True, mmap=True))


def test_if_no_checkpoint_can_be_read_the_error_gives_the_remedy(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step, state(step))
        (tmp_path / f"step-{step:08d}.pt").write_bytes(b"no checkpoint")
    messages: list[str] = []
    with pytest.raises(CheckpointError, match=rf"no checkpoint in {tmp_path} .*; remove the folder"):
        load_latest(tmp_path, messages.append)
    assert len(messages) == 2
    assert "step-00000010" in messages[0]
    assert "step-00000005" in messages[1]


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_loading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    checkpoints, mark = tmp_path / "checkpoints", tmp_path / "mark"
    save(checkpoints, 5, state(5))
    save(checkpoints, 10, {"step": 10, "x": Hostile(mark)})
    messages: list[str] = []
    loaded = load_latest(checkpoints, messages.append)
    assert loaded is not None
    assert loaded["step"] == 5
    assert len(messages) == 1
    assert not mark.exists()
    torch.load(checkpoints / "step-00000010.pt", weights_only=False)
    assert mark.exists(), "the file was harmless, so the test shows nothing"


# -------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 300_000, 2_000_000])
def test_a_full_disk_is_an_error_and_keeps_earlier_checkpoints(small_disk: Path, size: int) -> None:
    checkpoints = small_disk / "checkpoints"
    for step in (5, 10):
        save(checkpoints, step, state(step, size=10_000))
    before = {name: (checkpoints / name).read_bytes() for name in names(checkpoints)}
    filler = fill(small_disk, max(20_000, size))

    with pytest.raises(CheckpointError, match=rf"step 15 .*{checkpoints}: .*No space left"):
        save(checkpoints, 15, state(15, size=size))

    assert {name: (checkpoints / name).read_bytes() for name in names(checkpoints)} == before
    assert loaded_step(checkpoints) == 10
    filler.unlink()
    save(checkpoints, 15, state(15, size=10_000))
    assert loaded_step(checkpoints) == 15


# ----------------------------------------------------------------------------------------------------------- kills

SAVE_UNTIL_KILLED = """
import itertools, json, os, signal, sys, time
from pathlib import Path
import torch
from relora.runs.checkpoint import load_latest, save

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
messages, steps, torn = [], [], 0
for attempt in range(300):
    first = steps[-1] + 1 if steps else 1
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for step in itertools.count(first):
            save(folder, step, {"step": step, "x": torch.full((250_000,), float(step))})
            os.write(writing, b".")
    os.read(reading, 1)
    time.sleep((attempt * 7 % 50) / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    torn += any(folder.glob("*.tmp"))
    loaded = load_latest(folder, messages.append)
    assert bool((loaded["x"] == loaded["step"]).all())
    steps.append(loaded["step"])
    if torn >= wanted:
        break
print(json.dumps({"messages": messages, "steps": steps, "torn": torn}))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_readable_newest_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNTIL_KILLED, str(tmp_path / "checkpoints"), "12"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["torn"] >= 12, "too few kills hit a save, so the test shows nothing"
    assert result["messages"] == []
    assert result["steps"] == sorted(set(result["steps"])), "every attempt resumes from the newest checkpoint"


# -------------------------------------------------------------------------------------------------- the other files


@pytest.mark.parametrize("file", ["status.json", "config.yaml"])
def test_a_file_of_a_run_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / file, []
    fsync, rename = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def recorded_rename(source: Any, target: Any) -> None:
        calls.append(("renamed", Path(source).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    if file == "config.yaml":
        freeze(compose([]), path)
    else:
        write_json(path, {"state": "running"})
    temporary = calls[0][1]
    assert temporary.startswith(f"{file}.")
    assert calls == [("synced", temporary), ("renamed", temporary), ("synced", tmp_path.name)]
    assert names(tmp_path) == [file]
