"""Plain text for continued pretraining: a document without turns, of which every token is a label."""

from __future__ import annotations

from lumina_ds.data.formats.base import DataFormat

# Beside a text these tell that the line is one message of something larger.
_OF_A_MESSAGE = frozenset({"role", "parent_id", "message_id", "replies"})

TEXT = DataFormat(
    "a document for continued pretraining; every token is a label, BOS before it and the end token after it",
    {"text": "Hi, how are you?"},
    frozenset({"text"}),
    is_like=lambda document: not _OF_A_MESSAGE & document.keys(),
    text="text",
)
