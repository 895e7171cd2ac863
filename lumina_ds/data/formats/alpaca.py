"""Alpaca: an instruction, perhaps with an input below it, a system text and earlier exchanges, and the output."""

from __future__ import annotations

from typing import Any

from lumina_ds.data.formats.base import DataFormat, exchange
from lumina_ds.data.strict_json import RejectedLine, a_type, required_text


def _messages(document: dict[str, Any]) -> list[Any]:
    asked = [required_text(document, key) for key in ("instruction", "input") if document.get(key) not in (None, "")]
    if not asked:
        raise RejectedLine("empty content", "'instruction' and 'input' are empty")
    return [*_history(document), *exchange("\n".join(asked), required_text(document, "output"))]


def _history(document: dict[str, Any]) -> list[Any]:
    """Earlier exchanges, as pairs of question and answer."""
    pairs = document.get("history") or []
    if not isinstance(pairs, list):
        raise RejectedLine("wrong type", f"'history' is {a_type(pairs)}, not a list")
    for number, each in enumerate(pairs, 1):
        if not (isinstance(each, list) and len(each) == 2 and all(isinstance(text, str) for text in each)):
            raise RejectedLine("wrong type", f"entry {number} of 'history' is no pair of question and answer")
    return [message for each in pairs for message in exchange(*each)]


ALPACA = DataFormat(
    "an instruction, perhaps with an input below it, a system text and earlier exchanges, and the output",
    {"instruction": "Answer the greeting.", "input": "Hello", "output": "Hi, how are you?", "history": []},
    frozenset({"instruction", "output"}),
    frozenset({"input", "history"}),
    _messages,
)
