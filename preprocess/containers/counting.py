"""The bytes of an input as they pass: counted and hashed, however many files they stand in."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from preprocess.containers.compression import read_fully


class _Parts:
    """Files read as if they were one."""

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self.files = files
        self._left = deque(files)

    def read(self, size: int) -> bytes:
        while self._left:
            if data := self._left[0].read(size):
                return data
            self._left.popleft()
        return b""


@contextmanager
def open_in_turn(paths: Sequence[Path]) -> Iterator[Any]:
    """A stream of all files of `paths`, one after the other: the file itself where there is one."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        yield files[0] if len(files) == 1 else _Parts(files)


class CountingStream:
    """A readable that counts and hashes the bytes that pass."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.at_end = False
        self.closed = False
        self._ahead = b""
        self._status = _status(file)
        self._begins_here = self._status is not None and file.tell() == 0
        self._is_read_again = False

    @property
    def is_seekable(self) -> bool:
        return self._begins_here

    def rewound(self) -> Any:
        """The file itself, to be read again from its beginning in any order."""
        self._is_read_again = True
        self._file.seek(0)
        return self._file

    def check_unchanged(self) -> None:
        """Raises EOFError where a file that is read again was written to meanwhile: its digest is that of other bytes."""
        if self._is_read_again and self._status != _status(self._file):
            raise EOFError("it was changed while it was read; run again")

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end alone; they are still to be read."""
        self._ahead += read_fully(self._file, size - len(self._ahead))
        return self._ahead[:size]

    def read(self, size: int = -1) -> bytes:
        if self._ahead and size >= 0:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data, self._ahead = self._ahead + self._file.read(size), b""
        self.num_bytes += len(data)
        self.digest.update(data)
        self.at_end = not data
        return data

    def close(self) -> None:
        self.closed = True


def _status(file: Any) -> tuple[int, int] | None:
    """(size, time of the last change) of an ordinary file; None of anything else."""
    try:
        status = os.fstat(file.fileno())
    except (AttributeError, io.UnsupportedOperation):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) and file.seekable() else None
