"""SIGTERM, SIGINT and SIGUSR1, or the end of the launcher, as a flag that the training loop reads."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType

from lumina_ds.errors import Interrupted
from lumina_ds.train.orphans import Launchers

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ending_when_told(rank: int = 0) -> Iterator[None]:
    """Until somebody else handles them, SIGTERM and SIGUSR1 end this process with 75: there is nothing to save yet.

    Without it a rank that is still importing would die of SLURM's SIGUSR1, and its job would not be queued again.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if rank == 0:
            os.write(2, b"stopped by a signal before there was anything to save\n")
        os._exit(Interrupted.exit_code)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Set by a signal. Ranks agree on it before every step, and between micro-batches where steps are long."""

    def __init__(self) -> None:
        self.requested = False
        self._launchers = Launchers()
        self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}

    def stop_if_orphaned(self) -> None:
        """For the watchdog's thread: ask for a stop once a launcher above this rank is gone."""
        if not self.requested and (gone := self._launchers.first_gone()) is not None:
            log.warning("%s has gone, so this run saves and ends", gone)
            self.requested = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def restore(self) -> None:
        """Give the signals back their earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
