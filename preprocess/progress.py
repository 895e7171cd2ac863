"""Progress of the offline stage on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from lumina_ds.text import format_bytes

LINE_EVERY_SECONDS = 10.0


class Progress(Protocol):
    def update(self, bytes_read: int, num_tokens: int) -> None:
        """Report the totals so far: bytes taken from the inputs, tokens encoded."""


@contextmanager
def show_progress(total_bytes: int | None) -> Iterator[Progress]:
    """A display for this terminal or log; `total_bytes` None when standard input hides the end."""
    if not sys.stderr.isatty():
        yield _Lines(total_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("preprocess"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        yield _Bar(display, total_bytes)


class _Lines:
    def __init__(self, total_bytes: int | None) -> None:
        self._total_bytes = total_bytes
        self._started = self._last = time.monotonic()

    def update(self, bytes_read: int, num_tokens: int) -> None:
        now = time.monotonic()
        if now - self._last < LINE_EVERY_SECONDS:
            return
        self._last = now
        seconds = now - self._started
        line = f"preprocess: {format_bytes(bytes_read)}"
        if self._total_bytes and bytes_read:
            left = seconds * (self._total_bytes - bytes_read) / bytes_read
            line += f" of {format_bytes(self._total_bytes)}, {left:.0f} s left"
        print(f"{line}, {format_bytes(bytes_read / seconds)}/s, {num_tokens / seconds:,.0f} tokens/s", file=sys.stderr)


class _Bar:
    def __init__(self, display: object, total_bytes: int | None) -> None:
        from rich.progress import Progress as RichProgress

        assert isinstance(display, RichProgress)
        self._display = display
        self._task = display.add_task("preprocess", total=total_bytes, tokens="")
        self._started = time.monotonic()

    def update(self, bytes_read: int, num_tokens: int) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        speed = f"{format_bytes(bytes_read / seconds)}/s {num_tokens / seconds:,.0f} tokens/s"
        self._display.update(self._task, completed=bytes_read, tokens=speed)
