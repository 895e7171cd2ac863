"""SIGTERM, SIGINT and SIGUSR1, or the end of the launcher, as a flag that the training loop reads."""

from __future__ import annotations

import logging
import signal
from types import FrameType

from lumina_ds.train.orphans import Launchers

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

log = logging.getLogger(__name__)


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
