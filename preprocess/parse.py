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

from lumina_ds.data.conversation import MAX_LINE_BYTES, MESSAGE_ROLES, SHAREGPT_ROLES, Role, parse_conversation

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
        num_keys = 1 + 2 * len(turns)
        if len(document) > 1 or sum(map(len, messages)) > 2 * len(turns):
            has_equal_keys = _key_colons(line) != _count_keys(document, _QUICK_DEPTH)
        else:
            num_in_texts = sum([content.count(":") for _, content in turns])
            has_equal_keys = _may_have_more_keys(line, num_keys, num_in_texts) and _key_colons(line) != num_keys
    except (AttributeError, KeyError, TypeError, RecursionError):
        return None
    for _, content in turns:
        if type(content) is not str or not content:
            return None
    if has_equal_keys or all(role != "assistant" for role, _ in turns):
        return None
    return turns


def _may_have_more_keys(line: bytes, num_keys: int, num_in_texts: int) -> bool:
    """False where the colons of the line are just those of `num_keys` different keys and of the texts.

    The texts' colons were counted after parsing, so an escaped one would stand for a key's.
    """
    return line.count(b":") != num_keys + num_in_texts or (num_in_texts > 0 and b"\\u003" in line)


def _key_colons(line: bytes) -> int:
    """Colons outside strings, which is the number of keys written in a line of valid JSON."""
    return _STRING.sub(b"", line).count(b":")


def _count_keys(value: Any, depth: int) -> int:
    """Keys of all objects within `value`. Raises RecursionError when it is nested deeply."""
    if not depth:
        raise RecursionError
    if isinstance(value, dict):
        return len(value) + sum(_count_keys(child, depth - 1) for child in value.values())
    if isinstance(value, list):
        return sum(_count_keys(child, depth - 1) for child in value)
    return 0
