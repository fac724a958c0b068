"""Send a signal to this process at a named moment. Python imports this file at its start when it is on PYTHONPATH.

benchmarks/kills.py puts it there, for `python run.py` and every process that it starts. The environment says what to
do:

KILLS_MOMENT: JSON with `kind`, `where`, `number`, `delay_seconds`. The moment is the `number`-th time in a process that
    kind "import": the module `where` is imported.
    kind "open": a file whose path matches the regular expression `where` is opened to be written.
    kind "rename": a file or folder gets a name that matches `where`.
    kind "call": the function `where`, written FILE.py:FUNCTION, is called in the main thread.
    kind "exit": the interpreter ends; `where` is empty.
KILLS_SIGNAL: the number of the signal, which is sent `delay_seconds` later.
KILLS_GROUP: "1" sends it to the whole process group.
KILLS_MARK: a file that is made when the signal is sent and holds the process id. The first process that makes it sends
    the signal; all others leave it.
"""

import atexit
import json
import os
import re
import sys
import threading
from types import FrameType
from typing import Any


def _send() -> None:
    try:
        descriptor = os.open(os.environ["KILLS_MARK"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)
    os.kill(0 if os.environ["KILLS_GROUP"] == "1" else os.getpid(), int(os.environ["KILLS_SIGNAL"]))


def _install(kind: str, where: str, number: int, delay_seconds: float) -> None:
    seen = 0

    def happened() -> None:
        nonlocal seen
        seen += 1
        if seen != number:
            return
        if delay_seconds:
            timer = threading.Timer(delay_seconds, _send)
            timer.daemon = True
            timer.start()
        else:
            _send()

    def is_written(path: Any, mode: Any, flags: Any) -> bool:
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and isinstance(path, str) and re.search(where, path) is not None

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == kind == "import":
            if arguments[0] == where:
                happened()
        elif (event == kind == "open" and is_written(*arguments)) or (
            event == "os.rename" and kind == "rename" and re.search(where, os.fspath(arguments[1]))
        ):
            happened()

    def profiled(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == function and code.co_filename.endswith(file):
            happened()

    if kind == "exit":
        atexit.register(happened)  # registered first, so called last
    elif kind == "call":
        name, _, function = where.partition(":")
        file = os.sep + name
        sys.setprofile(profiled)
    else:
        sys.addaudithook(audited)


if "KILLS_MOMENT" in os.environ:  # the folder may stay on PYTHONPATH when nothing is asked for
    _install(**json.loads(os.environ["KILLS_MOMENT"]))
