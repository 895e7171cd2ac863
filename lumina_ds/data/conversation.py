"""One JSONL line to one conversation: a strict schema, and a reason for every refusal.

First stage of the flow: conversation -> chat_template -> packing -> shards. A refused line raises
RejectedLine, which the pipeline counts and writes to `rejected.jsonl`; it never ends a run by itself.
Consecutive turns of one role are kept as they stand, because real chats have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lumina_ds.data.formats import as_messages
from lumina_ds.data.strict_json import RejectedLine, json_type, parse_object, shorten
from lumina_ds.data.turn_keys import (
    FLAGS,
    TOP_LEVEL_UNSUPPORTED,
    TURN_KEYS,
    UNSUPPORTED,
    check_flags_beside_turns,
    check_unsupported,
    read_flag,
)
from lumina_ds.data.turns import Conversation, Role, TrainTurns, Turn

NO_ASSISTANT_TURN = "no assistant turn"
NOTHING_TO_TRAIN = "no turn to train"

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
# Of each form: the keys of role and content, and the names of roles.
_FORMS: dict[str, tuple[str, str, dict[str, Role]]] = {
    "messages": ("role", "content", MESSAGE_ROLES),
    "conversations": ("from", "value", SHAREGPT_ROLES),
}
TOP_LEVEL_KEYS = FLAGS | TOP_LEVEL_UNSUPPORTED | _FORMS.keys() | {"system"}


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


def parse_conversation(line: bytes, train_turns: TrainTurns = "all") -> Conversation:
    """Parse one JSONL line of any kind in formats.py.

    A text beside them under `system` is the system turn. Contents are kept exactly as written. Keys of turn_keys.py
    are obeyed or refused; others are ignored and named. Raises RejectedLine, also where no turn is left to train.
    """
    document = as_messages(parse_object(line))
    key, turns = _read(document)
    system = len(turns) - len(document[key])
    flags = [None] * system + [
        read_flag(message, turn.role, number)
        for number, (message, turn) in enumerate(zip(document[key], turns[system:], strict=True), 1)
    ]
    return Conversation(turns, _trained(turns, flags, train_turns), tuple(_other_keys(document, key)))


def read_turns(document: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of a line's object, of whatever roles. Raises RejectedLine."""
    return _read(as_messages(document))[1]


def _read(document: dict[str, Any]) -> tuple[str, tuple[Turn, ...]]:
    """(key of the list of messages, turns)."""
    check_unsupported(document, document.keys() & TOP_LEVEL_UNSUPPORTED, "beside the turns")
    check_flags_beside_turns(document)
    present = [key for key in _FORMS if key in document]
    filled = [key for key in present if document[key] not in (None, [])]
    if len(filled) > 1:
        raise RejectedLine("two conversations", "both 'messages' and 'conversations' hold turns; keep one of them")
    if not present:
        raise RejectedLine(
            "missing key", "no key 'messages' or 'conversations'; lumina data formats shows what is read"
        )
    key = (filled or present)[0]
    return key, _with_system(document, _turns(document[key], key, *_FORMS[key]))


def _with_system(document: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    system = document.get("system")
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise RejectedLine("wrong type", f"'system' is a {json_type(system)}, not a string")
    if any(turn.role == "system" for turn in turns):
        raise RejectedLine(
            "two system prompts", "'system' stands beside the turns and a system turn among them; keep one"
        )
    return (Turn("system", system), *turns)


def _trained(turns: Sequence[Turn], flags: Sequence[bool | None], train_turns: TrainTurns) -> tuple[bool, ...]:
    assistants = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    if not assistants:
        raise RejectedLine(NO_ASSISTANT_TURN)
    if train_turns == "last":
        assistants = assistants[-1:]
    chosen = {
        number for number in assistants if (flags[number] if train_turns == "marked" else flags[number] is not False)
    }
    if not chosen:
        reasons = {
            "all": "flags switch every assistant turn off",
            "last": "a flag switches the last assistant turn off",
            "marked": "no flag marks an assistant turn, and --train-turns is marked",
        }
        raise RejectedLine(NOTHING_TO_TRAIN, reasons[train_turns])
    return tuple(number in chosen for number in range(len(turns)))


def _other_keys(document: dict[str, Any], key: str) -> Iterator[str]:
    """Names of the keys that mean nothing here, one per place where they stand."""
    yield from document.keys() - TOP_LEVEL_KEYS
    known = TURN_KEYS.union(_FORMS[key][:2])
    for message in document[key]:
        yield from message.keys() - known


def _turns(messages: Any, key: str, role_key: str, content_key: str, roles: dict[str, Role]) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise RejectedLine("wrong type", f"'{key}' is a {json_type(messages)}, not a list")
    if not messages:
        raise RejectedLine("empty conversation", f"'{key}' is empty")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RejectedLine("wrong type", f"message {number} is a {json_type(message)}, not an object")
        role = roles.get(_text(message, role_key, number))
        if role is None:
            raise RejectedLine("unknown role", f"message {number} has the unknown role {shorten(message[role_key])}")
        check_unsupported(message, message.keys() & UNSUPPORTED.keys(), f"of message {number}")
        turns.append(Turn(role, _text(message, content_key, number)))
    return tuple(turns)


def _text(message: dict[str, Any], key: str, number: int) -> str:
    if key not in message:
        raise RejectedLine("missing key", f"message {number} has no '{key}'")
    value = message[key]
    if not isinstance(value, str):
        raise RejectedLine("wrong type", f"'{key}' of message {number} is a {json_type(value)}, not a string")
    if not value:
        raise RejectedLine("empty content", f"'{key}' of message {number} is empty")
    return value
