"""Metrics on disk: one JSON object per line, and the same scalars as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumina_ds.files import write_atomically
from lumina_ds.monitor.trackers import Tracker, scalars_of

# One place to add a metric: give it to the record in train/loop.py; name it here to have it in the CSV too.
CSV_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "load_balancing_loss",
    "router_z_loss",
    "tokens",
    "tokens_per_second",
    "data_seconds",
    "memory_bytes",
    "skipped",
    "anomaly_score",
    "host_memory_available_bytes",
    "disk_free_bytes",
)


class MetricsWriter:
    """Appends records to metrics.jsonl, metrics.csv and evaluations.jsonl; floats keep all their digits (repr)."""

    def __init__(self, folder: Path, resumed_step: int, trackers: Sequence[Tracker] = ()) -> None:
        """`resumed_step`: records of later steps, from a life that a checkpoint does not hold, are taken out.

        `trackers` get every record too.
        """
        self._trackers = trackers
        self._jsonl = folder / "metrics.jsonl"
        self._csv = folder / "metrics.csv"
        self._evaluations = folder / "evaluations.jsonl"
        self.go_back(resumed_step)

    def go_back(self, step: int) -> None:
        """Take out what was recorded after `step`, which the run does anew."""
        kept = _keep_until(self._jsonl, step)
        with open(self._csv, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerow(CSV_COLUMNS)
        for record in kept:
            self._append_csv(record)
        # A fresh start measures step 0 anew.
        _keep_until(self._evaluations, step or -1)

    def write_evaluation(self, record: dict[str, Any]) -> None:
        append_record(self._evaluations, record)
        self._track(record, "eval")

    def write(self, record: dict[str, Any]) -> None:
        append_record(self._jsonl, record)
        self._append_csv(record)
        self._track(record, "train")

    def close(self) -> None:
        """Finish what the trackers hold back."""
        for tracker in self._trackers:
            tracker.close()

    def _track(self, record: dict[str, Any], group: str) -> None:
        for tracker in self._trackers:
            tracker.log(scalars_of(record, group), record["step"])

    def _append_csv(self, record: dict[str, Any]) -> None:
        with open(self._csv, "a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerow([record.get(column) for column in CSV_COLUMNS])


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a file of records without those after `step`, and return the ones that stay."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line of strict JSON; non-finite numbers become null, which every reader takes."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(finite, allow_nan=False) + "\n")


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
