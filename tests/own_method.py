"""The package of docs/your-own-method.md, installed in a separate folder as the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from small import REPOSITORY

PAGE = REPOSITORY / "docs" / "your-own-method.md"


def blocks() -> list[tuple[str, str, str]]:
    """Every block of code as (its file or "", its language, its text)."""
    return re.findall(r"(?:^`([^`\n]+)`\n\n)?^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def install(folder: Path) -> Path:
    """Write the page's files to `folder`, install them and return the folder for PYTHONPATH."""
    files = [(name, text) for name, _, text in blocks() if name]
    assert len(files) == 3
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", "site", "./orthogonal-relora"], cwd=folder, check=True)
    return folder / "site"


def environment(site: Path) -> dict[str, str]:
    """The environment of a process in which the package is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(site), os.fspath(REPOSITORY)])}
