"""The live training line on a terminal; plain lines in a log file or a pipe."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lumina_ds.logs import CONSOLE_LOGGER

log = logging.getLogger(CONSOLE_LOGGER)


def training_line(record: Mapping[str, Any], num_steps: int, strategy: str, workers: int) -> str:
    """epoch, step, loss, PPL, LR, gradient norm, tokens/s, memory, strategy, workers, in one line."""
    return (
        f"epoch {record['epoch']:.2f} | step {record['step']}/{num_steps} | loss {record['loss']:.4f} | "
        f"PPL {record['perplexity']:.2f} | LR {record['learning_rate']:.2e} | grad {record['grad_norm']:.3f} | "
        f"{record['tokens_per_second']:,.0f} tok/s | mem {record['memory_bytes'] / 2**30:.2f} GiB | "
        f"{strategy} | workers {workers}"
    )


class TrainingConsole:
    """Shows every record on stdout: a bar that stays in place on a terminal, else at most a line a second.

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
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=12),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=self.num_steps, completed=step)
            self._progress.start()

    def show(self, record: Mapping[str, Any]) -> None:
        line = training_line(record, self.num_steps, self.strategy, self.workers)
        log.info(line)
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=line)
            return
        now = time.monotonic()
        if now - self._last_line >= 1 or record["step"] in (1, self.last_step):
            self._last_line = now
            print(line, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        log.info(text)
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
