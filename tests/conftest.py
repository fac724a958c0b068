"""Shared by all tests: a small setting that has a warm start and several restarts, and takes seconds."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
# This is set before the import of torch, which reads it. The workers share the cores. With several threads each, they
# train small models ten times more slowly than with one thread.

import gc
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from damaged import Case, killed_case, settings_of
from hypothesis import settings
from small import TINY, skip_or_fail
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)

settings.register_profile("relora", derandomize=True, deadline=None)
settings.load_profile("relora")


STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
"""Names of audit events of Python."""
_quick_test: list[str] = []
"""The quick test that runs now."""


def _forbid_processes(event: str, _: tuple[object, ...]) -> None:
    if _quick_test and event in STARTS_A_PROCESS:
        raise RuntimeError(f"{_quick_test[0]} starts a process ({event}); mark it slow")


sys.addaudithook(_forbid_processes)


LONGEST_FIRST = ("slurm", "training", "distributed", "launching", "runs", "browser")
"""Folders whose tests take long. With the short files last, all workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders with the longest tests first. Mark tests without the mark `slow` as `quick`."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker("quick")


_modules_frozen = 0
"""How many modules were imported when `_freeze_imports` last took effect."""


def _freeze_imports() -> None:
    """Exclude the imported modules from all later garbage collections.

    Every run collects garbage before it measures its memory. With the modules of torch, transformers and MLflow this
    takes 0.3 s, which is more than the rest of a small run.
    """
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 100:
        gc.collect()
        gc.freeze()
        _modules_frozen = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """From here to its teardown, a quick test starts no process."""
    _freeze_imports()
    if item.get_closest_marker("quick") is not None:
        _quick_test.append(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """The teardown after the last test is also that of the session, which may stop servers."""
    _quick_test.clear()


class OneWorkerPerFile(LoadFileScheduling):
    """The tests of a file stay on one worker, because they share fixtures. So do all SLURM tests: they share a cluster.

    xdist 3.8 ignores the marks of `--dist loadgroup` under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "tests/slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneWorkerPerFile:
    """Return the scheduler, which assigns the tests to workers."""
    return OneWorkerPerFile(config, log)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text with some structure to learn."""
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 6))) for _ in range(40)]
    for number in range(120):
        body = " ".join(chance.choices(words, k=80))
        (folder / f"{number:03}.txt").write_text(f"text {number}: {body}.\n")
    return folder


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> list[str]:
    """Overrides of a complete small run in a separate folder. Its only record is JSONL."""
    return [*TINY, "data=text", f"data.path={text}", f"runs_dir={tmp_path / 'runs'}", "tracker=jsonl"]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs. MLflow takes seconds to create one, so tests copy this one."""
    from relora.tracking.store import open_store

    folder = tmp_path_factory.mktemp("store")
    open_store(f"sqlite:///{folder / 'mlflow.db'}", folder)
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def finished_run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An undisturbed run. Tests only read it."""
    case = Case(overrides=settings_of(text, tmp_path_factory.mktemp("finished") / "runs"))
    assert case.launch().state == "finished"
    return case


@pytest.fixture(scope="session")
def killed_run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run that was killed after step `KILLED_AT`, with checkpoints of steps 4 and 8. Tests only read it."""
    return killed_case(settings_of(text, tmp_path_factory.mktemp("killed") / "runs"))


@pytest.fixture
def finished(finished_run: Case, tmp_path: Path) -> Case:
    """A copy of the finished run for one test."""
    return finished_run.copied(tmp_path / "damaged")


@pytest.fixture
def killed(killed_run: Case, tmp_path: Path) -> Case:
    """A copy of the killed run for one test."""
    return killed_run.copied(tmp_path / "damaged")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB. If it cannot be mounted, the test is skipped, or fails if RELORA_REQUIRE names disk."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        skip_or_fail("disk", f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(autouse=True)
def _terminal_untouched() -> Iterator[None]:
    """Restore sys.argv, because Hydra's main replaces it."""
    argv = list(sys.argv)
    yield
    sys.argv[:] = argv
