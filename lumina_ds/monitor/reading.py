"""Reading the records of a run, finished or not: a crash may have cut a line short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import orjson

from lumina_ds.monitor.records import StepRecord

Record = TypeVar("Record")


def read_lines(path: Path, read: Callable[[Any], Record | None], bad: list[int]) -> Iterator[Record]:
    """What `read` makes of each line's JSON value; the numbers of lines that are no records are added to `bad`.

    Nothing where there is no such file. Raises OSError where it cannot be read.
    """
    try:
        stream = open(path, "rb")
    except FileNotFoundError:
        return
    with stream:
        for number, line in enumerate(stream, 1):
            try:
                record = read(orjson.loads(line))
            except orjson.JSONDecodeError:
                record = None
            if record is not None:
                yield record
            elif line.strip():
                bad.append(number)


def last_step(path: Path) -> int:
    """The newest step of a metrics.jsonl; 0 without any."""
    return max((record.step for record in read_lines(path, StepRecord.read, [])), default=0)
