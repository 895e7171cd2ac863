"""Pairs of a question and an answer under two keys."""

from __future__ import annotations

from lumina_ds.data.formats.base import DataFormat, pair, prompt_and_answer

PROMPT_COMPLETION = DataFormat(
    "one user turn and one assistant turn, or two lists of messages",
    {"prompt": "Hello", "completion": "Hi, how are you?"},
    frozenset({"prompt", "completion"}),
    messages=lambda document: prompt_and_answer(document, "completion"),
)
INSTRUCTION_RESPONSE = DataFormat(
    "one user turn and one assistant turn",
    {"instruction": "Say hello.", "response": "Hi, how are you?"},
    frozenset({"instruction", "response"}),
    messages=pair("instruction", "response"),
)
