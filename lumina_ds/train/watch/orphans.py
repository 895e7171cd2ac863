"""Ranks whose launcher has gone: they end at once where nothing is trained yet, and else save first.

SIGTERM to the `deepspeed` runner, or a SIGKILL to `lumina train`, ends that process alone: its ranks would train on with
nobody to tell them to stop. A thread of every rank, the first thing that it starts, looks twice a second. Only processes
that are known to be launchers count: the shell of a run under nohup may go. Nothing here imports more than Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lumina_ds.errors import Interrupted
from lumina_ds.logs import tell

# `lumina train` gives both to all that it starts: a mark of this start, and who it is itself.
START_MARK = "LUMINA_START"
STARTED_BY = "LUMINA_STARTED_BY"
# Set by DeepSpeed's launch module (deepspeed/launcher/launch.py) for every rank.
_LAUNCHED = "CROSS_RANK"
_LAUNCH_MODULE = "deepspeed.launcher.launch"
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launcher:
    """A process that started this one: `began` is in clock ticks since boot, and tells it from a later one of its number."""

    pid: int
    began: int
    name: str

    @property
    def is_there(self) -> bool:
        """Whether it runs; not so a zombie, which in many a container nobody collects."""
        return _stat(self.pid)[:2] == (self.began, True)


def start_variables(mark: str) -> dict[str, str]:
    """What a start gives its processes, so that each of them can be found, and knows whom it belongs to."""
    return {START_MARK: mark, STARTED_BY: f"{os.getpid()}:{_stat(os.getpid())[0]}"}


def launchers_above() -> list[Launcher]:
    """Whoever started this rank, the nearest first; one that has gone already is among them."""
    found: list[Launcher] = []
    pid = _parent(os.getpid())
    # Between a launcher and its rank there may be a script.
    while pid > 0 and not (found and _name(pid) is None):
        if (name := _name(pid)) is not None:
            found.append(Launcher(pid, _stat(pid)[0], name))
        pid = _parent(pid)
    if not found and _LAUNCHED in os.environ:
        found.append(Launcher(0, 0, "its launcher"))
    if found and pid > 1 and _LAUNCH_MODULE in _words(found[-1].pid):
        # No runner stands above: ssh started it for one on another host, and ends with the connection.
        found.append(Launcher(pid, _stat(pid)[0], "the connection to the host that started it"))
    if (starter := _starter()) is not None:
        found.append(starter)
    return found


def watch_launchers() -> None:
    """From now on, end this process with 75 when one of its launchers goes, or do what `saving_first` says. Called once,
    before anything slow is imported."""
    if above := launchers_above():
        threading.Thread(target=_watch, args=(above,), name="launchers", daemon=True).start()


@contextlib.contextmanager
def saving_first(stop: Callable[[str], None]) -> Iterator[None]:
    """Inside there is something to save: `stop` gets the name of the launcher that has gone, from another thread."""
    _reactions.append(stop)
    try:
        yield
    finally:
        _reactions.remove(stop)


def ending_with() -> Callable[[], None]:
    """For a child of this process, between fork and exec: the kernel kills it when this process ends (Linux alone can)."""
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def end() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it ended before it was asked for
            os._exit(Interrupted.exit_code)

    return end


def end_with_starter() -> None:
    """The same for this process, where `start_variables` names its parent, by SIGTERM: it may have to tell other hosts."""
    if (starter := _starter()) is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if not starter.is_there:
            os._exit(Interrupted.exit_code)


def _watch(above: list[Launcher]) -> None:
    while all(launcher.is_there for launcher in above):
        time.sleep(_POLL_SECONDS)
    _reactions[-1](next(launcher.name for launcher in above if not launcher.is_there))


def _end_at_once(gone: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tell(f"{gone} has gone before there was anything to save, so this run ends")
    os._exit(Interrupted.exit_code)


def _starter() -> Launcher | None:
    pid, _, began = os.environ.get(STARTED_BY, "").partition(":")
    numbers = pid.isdecimal() and began.isdecimal()
    return Launcher(int(pid), int(began), f"lumina train (process {pid})") if numbers else None


_reactions: list[Callable[[str], None]] = [_end_at_once]


def _name(pid: int) -> str | None:
    """What it is for a message, if it is a launcher."""
    words = _words(pid)
    if any(word.startswith("deepspeed.launcher.") or Path(word).name in _DEEPSPEED for word in words):
        return f"the deepspeed launcher (process {pid})"
    if any(Path(word).name == "torchrun" or word == "torch.distributed.run" for word in words):
        return f"torchrun (process {pid})"
    return None


# Its console script, and the module by which `lumina train` calls the same program (ranks/deepspeed_runner.py).
_DEEPSPEED = ("deepspeed", "lumina_ds.ranks.deepspeed_runner")


def _words(pid: int) -> list[str]:
    """The first words of its command: later ones may be anybody's."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:6]
    return []


def _parent(pid: int) -> int:
    return _stat(pid)[2]


def _stat(pid: int) -> tuple[int, bool, int]:
    """(when it began, whether it runs, its parent), from /proc/PID/stat; zeros when there is no such process."""
    with contextlib.suppress(OSError):
        # The name in parentheses may hold blanks and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19]), fields[0] not in ("Z", "X"), int(fields[1])
    return 0, False, 0
