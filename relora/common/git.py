"""The commit of the code that runs."""

import os
import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """Return the commit of this package's checkout, with "-dirty" if it has changes; None outside a checkout."""
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
