"""The code of a run: its hash, its changes since the commit, and snapshots from which another process imports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_method import environment, install
from small import REPOSITORY

from relora.common.errors import RunError
from relora.runs import code

pytestmark = pytest.mark.slow

PARTS = ("relora", "conf", "experiments", "sweeps")
IDENTITY = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def git(folder: Path, *arguments: str) -> str:
    env = {**os.environ, **IDENTITY}
    command = ["git", "-C", os.fspath(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of this package with one commit."""
    folder = tmp_path / "checkout"
    for part in PARTS:
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("/runs\n__pycache__\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return folder


def python(source: str, path: Path, **more: str) -> str:
    """What Python prints when it imports relora from `path` first."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": os.fspath(path), "PYTHONSAFEPATH": "1", **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def taken(checkout: Path, runs_dir: Path) -> Path:
    """The snapshot that a process makes of the checkout from which it imports."""
    source = (
        f"from pathlib import Path; from relora.runs.code import take; print(take(['relora'], Path({str(runs_dir)!r})))"
    )
    return Path(python(source, checkout))


def sources(folder: Path) -> dict[str, bytes]:
    files = (file for part in PARTS for file in (folder / part).rglob("*") if file.is_file())
    return {os.fspath(file.relative_to(folder)): file.read_bytes() for file in files if file.suffix != ".pyc"}


def test_a_snapshot_has_every_file_and_is_made_once_for_the_same_content(checkout: Path, tmp_path: Path) -> None:
    snapshot = taken(checkout, tmp_path / "runs")
    assert snapshot.parent == tmp_path / "runs" / "code"
    assert sources(snapshot) == sources(checkout)
    before = (snapshot / "code.json").stat().st_ino
    git(checkout, "commit", "-q", "--allow-empty", "-m", "another commit with the same content")
    moved = checkout.rename(tmp_path / "moved")
    assert taken(moved, tmp_path / "runs") == snapshot
    assert (snapshot / "code.json").stat().st_ino == before
    (moved / "relora" / "core" / "reset.py").write_text("# changed\n")
    other = taken(moved, tmp_path / "runs")
    assert other != snapshot
    assert sources(other) == sources(moved) != sources(snapshot)


def test_a_process_runs_the_snapshot_whatever_happens_to_the_checkout(checkout: Path, tmp_path: Path) -> None:
    """Also with the checkout as its working directory, from which `python -m` imports otherwise."""
    commit = git(checkout, "rev-parse", "HEAD").strip()
    snapshot = taken(checkout, checkout / "runs")  # inside the checkout, as by default
    shutil.rmtree(checkout / "relora" / "core")
    (checkout / "relora" / "__init__.py").write_text("raise SystemExit('the checkout is imported')\n")
    git(checkout, "commit", "-qam", "later")
    (line,) = code.shell_lines(snapshot)
    script = f"{line}\n{sys.executable} -m relora --help && {sys.executable} -m relora.runs.printed"
    (snapshot / "relora" / "runs" / "printed.py").write_text(
        "from relora.runs.code import code_of\nprint(code_of(['relora']).commit)\n"
    )
    done = subprocess.run(["sh", "-ec", script], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == commit


def test_the_changes_turn_a_clean_checkout_into_the_code_that_ran(checkout: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    git(tmp_path, "clone", "-q", os.fspath(checkout), os.fspath(clean))
    (checkout / "relora" / "core" / "reset.py").write_text("# changed\n")
    (checkout / "relora" / "core" / "new ä.py").write_text("# new\n")
    (checkout / "conf" / "config.yaml").unlink()
    (checkout / "notes.txt").write_text("no part of the code\n")
    with (checkout / "relora" / "large.bin").open("wb") as file:
        file.truncate(2**20 + 1)
    snapshot = taken(checkout, tmp_path / "runs")
    changes = (snapshot / "code.diff").read_text()
    assert "notes.txt" not in changes
    assert "# new file, 1,048,577 bytes, not shown: relora/large.bin" in changes
    assert (
        json.loads((snapshot / "code.json").read_text())["commit"]
        == git(checkout, "rev-parse", "HEAD").strip() + "-dirty"
    )
    (tmp_path / "patch").write_text(changes)
    git(clean, "apply", "--allow-empty", os.fspath(tmp_path / "patch"))
    assert sources(clean) | {"relora/large.bin": bytes(2**20 + 1)} == sources(checkout)


def test_code_outside_of_a_checkout_has_a_hash_and_no_commit(checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".git")
    source = "from relora.runs.code import code_of; c = code_of(['relora']); print(c.content_hash, c.commit, c.changes)"
    shown = python(source, checkout, GIT_CEILING_DIRECTORIES=os.fspath(tmp_path))
    content_hash, commit = shown.split()
    assert (len(content_hash), commit) == (code.HASH_DIGITS, "None")


def test_the_package_of_a_method_in_use_is_part_of_the_code(tmp_path: Path) -> None:
    site = install(tmp_path / "site")
    source = """
from relora.config.compose import compose
from relora.runs.code import modules_of, take
from pathlib import Path
for method in ("relora", "orthogonal"):
    modules = modules_of([compose([f"method={method}"])])
    print(*modules, take(modules, Path("runs")).name)
"""
    shown = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment(site), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (plain, first), (*both, second) = (line.split() for line in shown)
    assert (plain, both) == ("relora", ["relora", "orthogonal_relora"])
    assert first != second
    assert not (tmp_path / "runs" / "code" / first / "orthogonal_relora").exists()
    copied = tmp_path / "runs" / "code" / second / "orthogonal_relora"
    assert any(copied.rglob("*.yaml")), "its conf/ too"
    assert any(copied.rglob("*.py"))


def test_a_module_that_is_not_in_files_is_named() -> None:
    with pytest.raises(RunError, match="the code of sys is not in files"):
        code.code_of(["relora", "sys"])


def test_a_file_that_cannot_be_read_is_named_and_leaves_no_snapshot(tmp_path: Path, monkeypatch) -> None:
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", os.fspath(source))

    monkeypatch.setattr(code.shutil, "copy2", refuse)
    with pytest.raises(RunError, match=r"the code snapshot misses .*: Permission denied"):
        code.take(["relora"], tmp_path)
    assert not list((tmp_path / "code").iterdir())
