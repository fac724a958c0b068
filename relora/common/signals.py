"""Stop signals of a process, from its first line to its end: Ctrl-C, SIGTERM and SLURM's SIGUSR2.

An exception in the middle of an import, of torch's own code or of a file that is being written breaks more than it
stops. So a signal is remembered, and the work asks for it where it can stop. Imports nothing heavy, because every
entry point calls `whole_process` before its other imports. `python -m relora.common.signals -m MODULE ...` starts a
module that comes to it only after its imports: until then signals wait.
"""

import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGUSR2: "SIGUSR2"}


class _Mode(Enum):
    HELD = "every signal is remembered"
    ASKED = "the first signal is remembered; a second one of its kind interrupts"
    RAISING = "every signal interrupts"


@dataclass
class _Now:
    """The state of this process."""

    installed: bool = False
    mode: _Mode = _Mode.HELD
    reason: str | None = None
    raised: bool = False
    log_line: Callable[[str], None] = lambda message: None


_now = _Now()


def reason() -> str | None:
    """The signal that asks this process to stop, None before one came."""
    return _now.reason


def interrupted() -> bool:
    """Whether a KeyboardInterrupt was raised for a signal, whatever a library made of it."""
    return _now.raised


def check() -> None:
    """Raise KeyboardInterrupt if a signal came."""
    if _now.reason is not None:
        _now.raised = True
        raise KeyboardInterrupt


def forget() -> None:
    """Take the signal so far as answered; the next one counts as the first."""
    _now.reason, _now.raised = None, False


def _handle(number: int, frame: FrameType | None) -> None:
    name = NAMES[signal.Signals(number)]
    # SIGTERM after SLURM's warning is the end: no time is left then, and the reason stays the warning.
    is_the_end = _now.reason == "SIGUSR2" and number == signal.SIGTERM
    # SLURM may repeat SIGUSR2 at any time.
    again = is_the_end or (_now.reason == name and number != signal.SIGUSR2)
    if not again:
        _now.reason = name
    # One exception at most: a second one would hit the code that records the first.
    if not _now.raised and (_now.mode is _Mode.RAISING or (_now.mode is _Mode.ASKED and again)):
        _now.raised = True
        raise KeyboardInterrupt
    if not again:
        with suppress(RuntimeError):  # the signal came in the middle of another message
            _now.log_line(name)


def hold() -> None:
    """Handle the signals of this process from now on, and let those through that its parent has blocked."""
    if threading.current_thread() is threading.main_thread():
        for number in NAMES:
            signal.signal(number, _handle)
        _now.installed = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NAMES)


def ignore() -> None:
    """Ignore the signals until the process is gone; a handler would be replaced by death when Python shuts down."""
    if threading.current_thread() is threading.main_thread():
        for number in NAMES:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def whole_process() -> Iterator[None]:
    """For the first line of an entry point: inside, signals are remembered; after it, they are ignored."""
    hold()
    try:
        yield
    finally:
        ignore()


@contextmanager
def held() -> Iterator[None]:
    """Inside, no signal raises."""
    with _in_mode(_Mode.HELD):
        yield


@contextmanager
def asked(log_line: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first signal is only remembered, and `say` is told its name; the same one again interrupts."""
    before, _now.log_line = _now.log_line, log_line
    try:
        with _in_mode(_Mode.ASKED):
            yield
    finally:
        _now.log_line = before


@contextmanager
def raising() -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt at once, and so does one that came before."""
    with _in_mode(_Mode.RAISING):
        check()
        yield


@contextmanager
def _in_mode(mode: _Mode) -> Iterator[None]:
    """Handlers that were not installed for the whole process, as for a caller of the library, are installed inside."""
    main = threading.current_thread() is threading.main_thread()
    before: dict[signal.Signals, Any] = {}
    if main and not _now.installed:
        forget()
        before = {number: signal.getsignal(number) for number in NAMES}
        hold()
    outer, _now.mode = _now.mode, mode
    try:
        yield
    finally:
        _now.mode = outer
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _now.installed = False
            forget()


@contextmanager
def blocked(numbers: Sequence[signal.Signals] = tuple(NAMES)) -> Iterator[None]:
    """Inside, signals wait. A process started inside has them blocked until it calls `hold`: none of them is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_module(arguments: Sequence[str]) -> None:
    """What Python does with [-u] -m MODULE ARGUMENTS; signals wait until the module calls `hold`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)
    at = arguments.index("-m") + 1
    sys.argv[1:] = arguments[at + 1 :]
    try:
        runpy.run_module(arguments[at], run_name="__main__", alter_sys=True)
    finally:
        ignore()


if __name__ == "__main__":
    _run_module(sys.argv[1:])
