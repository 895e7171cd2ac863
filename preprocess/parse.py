"""The quick way from a line to its turns, for the lines that make up nearly all of a corpus.

orjson reads a line several times faster than the strict parser of lumina_ds.data.conversation, and is as strict
about syntax, encoding, surrogates and numbers; it keeps the last of two equal keys, though. So the quick way
accepts a line only after counting its keys, and leaves everything else, every refusal included, to the strict
parser: both accept the same lines with the same turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from lumina_ds.data.conversation import _MESSAGE_ROLES as MESSAGE_ROLES
from lumina_ds.data.conversation import _SHAREGPT_ROLES as SHAREGPT_ROLES
from lumina_ds.data.conversation import MAX_LINE_BYTES, Role, parse_conversation

Turns = Sequence[tuple[Role, str]]

# A document nested deeper than this beside its messages is the strict parser's, which knows the real limit.
_QUICK_DEPTH = 50
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')


def parse_line(line: bytes) -> Turns:
    """(role, content) of every turn of one JSONL line. Raises RejectedLine as parse_conversation() does."""
    return _quick_turns(line) or parse_conversation(line).turns


def _quick_turns(line: bytes) -> Turns | None:
    """The turns of a line that is certainly good; None where the strict parser must look."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    try:
        if "messages" in document:
            key, role_key, content_key, roles = "messages", "role", "content", MESSAGE_ROLES
        else:
            key, role_key, content_key, roles = "conversations", "from", "value", SHAREGPT_ROLES
        messages = document[key]
        turns = [(roles[message[role_key]], message[content_key]) for message in messages]
        num_keys = _count_keys(document, messages)
    except (KeyError, TypeError, RecursionError):
        return None
    for _, content in turns:
        if type(content) is not str or not content:
            return None
    if all(role != "assistant" for role, _ in turns) or num_keys != _count_colons(line, num_keys):
        return None
    return turns


def _count_keys(document: dict[str, Any], messages: list[dict[str, Any]]) -> int:
    """Keys of all objects of the document. Raises RecursionError when it is nested deeply."""
    if len(document) == 1 and all(len(message) == 2 for message in messages):
        return 1 + 2 * len(messages)
    return _count_keys_of_any(document, _QUICK_DEPTH)


def _count_keys_of_any(value: Any, depth: int) -> int:
    if not depth:
        raise RecursionError
    if isinstance(value, dict):
        return len(value) + sum(_count_keys_of_any(child, depth - 1) for child in value.values())
    if isinstance(value, list):
        return sum(_count_keys_of_any(child, depth - 1) for child in value)
    return 0


def _count_colons(line: bytes, num_keys: int) -> int:
    """Colons outside strings, which is the number of keys written. `num_keys`: how many of them are different.

    A key's colon follows its quote or white space, so the cheap count is never too low; where it finds just
    `num_keys`, no text added to it and no key stands twice.
    """
    most = line.count(b'":') + line.count(b" :") + line.count(b"\t:") + line.count(b"\r:")
    return most if most == num_keys else _STRING.sub(b"", line).count(b":")
