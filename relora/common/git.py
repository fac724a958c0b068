"""The commit of the code that runs."""

import os
import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """The commit of this package's checkout, with "-dirty" where it is changed; None outside one."""
    command = [
        "git",
        "-C",
        os.fspath(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
