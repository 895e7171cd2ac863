"""What became of the lines of a run's data, as its preprocessing.json says: a section of the run's report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lumina_ds.report.page import escape

PREPROCESSING = "preprocessing.json"
_PARTS = {"train": "Training data", "eval": "Evaluation data"}
_NAMED_PARTS = {"sources": "Source", "eval_sets": "Evaluation set"}


def data_section(record: dict[str, Any]) -> str:
    """The summary of every shard folder that the run made; empty for a run on finished folders."""
    return "".join(_folder(title, each) for title, each in _folders(record))


def _folders(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((title, record[key]) for key, title in _PARTS.items() if key in record)
    for key, title in _NAMED_PARTS.items():
        named = record.get(key)
        if isinstance(named, dict):
            yield from ((f"{title} {name}", each) for name, each in named.items())


def _folder(title: str, record: Any) -> str:
    """One folder; earlier versions wrote no lines, and a damaged file may hold anything."""
    lines = record.get("summary") if isinstance(record, dict) else None
    if not isinstance(lines, list) or not lines:
        return ""
    items = "".join(f"<li>{escape(str(line).strip())}</li>" for line in lines)
    return f"<h3>{escape(title)}</h3><ul>{items}</ul>"
