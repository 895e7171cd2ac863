"""The live training line on a terminal; plain lines in a log file or a pipe."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from lumina_ds.logs import CONSOLE_LOGGER
from lumina_ds.monitor.records import METRICS, StepRecord
from lumina_ds.text import counted

log = logging.getLogger(CONSOLE_LOGGER)


def training_figures(record: StepRecord, num_steps: int, strategy: str, ranks: int) -> list[str]:
    """The figures of the metrics that have one, then the strategy and the ranks. The step is the second."""
    values = ((metric.figure, record.value(name)) for name, metric in METRICS.items())
    figures = [figure(value) for figure, value in values if figure is not None and value is not None]
    return [*figures[:1], f"step {record.step}/{num_steps}", *figures[1:], strategy, counted(ranks, "rank")]


def first_that_fit(figures: Sequence[str], width: int) -> str:
    """One line of at most `width` columns, without the last figures where it has no room for all of them."""
    return broken_between(figures, width).split("\n", 1)[0]


def broken_between(figures: Sequence[str], width: int) -> str:
    """All figures, in lines of at most `width` columns that end between two of them."""
    lines = [figures[0]]
    for figure in figures[1:]:
        if len(lines[-1]) + 2 + len(figure) <= width:
            lines[-1] += f"  {figure}"
        else:
            lines.append(figure)
    return "\n".join(lines)


class TrainingConsole:
    """Shows every record on stdout: a bar and figures that stay in place on a terminal, else at most a line a second.

    The first and the last step always get their line.
    """

    def __init__(self, num_steps: int, last_step: int, strategy: str, ranks: int) -> None:
        """`last_step` is where this process ends, before `num_steps` when it is told to stop early."""
        self.num_steps = num_steps
        self.last_step = last_step
        self.strategy = strategy
        self.ranks = ranks
        self._last_line = 0.0
        self._console = Console(file=sys.stdout)
        self._progress: Progress | None = None

    def start(self, step: int) -> None:
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            # As long as the terminal leaves room for.
            BarColumn(bar_width=None, table_column=Column(max_width=40)),
            TimeElapsedColumn(),
            TextColumn("so far,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._task = self._progress.add_task("", total=self.last_step, completed=step)
        self._live = Live(self._progress, console=self._console, transient=True)
        self._live.start()

    def show(self, record: StepRecord) -> None:
        figures = training_figures(record, self.num_steps, self.strategy, self.ranks)
        line = " | ".join(figures)
        log.info(line)
        if self._progress is not None:
            width = self._console.width
            # The bar has the step already.
            block = broken_between([figures[0], *figures[2:]], width)
            self._progress.update(self._task, completed=record.step)
            self._live.update(Group(self._progress, Text(block, no_wrap=True, overflow="crop")))
            line = first_that_fit(figures, width)
        now = time.monotonic()
        # On a terminal the bar shows every step, and now and then a line stays behind it as the run's history.
        if now - self._last_line >= (20 if self._progress else 1) or record.step in (1, self.last_step):
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
            with contextlib.suppress(OSError):
                self._live.stop()
            self._progress = None
