"""The texts inside messages and tools, one by one: what a conversation brings, apart from what its template writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]

# Keys of a message whose texts the template must render; the rest are names and ids, of which templates use some.
_RENDERED = ("content", "reasoning_content", "thinking", "reasoning", "tool_calls")
REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})
_CALL_NAMES = frozenset({"id", "type"})


class Leaf(NamedTuple):
    """A text of message number `turn`, under its key."""

    turn: int
    key: str
    text: str


def leaves(messages: Sequence[Message]) -> list[Leaf]:
    """Texts that the template must render, message by message, in the order of reasoning, content, calls."""
    return [
        Leaf(turn, key, text)
        for turn, message in enumerate(messages)
        for key in _RENDERED
        for text in texts_of(message.get(key))
    ]


def texts_of(value: Any) -> Iterator[str]:
    """Every text in `value`, but for ids and types of calls and the keys of objects."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _CALL_NAMES:
                yield from texts_of(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_of(item)


def all_texts(value: Any) -> Iterator[str]:
    """Every text in `value`, keys included: whatever might spell a special token."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *all_texts(item))
    elif isinstance(value, Sequence):
        for item in value:
            yield from all_texts(item)


def replace_leaves(messages: Sequence[Message], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The messages with every text of leaves() changed, in the same order."""
    replaced = []
    for message in messages:
        copy = dict(message)
        for key in _RENDERED:
            if key in copy:
                copy[key] = _changed(copy[key], change, _CALL_NAMES)
        replaced.append(copy)
    return replaced


def replace_all(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text changed, keys of objects and the role of a message excepted."""
    return _changed(value, change, frozenset({"role"}))


def _changed(value: Any, change: Callable[[str], str], kept: frozenset[str]) -> Any:
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, Mapping):
        return {key: item if key in kept else _changed(item, change, kept) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_changed(item, change, kept) for item in value]
    return value
