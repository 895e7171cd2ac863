"""Pairs of a question and an answer under two keys."""

from __future__ import annotations

from typing import Any

from lumina_ds.data.formats.base import DataFormat, exchange, prompt_and_answer
from lumina_ds.data.strict_json import RejectedLine, required_text


def _response(document: dict[str, Any]) -> list[Any]:
    """The instruction, with an input or a context below it, and the response."""
    below = {key: required_text(document, key) for key in ("input", "context") if document.get(key) not in (None, "")}
    if len(set(below.values())) > 1:
        raise RejectedLine("two inputs", "'input' and 'context' differ")
    asked = [required_text(document, "instruction"), *list(below.values())[:1]]
    return exchange("\n".join(asked), required_text(document, "response"))


PROMPT_COMPLETION = DataFormat(
    "one user turn and one assistant turn, or two lists of messages",
    {"prompt": "Hello", "completion": "Hi, how are you?"},
    frozenset({"prompt", "completion"}),
    messages=lambda document: prompt_and_answer(document, "completion"),
)
INSTRUCTION_RESPONSE = DataFormat(
    "one user turn, perhaps with an input or a context below the instruction, and one assistant turn",
    {"instruction": "Say hello.", "context": "To a friend.", "response": "Hi, how are you?"},
    frozenset({"instruction", "response"}),
    frozenset({"input", "context"}),
    _response,
)
