"""What a rank is doing, told to others by a small file: its step, the phase it is in, and at last how it ended.

The training thread only sets attributes; the watchdog's thread writes them into logs/heartbeat-rank-N.json about
once a second. Files, because they outlive the process and need no other rank to be alive: the report of a stall
and `lumina train`, when it looks for the cause of an end, read them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lumina_ds.errors import StalledError

# How torch.distributed, or our own agreement, reports in other ranks that one has gone.
_MOURNING = (
    "connection closed",
    "connection reset",
    "connection refused",
    "nccl",
    "broken pipe",
    "gloo",
    "another rank",
)


@dataclass(frozen=True)
class Beat:
    """One rank at one moment. `seconds` it has been in `phase`; `share_working` of its time it waits for nobody."""

    life: str
    rank: int
    pid: int
    host: str
    process_started: float
    main_thread: int
    step: int
    phase: str
    seconds: float
    count: int
    share_working: float | None = None
    end_code: int | None = None
    end_reason: str = ""

    @property
    def is_here(self) -> bool:
        """Whether the process is alive on this very host."""
        with contextlib.suppress(psutil.Error):
            return self.host == socket.gethostname() and self._process().is_running()
        return False

    @property
    def is_stopped(self) -> bool:
        """Whether its process was stopped (SIGSTOP, a debugger)."""
        with contextlib.suppress(psutil.Error):
            return self.is_here and self._process().status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return False

    def _process(self) -> psutil.Process:
        process = psutil.Process(self.pid)
        if abs(process.create_time() - self.process_started) > 1:
            raise psutil.NoSuchProcess(self.pid)
        return process


class Heartbeat:
    """This rank's own. enter() is for the training thread, write() for any other."""

    def __init__(self, logs: Path, rank: int, life: str) -> None:
        """`life` is common to all ranks of one start of the run, and tells its files from those of an earlier one."""
        self.path = beat_path(logs, rank)
        self.life = life
        self.rank = rank
        self.main_thread = threading.main_thread().ident or 0
        self._host = socket.gethostname()
        self._process_started = psutil.Process().create_time()
        self._state = (0, "start", time.monotonic())
        self._count = 0
        self.share_working: float | None = None

    def enter(self, phase: str, step: int) -> None:
        """From now on the rank is in `phase` of `step`."""
        self._state = (step, phase, time.monotonic())

    def restart_clock(self) -> None:
        """Count the time in the present phase from now on."""
        self._state = (*self._state[:2], time.monotonic())

    @property
    def step(self) -> int:
        return self._state[0]

    @property
    def phase(self) -> str:
        return self._state[1]

    @property
    def seconds_in_phase(self) -> float:
        return time.monotonic() - self._state[2]

    def write(self, end_code: int | None = None, end_reason: str = "") -> None:
        """Replace the file. A full disk costs the beat, not the run."""
        step, phase, since = self._state
        self._count += 1
        beat = Beat(
            self.life, self.rank, os.getpid(), self._host, self._process_started, self.main_thread,
            step, phase, time.monotonic() - since, self._count, self.share_working, end_code, end_reason,
        )  # fmt: skip
        temporary = self.path.with_suffix(f".{threading.get_ident()}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            os.replace(temporary, self.path)


def beat_path(logs: Path, rank: int) -> Path:
    return logs / f"heartbeat-rank-{rank}.json"


def read_beats(logs: Path, life: str | None = None) -> list[Beat]:
    """The last beat of every rank, by rank, of one life of the run if given; what cannot be read is left out."""
    return sorted((beat for beat in _all_beats(logs) if life in (None, beat.life)), key=lambda beat: beat.rank)


def _all_beats(logs: Path) -> Iterator[Beat]:
    for path in logs.glob("heartbeat-rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield Beat(**json.loads(path.read_text(encoding="utf-8")))


def cause_of_end(beats: list[Beat]) -> Beat | None:
    """The rank whose end explains the others': one that says why, before one that was killed, before its mourners.

    A killed rank has no end_code. None when no rank tells anything.
    """

    def order(beat: Beat) -> int:
        if beat.end_code is None:
            return 2
        if beat.end_code == StalledError.exit_code:
            return 0
        if tells_of_another_end(beat.end_reason) or beat.end_code == 75:
            return 3
        return 1 if beat.end_code == 1 else 0

    return min((beat for beat in beats if beat.end_code != 0), key=order, default=None)


def tells_of_another_end(message: str) -> bool:
    """Whether an error is only how this rank learned that another one has gone."""
    return any(sign in message.lower() for sign in _MOURNING)
