"""Handling of stop signals from the first line of a process to its end: Ctrl-C, SIGTERM and SLURM's SIGUSR2.

An exception in the middle of an import, of torch's code or of a file write can do damage. So the handler only
remembers the signal, and the work checks for it where it can stop safely. This module imports nothing heavy, because
every entry point calls `handled_signals` before its other imports. `python -m relora.common.signals -m MODULE ...`
starts a module that calls `hold` only after its imports. Signals are blocked until then.
"""

import gc
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
    """The signal that requested this process to stop; None if there was no signal."""
    return _now.reason


def interrupted() -> bool:
    """Whether a KeyboardInterrupt was raised for a signal, even if a library turned it into another error."""
    return _now.raised


def check() -> None:
    """Raise KeyboardInterrupt if a stop was requested."""
    if _now.reason is not None:
        _now.raised = True
        raise KeyboardInterrupt


def forget() -> None:
    """Forget the signal that came. The next signal counts as the first."""
    _now.reason, _now.raised = None, False


def _handle(number: int, frame: FrameType | None) -> None:
    name = NAMES[signal.Signals(number)]
    # SIGTERM after SLURM's warning means that no time is left. The reason is still the warning.
    is_the_end = _now.reason == "SIGUSR2" and number == signal.SIGTERM
    # SLURM may repeat SIGUSR2 at any time.
    again = is_the_end or (_now.reason == name and number != signal.SIGUSR2)
    if not again:
        _now.reason = name
    # Raise at most one exception. A second one would interrupt the code that records the first.
    if not _now.raised and (_now.mode is _Mode.RAISING or (_now.mode is _Mode.ASKED and again)):
        _now.raised = True
        raise KeyboardInterrupt
    if not again:
        with suppress(RuntimeError):  # the signal came while another message was printed
            _now.log_line(name)


def hold() -> None:
    """Install the handlers in this process, and unblock the signals that its parent has blocked."""
    if threading.current_thread() is threading.main_thread():
        for number in NAMES:
            signal.signal(number, _handle)
        _now.installed = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NAMES)


def ignore() -> None:
    """Ignore the signals until the process ends. At shutdown Python removes handlers, and a signal would kill it."""
    if threading.current_thread() is threading.main_thread():
        for number in NAMES:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def handled_signals() -> Iterator[None]:
    """Remember signals inside the block, and ignore them after it. Use it in the first line of an entry point."""
    hold()
    try:
        yield
    finally:
        ignore()


@contextmanager
def held() -> Iterator[None]:
    """Remember signals inside the block, without an exception."""
    with _in_mode(_Mode.HELD):
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Hold signals and garbage collection while the body imports large packages.

    An interrupted import can fail with any error, or abort the process. Imports make many objects and almost no
    garbage, and each collection looks at all of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with held():
            yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def asked(log_line: Callable[[str], None]) -> Iterator[None]:
    """Remember the first signal inside the block, and raise KeyboardInterrupt when the same signal comes again.

    `log_line` is called with the name of the first signal.
    """
    before, _now.log_line = _now.log_line, log_line
    try:
        with _in_mode(_Mode.ASKED):
            yield
    finally:
        _now.log_line = before


@contextmanager
def raising() -> Iterator[None]:
    """Raise KeyboardInterrupt at once for a signal inside the block, and for a signal that came before it."""
    with _in_mode(_Mode.RAISING):
        check()
        yield


@contextmanager
def _in_mode(mode: _Mode) -> Iterator[None]:
    """Set the mode inside the block. Also install the handlers if the process, such as a library caller's, has none."""
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
    """Block signals inside the block; they arrive after it.

    A child process that is started inside has them blocked until it calls `hold`. So no signal is lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_module(arguments: Sequence[str]) -> None:
    """Run a module as Python does for [-u] -m MODULE ARGUMENTS. Signals are blocked until the module calls `hold`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)
    at = arguments.index("-m") + 1
    sys.argv[1:] = arguments[at + 1 :]
    try:
        runpy.run_module(arguments[at], run_name="__main__", alter_sys=True)
    finally:
        ignore()


if __name__ == "__main__":
    _run_module(sys.argv[1:])
