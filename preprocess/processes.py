"""A few processes of our own that encode blocks, each at the end of a pipe.

No executor of the standard library: before CPython 3.11.5 the shutdown of a ProcessPoolExecutor waits for ever for a
thread that still writes to a process that was killed. Here the parent holds one end of each pipe and the worker the
other, so the death of either is the end of the pipe to the other one, at once.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from threading import Lock
from types import TracebackType
from typing import Any

from lumina_ds.errors import MachineError

# One call that a process works on, and one that waits in its pipe, so that it need not wait for its parent.
_CALLS_PER_PROCESS = 2


class ProcessPool:
    """`count` spawned processes that run one function each call, in the order in which calls come.

    Leaving the `with` block kills the processes and returns, whatever they are doing. A call whose process was killed
    raises MachineError.
    """

    def __init__(self, count: int) -> None:
        # Spawned, not forked: a caller may already hold threads, which a forked child would find in odd states. A fork
        # server saves a few tenths of a second, but hides the workers' CPU time from whoever waits for this process.
        self._workers = [_Worker() for _ in range(count)]
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers * _CALLS_PER_PROCESS:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count * _CALLS_PER_PROCESS, "call-process")

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call `function` in the next free process; both and what it returns or raises must be picklable."""
        return self._threads.submit(self._call, function, *arguments)

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        # Only the end of its process frees a thread that waits for it.
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        worker = self._free.get()
        try:
            return worker.call(function, arguments)
        finally:
            self._free.put(worker)


class _Worker:
    """One process and this end of its pipe."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, its_end = context.Pipe()
        self._sending, self._receiving = Lock(), Lock()
        self._process: BaseProcess = context.Process(target=_serve, args=(its_end,), daemon=True)
        self._process.start()
        its_end.close()  # else the pipe would not end with the process

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Two threads may call at a time: the one that sends second waits for its turn to receive."""
        try:
            with self._sending:
                self._connection.send((function, arguments))
                self._receiving.acquire()
            try:
                result, error = self._connection.recv()
            finally:
                self._receiving.release()
        except (EOFError, OSError) as error:
            raise MachineError(
                "a preprocessing worker was killed, most likely for memory; use fewer --num-workers"
            ) from error
        if error is not None:
            raise error
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection) -> None:
    """A worker's life: answer calls until the parent is gone."""
    # Ctrl-C reaches the whole group; the parent ends its workers, so that only one of them reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            call = connection.recv_bytes()
            connection.send_bytes(_answer(call))
    except (EOFError, OSError):
        return


def _answer(call: bytes) -> bytes:
    """The pickled (result, error) of a pickled call. Only a process that is killed leaves a call without an answer."""
    try:
        function, arguments = pickle.loads(call)
        return bytes(ForkingPickler.dumps((function(*arguments), None)))
    except Exception as raised:
        error = raised
    except BaseException as raised:  # such as SystemExit, which would end the parent as if all were well
        error = RuntimeError(f"a preprocessing worker ended with {raised!r}")
    try:
        answer = bytes(ForkingPickler.dumps((None, error)))
        pickle.loads(answer)  # some errors can be pickled, but not made again
    except Exception:
        answer = pickle.dumps((None, RuntimeError(f"in a preprocessing worker: {type(error).__name__}: {error}")))
    return answer
