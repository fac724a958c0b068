"""Encode text in this process or in other processes. `python -m relora.data.workers` is one of those."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from relora.data.decoding import Unfinished
from relora.data.tokenizer import load_tokenizer

TEXT_BEFORE_WORKERS = 8 << 20
"""So many characters are encoded before other processes are started. Less text takes less time than their start."""
BATCHES_PER_WORKER = 3
"""Batches that wait for each worker. More only cost memory."""

Ids = NDArray[np.uint32]


class Batch(Protocol):
    """Pieces that are encoded together."""

    @property
    def texts(self) -> list[str]:
        """The texts to encode."""
        ...


B = TypeVar("B", bound=Batch)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Return the token ids of each text, without special tokens."""
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(each.ids, dtype=np.uint32) for each in encoded]


class _Worker:
    """A process that encodes batches. It ends when this process ends, also after a SIGKILL: its input is closed."""

    def __init__(self, tokenizer_file: Path) -> None:
        command = [sys.executable, "-m", "relora.data.workers", str(tokenizer_file)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        # In a session of its own, Ctrl-C does not reach it. The process that started it decides.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )

    def encode(self, texts: list[str]) -> list[Ids]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(texts, self._process.stdin, protocol=5)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise Unfinished(
                "a process that encodes text has ended (the machine may be out of memory); start again with fewer "
                "--workers: the preparation continues from its last state"
            ) from error

    def kill(self) -> None:
        """End the process. A thread that waits for its result gets an Unfinished."""
        self._process.kill()

    def close(self) -> None:
        """Release the pipes, after all threads have left."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # of bytes that were not sent
                pipe.close()


class Encoder(Generic[B]):
    """Encodes batches in order, in parallel."""

    def __init__(self, tokenizer_file: Path, given: str | None, workers: int) -> None:
        """Load the tokenizer.

        Args:
            tokenizer_file: The tokenizer.json.
            given: data.tokenizer, for messages.
            workers: The number of processes. With 1, this process encodes.
        """
        self._file, self._workers = tokenizer_file, workers
        self._tokenizer = load_tokenizer(tokenizer_file, given)

    def encoded(self, batches: Iterator[B]) -> Iterator[tuple[B, list[Ids]]]:
        """Yield each batch with the token ids of its texts, in the order of the batches.

        Raises:
            Unfinished: A worker has ended.
        """
        characters = 0
        for batch in batches:
            yield batch, encode(self._tokenizer, batch.texts)
            characters += sum(map(len, batch.texts))
            if self._workers > 1 and characters >= TEXT_BEFORE_WORKERS:
                break
        yield from self._encoded_by_workers(batches)

    def _encoded_by_workers(self, batches: Iterator[B]) -> Iterator[tuple[B, list[Ids]]]:
        first = next(batches, None)
        if first is None:
            return
        workers: list[_Worker] = []
        idle: SimpleQueue[_Worker] = SimpleQueue()

        def task(texts: list[str]) -> list[Ids]:
            worker = idle.get()
            try:
                return worker.encode(texts)
            finally:
                idle.put(worker)

        waiting: deque[tuple[B, Future[list[Ids]]]] = deque()
        with ExitStack() as closing, ThreadPoolExecutor(self._workers) as threads:
            try:
                for _ in range(self._workers):
                    workers.append(_Worker(self._file))
                    closing.callback(workers[-1].close)
                    idle.put(workers[-1])
                waiting.append((first, threads.submit(task, first.texts)))
                for batch in batches:
                    waiting.append((batch, threads.submit(task, batch.texts)))
                    if len(waiting) >= BATCHES_PER_WORKER * self._workers:
                        done, future = waiting.popleft()
                        yield done, future.result()
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.kill()


def _main(tokenizer_file: str) -> None:
    tokenizer = load_tokenizer(Path(tokenizer_file), tokenizer_file)
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
            pickle.dump(encode(tokenizer, texts), sys.stdout.buffer, protocol=5)
            sys.stdout.buffer.flush()
        except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # the other process has ended
            os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1])
