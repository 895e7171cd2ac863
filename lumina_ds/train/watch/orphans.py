"""Whether the launcher that started this rank is still there.

SIGTERM to the `deepspeed` runner, or a SIGKILL to `lumina train`, ends that process alone: its ranks would train on with
nobody to tell them to stop. They notice it here, save, and end as after a signal. Only processes that are known to be
launchers count: the shell of a run under nohup may go.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

# `lumina train` gives it to all that it starts, so its own process stands above the runner.
START_MARK = "LUMINA_START"
# Set by DeepSpeed's launch module (deepspeed/launcher/launch.py) for every rank.
_LAUNCHED = "CROSS_RANK"


class Launchers:
    """The launchers above this process, as they were when it was made."""

    def __init__(self) -> None:
        self._above = _launchers_above()
        self._gone_before = not self._above and _LAUNCHED in os.environ

    def first_gone(self) -> str | None:
        """What has gone, for a message; None while every launcher is there."""
        if self._gone_before:
            return "its launcher"
        return next((name for process, name in self._above if not is_alive(process)), None)


def _launchers_above() -> list[tuple[psutil.Process, str]]:
    found: list[tuple[psutil.Process, str]] = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process().parent()
        while process is not None and _is_deepspeed(process.cmdline()):
            found.append((process, f"the deepspeed launcher (process {process.pid})"))
            process = process.parent()
        if found and process is not None and START_MARK in os.environ and process.pid != 1:
            found.append((process, f"lumina train (process {process.pid})"))
    return found


def _is_deepspeed(words: list[str]) -> bool:
    return any(word.startswith("deepspeed.launcher.") or Path(word).name == "deepspeed" for word in words[:4])


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; not so a zombie, which in many a container nobody collects."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
