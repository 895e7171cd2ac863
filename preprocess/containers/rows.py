"""Rows of tables as lines of JSON, so that all that holds for a line of JSONL holds for a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lumina_ds.data.strict_json import UNREADABLE_ROW
from preprocess.containers.compression import Decompressed


class RowStream:
    """Row N of a table is line N of this stream.

    lines: whole lines, some at a time. `source`: the stream that they come from. `share`: how much of the table is
    read, where that is known apart from the bytes read of it.
    """

    def __init__(self, lines: Iterator[bytes], source: Any) -> None:
        self._lines = lines
        self._source = source
        self._pending = memoryview(b"")

    @property
    def is_bomb(self) -> bool:
        return isinstance(self._source, Decompressed) and self._source.is_bomb

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises EOFError or OSError where the table is damaged."""
        while not self._pending:
            lines = next(self._lines, None)
            if lines is None:
                return b""
            self._pending = memoryview(lines)
        data, self._pending = self._pending[:size], self._pending[size:]
        return bytes(data)


def unreadable(reason: str) -> bytes:
    """The line that stands for a row which cannot be read; its reader refuses it for `reason`."""
    return UNREADABLE_ROW + " ".join(reason.split()).encode("utf-8", "backslashreplace") + b"\n"
