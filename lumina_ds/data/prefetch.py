"""Batches made ahead of the training loop, so that it never waits for a disk.

A batch is a pure function of its step, so what was read ahead is no state: a run that stops, resumes or goes
back to an earlier step gets the batches that it would have made itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

STEPS_AHEAD = 2


class Prefetcher(Generic[T]):
    """Makes the batches of the next STEPS_AHEAD steps in a thread while a step trains.

    One thread, because gathering rows is several times faster than any model reads them: what it hides is the
    waiting for pages of a folder that is larger than memory. `make` runs in that thread, for one step at a time.
    """

    def __init__(self, make: Callable[[int], T], end: int) -> None:
        """`make(step)` gives a step's batch; nothing is made for step `end` or beyond before it is asked for."""
        self._make = make
        self._end = end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[tuple[int, Future[T]]] = deque()

    def take(self, step: int) -> T:
        """The batch of `step`; whatever `make` raised for it is raised here. A jump drops what was read ahead."""
        if not self._ahead or self._ahead[0][0] != step:
            self._drop()
            self._submit(step)
        _, batch = self._ahead.popleft()
        for following in range(step + 1 + len(self._ahead), min(step + 1 + STEPS_AHEAD, self._end)):
            self._submit(following)
        return batch.result()

    def close(self) -> None:
        """Drop what was read ahead and end the thread; waits for the batch it is making."""
        self._drop()
        self._thread.shutdown()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, step: int) -> None:
        self._ahead.append((step, self._thread.submit(self._make, step)))

    def _drop(self) -> None:
        for _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()
