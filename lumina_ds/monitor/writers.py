"""Metrics on disk: one JSON object per line, and the same scalars as CSV.

A full disk costs no run: records wait in memory until there is room again.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumina_ds.files import write_atomically
from lumina_ds.monitor.records import METRICS, EvaluationRecord, StepRecord, step_of
from lumina_ds.monitor.trackers import Tracker, scalars_of
from lumina_ds.text import counted

logger = logging.getLogger(__name__)

# What a life writes of its steps.
RECORDS = ("metrics.jsonl", "metrics.csv", "evaluations.jsonl", "passed_over.jsonl")
# Some 100 MB of records; older ones are dropped, and that is said.
_MOST_WAITING = 100_000


class MetricsWriter:
    """Appends records to metrics.jsonl, metrics.csv and evaluations.jsonl; floats keep all their digits (repr)."""

    def __init__(self, folder: Path, resumed_step: int, trackers: Sequence[Tracker] = ()) -> None:
        """`resumed_step`: records of later steps, from a life that a checkpoint does not hold, are taken out.

        `trackers` get every record too.
        """
        self._trackers = list(trackers)
        self._columns = csv_columns()
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        self._evaluations = folder / "evaluations.jsonl"
        self._waiting: deque[tuple[Path, str]] = deque(maxlen=_MOST_WAITING)
        self._told = False
        self.go_back(resumed_step)

    def go_back(self, step: int) -> None:
        """Take out what was recorded after `step`, which the run does anew."""
        kept = _keep_until(self._jsonl, step)
        self._waiting.clear()
        rows: list[Sequence[Any]] = [
            self._columns,
            *([record.get(column) for column in self._columns] for record in kept),
        ]
        write_atomically(self._csv, "".join(map(_csv_row, rows)))
        # A fresh start measures step 0 anew.
        _keep_until(self._evaluations, step or -1)

    def write_evaluation(self, record: EvaluationRecord) -> None:
        self._append(self._evaluations, _line(record.values()))
        self._track(record)

    def write(self, record: StepRecord) -> None:
        values = record.values()
        self._append(self._jsonl, _line(values))
        self._append(self._csv, _csv_row([values.get(column) for column in self._columns]))
        self._track(record)

    def close(self) -> None:
        """Write and finish what is held back."""
        self._write_waiting()
        if self._waiting:
            logger.error("lost, for they could not be written: %s of metrics", counted(len(self._waiting), "line"))
        for tracker in self._trackers:
            tracker.close()

    def _track(self, record: StepRecord | EvaluationRecord) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(scalars_of(record), record.step)
            except OSError as error:
                logger.warning("%s takes no more metrics: %s", type(tracker).__name__, error.strerror or error)
                self._trackers.remove(tracker)

    def _append(self, path: Path, line: str) -> None:
        if len(self._waiting) == _MOST_WAITING:
            logger.error("a line of metrics is lost: too many wait for room on the disk")
        self._waiting.append((path, line))
        self._write_waiting()

    def _write_waiting(self) -> None:
        """In their order; the first that cannot be written keeps all later ones waiting."""
        while self._waiting:
            try:
                _append_whole(*self._waiting[0])
            except OSError as error:
                if not self._told:
                    logger.error(
                        "%s cannot be written: %s; training goes on, and the metrics are written once that is over",
                        *(self._waiting[0][0], error.strerror),
                    )
                self._told = True
                return
            self._waiting.popleft()
            self._told = False


def set_records_aside(folder: Path) -> tuple[int, list[str]]:
    """Rename what an earlier life recorded, metrics.jsonl to metrics.1.jsonl, all with the first number that is free.

    Returns the last step recorded and the new names; none where nothing was recorded.
    """
    found = [path for name in RECORDS if (path := folder / name).exists()]
    steps = [step_of(record) for path in found if path.suffix == ".jsonl" for record in read_records(path)]
    if not steps:
        return 0, []
    number = 1
    while any((folder / _numbered(name, number)).exists() for name in RECORDS):
        number += 1
    names = [_numbered(path.name, number) for path in found]
    for path, name in zip(found, names, strict=True):
        path.rename(folder / name)
    return max(step or 0 for step in steps), names


def _numbered(name: str, number: int) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.{number}.{suffix}"


def csv_columns() -> list[str]:
    """The metrics that metrics.csv has too."""
    return [name for name, metric in METRICS.items() if metric.in_csv]


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a file of records without those after `step`, and return the ones that stay."""
    kept = [record for record in read_records(path) if (at := step_of(record)) is not None and at <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line of strict JSON; non-finite numbers become null, which every reader takes."""
    _append_whole(path, _line(record))


def _append_whole(path: Path, line: str) -> None:
    """Append `line`, or nothing: a part that a full disk took is cut off again."""
    with open(path, "ab", buffering=0) as stream:
        size = stream.tell()
        content = line.encode("utf-8")
        try:
            written = stream.write(content)
            if written != len(content):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            stream.truncate(size)
            raise


def _line(record: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _csv_row(values: Sequence[Any]) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerow(values)
    return stream.getvalue()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file; a line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
