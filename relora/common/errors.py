"""Errors that the user sees as a message instead of a traceback, and helpers that format their text."""

import sys
from pathlib import Path
from typing import Any

CHARACTERS_SHOWN = 80


def shown(value: Any, characters: int = CHARACTERS_SHOWN) -> str:
    """Format a value for a message: control characters are escaped, and the middle of a long value is cut out."""
    try:
        text = printable(str(value))
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "an integer of more than 4300 digits"
    if len(text) <= characters:
        return text
    tail = characters // 3
    return f"{text[: characters - tail]}...{text[-tail:]}"


def printable(text: str) -> str:
    """Return the text on one line, with control characters and undecodable bytes escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message that is not blank, or the error's class if it has no message."""
    lines = (printable(line.strip()) for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def print_note(message: str) -> None:
    """Print one line for the user to stderr, so that it stays apart from the output of the command."""
    print(f"relora: {message}", file=sys.stderr, flush=True)


class ConfigError(ValueError):
    """A config cannot be run. The message is one line: which value breaks which rule, and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


class Interrupted(Exception):  # noqa: N818 -- like KeyboardInterrupt, not an error
    """A stop was requested, and the run wrote a checkpoint first."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} after step {step}")
        self.step, self.reason = step, reason


class Stopped(Exception):  # noqa: N818 -- not an error
    """A stop was requested, and no result of the work needs to be kept."""


class RunError(RuntimeError):
    """A run failed for a reason that the user can fix. The message is complete without a traceback."""


class DamagedFile(RunError):  # noqa: N818 -- named after the cause
    """A file does not have the expected content. The message names the file and what is wrong with it."""

    def __init__(self, path: Path, why: str, remedy: str = "") -> None:
        super().__init__(f"{path} cannot be read: {why}" + (f"; {remedy}" if remedy else ""))
        self.path, self.why = path, why


class WarmStartTrained(Exception):  # noqa: N818 -- not an error
    """The warm start is trained, and this job has no more work."""

    def __init__(self) -> None:
        super().__init__("the warm start is trained; the runs that share it continue from it")


class TrainingError(RunError):
    """Training cannot continue."""
