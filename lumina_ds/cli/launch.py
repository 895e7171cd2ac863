"""Run the deepspeed runner as a child, and pass signals to the ranks themselves.

The runner dies of SIGTERM at once and leaves its ranks behind; its launch module ends them one after the
other, 30 s apart. So the runner gets a session of its own, and the ranks get the signal directly: they agree
on it, save, and end.
"""

from __future__ import annotations

import signal
import subprocess
from types import FrameType

import psutil

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_until_done(command: list[str], environment: dict[str, str]) -> int:
    """Start `command` and wait; the exit status of the ranks as the runner reports it."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in rank_processes(process.pid):
            rank.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return process.wait() % 256
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def rank_processes(runner_pid: int) -> list[psutil.Process]:
    """Descendants of the runner that train, without its own launch processes in between."""
    try:
        descendants = psutil.Process(runner_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks = []
    for process in descendants:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "lumina_ds.cli.train" in words and "deepspeed.launcher.launch" not in words:
            ranks.append(process)
    return ranks
