"""The live training line on a terminal; plain lines in a log file or a pipe."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lumina_ds.logs import CONSOLE_LOGGER

log = logging.getLogger(CONSOLE_LOGGER)


def training_line(record: Mapping[str, Any], num_steps: int, strategy: str, workers: int) -> str:
    """epoch, step, loss, PPL, LR, gradient norm, tokens/s, memory, strategy, workers, in one line."""
    place = [f"epoch {record['epoch']:.2f}", f"step {record['step']}/{num_steps}"]
    return " | ".join(place + _figures(record, strategy, workers))


def _figures(record: Mapping[str, Any], strategy: str, workers: int) -> list[str]:
    return [
        f"loss {record['loss']:.4f}",
        f"PPL {record['perplexity']:.2f}",
        f"LR {record['learning_rate']:.2e}",
        f"grad {record['grad_norm']:.3f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"mem {record['memory_bytes'] / 2**30:.2f} GiB",
        strategy,
        f"workers {workers}",
    ]


class TrainingConsole:
    """Shows every record on stdout: two lines that stay in place on a terminal, else at most a line a second.

    The first and the last step always get their line.
    """

    def __init__(self, num_steps: int, last_step: int, strategy: str, workers: int) -> None:
        """`last_step` is where this process ends, before `num_steps` when it is told to stop early."""
        self.num_steps = num_steps
        self.last_step = last_step
        self.strategy = strategy
        self.workers = workers
        self._last_line = 0.0
        self._console = Console(file=sys.stdout)
        self._progress: Progress | None = None

    def start(self, step: int) -> None:
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}  epoch {task.fields[epoch]:.2f} "),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("so far,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._task = self._progress.add_task("", total=self.last_step, completed=step, epoch=0.0)
        self._live = Live(self._progress, console=self._console, transient=True)
        self._live.start()

    def show(self, record: Mapping[str, Any]) -> None:
        line = training_line(record, self.num_steps, self.strategy, self.workers)
        log.info(line)
        if self._progress is not None:
            # Narrow enough for a terminal of 100 columns.
            figures = "  ".join(_figures(record, self.strategy, self.workers))
            self._progress.update(self._task, completed=record["step"], epoch=record["epoch"])
            self._live.update(Group(self._progress, Text(figures)))
        now = time.monotonic()
        # On a terminal the bar shows every step, and now and then a line stays behind it as the run's history.
        if now - self._last_line >= (20 if self._progress else 1) or record["step"] in (1, self.last_step):
            self._last_line = now
            self._print(line)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        log.info(text)
        self._print(text)

    def _print(self, text: str) -> None:
        # A closed terminal or pipe, or a full disk behind stdout, costs the line; the log file has it too.
        with contextlib.suppress(OSError):
            if self._progress is not None:
                self._console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._live.stop()
            self._progress = None
