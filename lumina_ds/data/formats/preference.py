"""Preferences, as TRL writes them: the chosen side is trained, and it is said that the rejected one is not."""

from __future__ import annotations

from typing import Any

from lumina_ds.data.formats.base import DataFormat, prompt_and_answer
from lumina_ds.data.strict_json import RejectedLine

REJECTED_SIDES = "rejected sides of preferences: left out, the chosen one is trained"


def _messages(document: dict[str, Any]) -> list[Any]:
    """The prompt, unless the chosen messages begin with it, and the chosen side."""
    prompt, chosen = document.get("prompt"), document["chosen"]
    if not isinstance(chosen, list):
        if prompt in (None, "", []):
            raise RejectedLine(
                "preference without a prompt",
                "'chosen' is one text and there is no 'prompt'; give the prompt, or chosen and rejected as lists of messages",
            )
        return prompt_and_answer(document, "chosen")
    if prompt in (None, "", []):
        return chosen
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return chosen if _begin(chosen, asked) else [*asked, *chosen]


def _begin(messages: list[Any], first: list[Any]) -> bool:
    """Do `messages` begin with `first`, perhaps after a system turn?"""
    skipped = 1 if len(messages) > len(first) and _is_system(messages[0]) and not _is_system(first[0]) else 0
    return messages[skipped : skipped + len(first)] == first


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


PREFERENCE = DataFormat(
    "a chosen and a rejected answer to a prompt (TRL); the chosen side is trained",
    {"prompt": "Hello", "chosen": "Hi, how are you?", "rejected": "What?"},
    frozenset({"chosen", "rejected"}),
    frozenset({"prompt"}),
    _messages,
    notes=lambda document: [(REJECTED_SIDES, 1)],
)
