"""One JSONL line to one conversation: strict JSON, a strict schema, and a reason for every refusal.

First stage of the flow: conversation -> chat_template -> packing -> shards. A refused line raises
RejectedLine, which the pipeline counts and writes to `rejected.jsonl`; it never ends a run by itself.
Consecutive turns of one role are kept as they stand, because real chats have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant"]

# Far above any context; SentencePiece takes about 50 bytes per character, so this bounds a worker's memory.
MAX_LINE_BYTES = 16 << 20
MAX_DEPTH = 100
MAX_NUMBER_DIGITS = 4300

NO_ASSISTANT_TURN = "no assistant turn"
INVALID_JSON = "invalid JSON"
INVALID_UTF8 = "invalid UTF-8"
BYTE_ORDER_MARK = "byte order mark"
LINE_TOO_LONG = "line too long"
# Rules that a line breaks before it is JSON at all.
NOT_JSON_RULES = frozenset({INVALID_JSON, INVALID_UTF8, BYTE_ORDER_MARK, LINE_TOO_LONG})

MESSAGE_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
}
SHAREGPT_ROLES: dict[str, Role] = MESSAGE_ROLES | {"gpt": "assistant"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RejectedLine(Exception):
    """A line that is not a trainable conversation.

    `rule` names the rule it breaks, for counting; `reason` is one phrase about this very line.
    """

    def __init__(self, rule: str, reason: str | None = None) -> None:
        super().__init__(reason or rule)
        self.rule = rule
        self.reason = reason or rule


class Turn(NamedTuple):
    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]


def split_lines(block: bytes) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line without its end) of every line of `block`.

    Only b"\\n" ends a line: U+2028, U+0085 and VT, which str.splitlines() cuts at, are legal inside JSON.
    One b"\\r" before it is dropped, so CRLF files read as LF ones. Blank lines come out empty; see is_blank().
    """
    start = 0
    while start < len(block):
        end = block.find(b"\n", start)
        if end < 0:
            end = len(block)
        yield start, block[start : end - 1 if end > start and block[end - 1] == 0x0D else end]
        start = end + 1


def is_blank(line: bytes) -> bool:
    """Blank lines are no conversations: they are passed over, neither accepted nor rejected."""
    return not line.strip(b" \t\r")


def parse_conversation(line: bytes) -> Conversation:
    """Parse one JSONL line, `{"messages": [{"role", "content"}]}` or ShareGPT's `{"conversations": [{"from", "value"}]}`.

    Other keys are ignored. Contents are kept exactly as written. Raises RejectedLine.
    """
    turns = read_turns(parse_object(line))
    if all(turn.role != "assistant" for turn in turns):
        raise RejectedLine(NO_ASSISTANT_TURN)
    return Conversation(turns)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises RejectedLine, also for keys that stand twice and depth beyond MAX_DEPTH."""
    document = _parse_json(line)
    if not isinstance(document, dict):
        raise RejectedLine("not an object", f"a {_json_type(document)}, not an object")
    return document


def read_turns(document: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of a line's object, of whatever roles. Raises RejectedLine."""
    if "messages" in document:
        return _turns(document["messages"], "messages", "role", "content", MESSAGE_ROLES)
    if "conversations" in document:
        return _turns(document["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    raise RejectedLine("missing key", "no key 'messages' or 'conversations'")


def _turns(messages: Any, key: str, role_key: str, content_key: str, roles: dict[str, Role]) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise RejectedLine("wrong type", f"'{key}' is a {_json_type(messages)}, not a list")
    if not messages:
        raise RejectedLine("empty conversation", f"'{key}' is empty")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RejectedLine("wrong type", f"message {number} is a {_json_type(message)}, not an object")
        role = roles.get(_text(message, role_key, number))
        if role is None:
            raise RejectedLine("unknown role", f"message {number} has the unknown role {_shorten(message[role_key])}")
        turns.append(Turn(role, _text(message, content_key, number)))
    return tuple(turns)


def _text(message: dict[str, Any], key: str, number: int) -> str:
    if key not in message:
        raise RejectedLine("missing key", f"message {number} has no '{key}'")
    value = message[key]
    if not isinstance(value, str):
        raise RejectedLine("wrong type", f"'{key}' of message {number} is a {_json_type(value)}, not a string")
    if not value:
        raise RejectedLine("empty content", f"'{key}' of message {number} is empty")
    return value


def _parse_json(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise RejectedLine(LINE_TOO_LONG, f"longer than {MAX_LINE_BYTES} bytes")
    if line.startswith(b"\xef\xbb\xbf"):
        raise RejectedLine(BYTE_ORDER_MARK, "starts with a byte order mark")
    try:
        document = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise RejectedLine(INVALID_UTF8, "starts with the byte order mark of UTF-16; convert it to UTF-8") from None
        raise RejectedLine(INVALID_UTF8, f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise RejectedLine(INVALID_JSON, f"invalid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise RejectedLine("nested too deeply", f"nested deeper than {MAX_DEPTH}") from None
    # Both checks walk the whole document, so they run only where the bytes leave room for a fault.
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deeper(document, MAX_DEPTH):
        raise RejectedLine("nested too deeply", f"nested deeper than {MAX_DEPTH}")
    if (b"\\ud" in line or b"\\uD" in line) and _has_lone_surrogate(document):
        raise RejectedLine("lone surrogate", "a lone surrogate, which is no character")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RejectedLine("duplicate key", f"the key {_shorten(twice)} stands twice")
    return document


def _no_constant(name: str) -> Any:
    raise RejectedLine(INVALID_JSON, f"invalid JSON: {name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise RejectedLine("number out of range", f"a number of more than {MAX_NUMBER_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise RejectedLine("number out of range", f"the number {_shorten(digits)} is out of range")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite
)


def _is_deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit + 1):
        level = [value for value in level if isinstance(value, (dict, list))]
        if not level:
            return False
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return True


def _has_lone_surrogate(document: Any) -> bool:
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            if _LONE_SURROGATE.search(value):
                return True
        elif isinstance(value, dict):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names: dict[type, str] = {dict: "object", list: "list", str: "string"}
    return names.get(type(value), "number")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
