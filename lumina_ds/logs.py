"""Logging set-up for command-line programs: rank 0 speaks, any rank may warn."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TextIO

# What the training console prints on stdout goes through this logger into the log file as well.
CONSOLE_LOGGER = "lumina_ds.console"


class _QuietUnlessFirst(logging.Filter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == CONSOLE_LOGGER:
            return False
        return self.rank == 0 or record.levelno >= logging.WARNING


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment: the live line puts itself there, and moves down for a warning."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _LogFile(logging.FileHandler):
    """A full disk costs the line, without a traceback on the terminal for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def tell(text: str) -> None:
    """A line on stderr. A terminal or pipe that is gone costs the line, never the save that comes with it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def configure_logging(rank: int = 0, log_file: Path | None = None, verbose: bool = False) -> None:
    """Send the package's records to stderr (rank 0, warnings from all) and all of them to `log_file`."""
    root = logging.getLogger("lumina_ds")
    root.handlers.clear()
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
    stream = _Stderr()
    stream.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    stream.addFilter(_QuietUnlessFirst(rank))
    root.addHandler(stream)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
