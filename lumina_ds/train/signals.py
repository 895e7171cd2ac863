"""SIGTERM, SIGINT and SIGUSR1 as a flag that the training loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Set by a signal. Ranks agree on it with the all-reduce that opens every step, so all stop at the same one."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def restore(self) -> None:
        """Give the signals back their earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
