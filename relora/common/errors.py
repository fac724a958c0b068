"""What a person is told instead of a traceback."""

from pathlib import Path
from typing import Any

CHARACTERS_SHOWN = 80


def shown(value: Any, characters: int = CHARACTERS_SHOWN) -> str:
    """A value as a message shows it: control characters are escaped, a long value loses its middle."""
    try:
        text = printable(str(value))
    except ValueError:  # Python does not write integers of more than 4300 digits
        return "an integer of more than 4300 digits"
    if len(text) <= characters:
        return text
    tail = characters // 3
    return f"{text[: characters - tail]}...{text[-tail:]}"


def printable(text: str) -> str:
    """The text in one line: control characters and bytes that are no text are escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def first_line(error: BaseException) -> str:
    """The first line of what was raised that is not blank; the class of an error without words."""
    lines = (printable(line.strip()) for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


class ConfigError(ValueError):
    """A config that cannot be run; the one line of its message says which value breaks which rule and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


class Interrupted(Exception):  # noqa: N818 -- like KeyboardInterrupt, no error
    """The run was asked to stop, and wrote a checkpoint first."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} after step {step}")
        self.step, self.reason = step, reason


class Stopped(Exception):  # noqa: N818 -- no error
    """The work was asked to stop, and nothing of it needs to be kept."""


class RunError(RuntimeError):
    """Something that went wrong in a run and that a person can mend; the message stands alone."""


class DamagedFile(RunError):  # noqa: N818 -- what is found, seen from here
    """A file does not hold what it should; the message names the file and what is wrong."""

    def __init__(self, path: Path, why: str, remedy: str = "") -> None:
        super().__init__(f"{path} cannot be read: {why}" + (f"; {remedy}" if remedy else ""))
        self.path, self.why = path, why


class WarmStartTrained(Exception):  # noqa: N818 -- no error
    """The warm start stands, and this job was to do no more."""

    def __init__(self) -> None:
        super().__init__("the warm start is trained; the runs that share it go on from there")


class TrainingError(RunError):
    """Training cannot go on."""
