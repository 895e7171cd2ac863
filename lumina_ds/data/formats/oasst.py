"""OpenAssistant's message trees: the best path from the prompt down is the conversation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lumina_ds.data.formats.base import DataFormat
from lumina_ds.data.strict_json import RejectedLine, a_type
from lumina_ds.foreign_files import shorten

OFF_THE_PATH = "messages of trees off the best path: left out"
_ROLES = ("prompter", "user", "human", "assistant")


def _messages(document: dict[str, Any]) -> list[Any]:
    return [{"role": node["role"], "content": node["text"]} for node in _best_path(document["prompt"])]


def _notes(document: dict[str, Any]) -> Iterable[tuple[str, int]]:
    left_out = _size(document["prompt"]) - len(_best_path(document["prompt"]))
    return [(OFF_THE_PATH, left_out)] if left_out else []


def _best_path(root: dict[str, Any]) -> list[dict[str, Any]]:
    """The best reply of each message, down to the last one of the assistant."""
    path, node = [_checked(root, 1)], root
    while replies := [reply for reply in _replies(node, len(path)) if _is_kept(reply)]:
        node = min(replies, key=_order)
        path.append(_checked(node, len(path) + 1))
    while path and path[-1]["role"] != "assistant":
        path.pop()
    if not path:
        raise RejectedLine("no assistant turn", "no assistant's reply stands on the best path of the tree")
    return path


def _order(node: dict[str, Any]) -> tuple[bool, float, bool, float]:
    """Replies are best first: by rank, where 0 is the best, else by the higher score or quality, else as they stand."""
    rank, score = _number(node.get("rank")), _number(node.get("score"))
    if score is None:
        labels = node.get("labels")
        quality = labels.get("quality") if isinstance(labels, dict) else None
        score = _number(quality.get("value")) if isinstance(quality, dict) else None
    return rank is None, rank or 0, score is None, -(score or 0)


def _number(value: Any) -> float | None:
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else value


def _is_kept(node: Any) -> bool:
    """Not one that the reviewers deleted or turned down."""
    return not (isinstance(node, dict) and (node.get("deleted") is True or node.get("review_result") is False))


def _checked(node: Any, depth: int) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise RejectedLine("wrong type", f"a message at depth {depth} of the tree is {a_type(node)}, not an object")
    for key in ("role", "text"):
        if not isinstance(node.get(key), str):
            raise RejectedLine("wrong type", f"a message at depth {depth} of the tree has no string under '{key}'")
    if node["role"] not in _ROLES:
        raise RejectedLine(
            "unknown role", f"a message at depth {depth} of the tree has the unknown role {shorten(node['role'])}"
        )
    return node


def _replies(node: dict[str, Any], depth: int) -> list[Any]:
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise RejectedLine("wrong type", f"'replies' at depth {depth} of the tree is {a_type(replies)}, not a list")
    for reply in replies:
        if not isinstance(reply, dict):
            _checked(reply, depth + 1)
    return replies


def _size(node: dict[str, Any]) -> int:
    """Messages of the whole tree."""
    pending, count = [node], 0
    while pending:
        each = pending.pop()
        count += 1
        if isinstance(each, dict) and isinstance(each.get("replies"), list):
            pending += each["replies"]
    return count


OASST = DataFormat(
    "OpenAssistant's message tree; the path of the best replies, by rank or score, is trained",
    {
        "prompt": {
            "role": "prompter",
            "text": "Hello",
            "replies": [
                {"role": "assistant", "text": "What?", "rank": 1},
                {"role": "assistant", "text": "Hi, how are you?", "rank": 0},
            ],
        }
    },
    frozenset({"prompt"}),
    frozenset({"message_tree_id", "tree_state", "origin"}),
    _messages,
    is_like=lambda document: isinstance(document["prompt"], dict),
    notes=_notes,
)
