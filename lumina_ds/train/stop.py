"""Signals that ask for the end, a file that does, or the end of a launcher, as a flag that the training loop reads."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from lumina_ds.errors import Interrupted

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)


def heeded(numbers: Iterable[signal.Signals] = HANDLED) -> list[signal.Signals]:
    """Without those that this process was started to ignore: nohup does so with SIGHUP, a shell's `&` with SIGINT."""
    return [n for n in numbers if n not in _MAY_BE_IGNORED or signal.getsignal(n) is not signal.SIG_IGN]


@contextlib.contextmanager
def ending_when_told(rank: int = 0) -> Iterator[None]:
    """Until somebody else handles them, all but Ctrl-C end this process with 75: there is nothing to save yet.

    Without it a rank that is still importing would die of SLURM's SIGUSR1, and its job would not be queued again.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if rank == 0:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                os.write(2, b"stopped by a signal before there was anything to save\n")
        os._exit(Interrupted.exit_code)

    told = heeded((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    previous = {number: signal.signal(number, end) for number in told}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Set by a signal. Ranks agree on it before every step, and between micro-batches where steps are long."""

    def __init__(self, file: Path | None = None) -> None:
        """`file` asks as a signal does once it is there; it reaches ranks of other hosts, and needs one rank to see it."""
        self._file = file
        self._since: float | None = None
        # Python calls a handler only when the main thread next runs Python, perhaps at the end of a backward pass or
        # of a collective; the number is in this pipe at once.
        self._arrived, self._written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_pipe = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in heeded()}

    @property
    def requested(self) -> bool:
        return self._since is not None

    @property
    def waiting_seconds(self) -> float:
        """For how long a stop has been asked for; 0 when it has not."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def notice(self) -> None:
        """For the watchdog's thread: see signals that the main thread has not come to."""
        with contextlib.suppress(BlockingIOError):
            if set(os.read(self._arrived, 4096)) & set(self._previous):
                self._ask()
        if not self.requested and self._file is not None and self._file.exists():
            self._ask()

    def launcher_gone(self, launcher: str) -> None:
        """For the thread that watches launchers (train/watch/orphans.py)."""
        log.warning("%s has gone, so this run saves and ends", launcher)
        self._ask()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._ask()

    def _ask(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def restore(self) -> None:
        """Give the signals back their earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        for descriptor in (self._arrived, self._written):
            os.close(descriptor)


def resumable_message(step: int, num_steps: int) -> str:
    """What a stopped run says at its end, before the first step and later."""
    saved = "the checkpoint is saved, start the same command again to go on" if step else "nothing was trained yet"
    return f"stopped by a signal at step {step} of {num_steps}; {saved}"


def nothing_left_message(step: int, stop_at_step: int | None) -> str:
    """Why a run that was started again trains nothing; `stop_at_step` where that is the reason."""
    if stop_at_step is None:
        return "nothing is left to train; raise --max-steps or --epochs to go on"
    return f"step {step} is trained already, and --stop-at-step is {stop_at_step}; raise it, or leave it out, to go on"


def ended_message(step: int, num_steps: int, stop_at_step: int | None) -> str:
    """What a run says at its end; `stop_at_step` where it ends before the whole run does."""
    going_on = "" if stop_at_step is None else "; start again without --stop-at-step to go on"
    return f"ended at step {step} of {num_steps}{going_on}"
