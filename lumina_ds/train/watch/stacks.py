"""Stacks of all threads of a rank, dumped by faulthandler, and the call in which each rank is.

faulthandler writes from C, so it works while a rank is blocked in a collective; SIGUSR2 from another process
makes it write even where no Python thread can run.
"""

from __future__ import annotations

import faulthandler
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

STACKS_SIGNAL = signal.SIGUSR2
_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
# Frames of a collective: torch's own functions, and DeepSpeed's waiting for one that it started before.
_COLLECTIVE_FILES = ("torch/distributed/", "deepspeed/comm/")
_WRAPPERS = {"wrapper", "wrapped_func", "log_wrapper", "inner", "wait"}
_DEPTH = 12


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """`collate (lumina_ds/data/loader.py:99)`, the path cut to its last three parts."""
        return f"{self.function} ({'/'.join(self.file.split('/')[-3:])}:{self.line})"


def open_stacks(logs: Path, rank: int) -> IO[str]:
    """The file that takes this rank's stacks, now also upon STACKS_SIGNAL."""
    file = open(stacks_path(logs, rank), "w", encoding="utf-8")
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)
    return file


def close_stacks(file: IO[str]) -> None:
    faulthandler.unregister(STACKS_SIGNAL)
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # one that comes late must not end the process
    file.close()


def stacks_path(logs: Path, rank: int) -> Path:
    return logs / f"stacks-rank-{rank}.txt"


def read_stacks(path: Path) -> dict[int, list[Frame]]:
    """The last dumped frames of every thread, innermost first, by thread id; empty when there are none."""
    threads: dict[int, list[Frame]] = {}
    current: list[Frame] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        if thread := _THREAD.match(line):
            current = threads[int(thread[1], 16)] = []
        elif frame := _FRAME.match(line):
            current.append(Frame(frame[1], int(frame[2]), frame[3]))
    return threads


def collective(frames: list[Frame]) -> str | None:
    """The collective in which these frames, innermost first, wait; None when in none."""
    name = None
    for frame in frames[:_DEPTH]:
        if _is_wait(frame.file, frame.function):
            if frame.function not in _WRAPPERS or name is None:
                name = frame.function
            if frame.function not in _WRAPPERS and "torch/distributed/" in frame.file:
                break
    return name


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a live thread is inside a collective: collective() for a frame of sys._current_frames()."""
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if _is_wait(frame.f_code.co_filename, frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False


def call_of(threads: dict[int, list[Frame]], main_thread: int, in_loader: bool) -> str | None:
    """In words, what the training thread does: `waits in all_to_all_single`, or `is in collate (...)`.

    While it waits for the loader, the loader's thread is the one that tells.
    """
    frames = threads.get(main_thread, [])
    if in_loader:
        frames = next((stack for stack in threads.values() if any(map(_runs_work, stack))), frames)
    waits_in = collective(frames)
    if waits_in is not None:
        return f"waits in {waits_in}"
    return f"is in {frames[0].place}" if frames else None


def _runs_work(frame: Frame) -> bool:
    """A frame of a thread of the Prefetcher's executor that has something to do; an idle one has only _worker."""
    return frame.function == "run" and frame.file.endswith("concurrent/futures/thread.py")


def _is_wait(file: str, function: str) -> bool:
    if any(part in file for part in _COLLECTIVE_FILES):
        return True
    return function == "wait" and "deepspeed/" in file
