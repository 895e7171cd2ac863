"""One message of a list of turns to a Turn, strictly: with OpenAI's keys, or with ShareGPT's.

Contents are kept exactly as written. What a message says beside its content is read here or refused by rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lumina_ds.data.strict_json import RejectedLine, a_type, required_text
from lumina_ds.data.tools import read_call_text, read_calls
from lumina_ds.data.turn_keys import (
    EMPTY,
    KNOWN_KEYS,
    PART_KEYS,
    REASONING_KEYS,
    REFUSED_AT_A_TURN,
    check_inside,
    check_unsupported,
)
from lumina_ds.data.turns import THINK_END, Role, ToolCall, Turn
from lumina_ds.foreign_files import shorten
from lumina_ds.text import with_article

# Roles of the turns that a line without tools has; the compiled scanner reads these and no others.
MESSAGE_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
}
SHAREGPT_ROLES: dict[str, Role] = MESSAGE_ROLES | {"gpt": "assistant"}
_RESULTS: dict[str, Role] = {"tool": "tool", "function": "tool"}
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


@dataclass(frozen=True)
class Form:
    """Keys of role and content, and the names of roles; `calls` names roles whose content is the JSON of tool calls."""

    role_key: str
    content_key: str
    roles: dict[str, Role]
    calls: frozenset[str] = frozenset()
    keys: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", frozenset({self.role_key, self.content_key}))


OPENAI = Form("role", "content", MESSAGE_ROLES | _RESULTS)
SHAREGPT = Form(
    "from", "value", SHAREGPT_ROLES | _RESULTS | {"observation": "tool"}, frozenset({"function_call", "tool_call"})
)
# Of each list of turns, the form that its messages have unless their keys are the other's.
FORMS = {"messages": OPENAI, "conversations": SHAREGPT}


def form_of(messages: Any, key: str) -> Form:
    """The form of the messages under `key`: the first one's keys tell where they are not the usual ones there."""
    usual = FORMS[key]
    other = SHAREGPT if usual is OPENAI else OPENAI
    first = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}
    return other if usual.role_key not in first and other.role_key in first else usual


def read_message(message: Any, number: int, form: Form) -> Turn:
    """Message `number`, counted from 1, as a turn. Raises RejectedLine."""
    if not isinstance(message, dict):
        raise RejectedLine("wrong type", f"message {number} is {a_type(message)}, not an object")
    role = _role(message, number, form)
    _check_other_form(message, role, number, form)
    check_unsupported(message, REFUSED_AT_A_TURN, f"of message {number}")
    _check_channel(message, number)
    reasoning = _reasoning(message, role, number)
    calls = _calls(message, role, number, form)
    tool_call_id = _of_a_result(message, "tool_call_id", role, number)
    name = _of_a_result(message, "name", role, number)
    if message[form.role_key] in form.calls:
        return Turn(role, "", reasoning, calls)
    may_be_empty = bool(calls) or role == "tool"
    return Turn(role, _content(message, form.content_key, number, may_be_empty), reasoning, calls, tool_call_id, name)


def _check_channel(message: dict[str, Any], number: int) -> None:
    """Refuse what gpt-oss says in another channel than the answer's: reasoning and calls have keys here."""
    channel = message.get("channel")
    if channel not in EMPTY and channel != "final":
        raise RejectedLine(
            "unsupported channel", f"'channel' of message {number} is not final: {KNOWN_KEYS['channel'].meaning}"
        )


def _role(message: dict[str, Any], number: int, form: Form) -> Role:
    written = required_text(message, form.role_key, f"message {number}")
    if written in form.calls:
        return "assistant"
    role = form.roles.get(written)
    if role is None:
        raise RejectedLine("unknown role", f"message {number} has the unknown role {shorten(written)}")
    return role


def _check_other_form(message: dict[str, Any], role: Role, number: int, form: Form) -> None:
    """Refuse a message that says two things, one with OpenAI's keys and one with ShareGPT's."""
    other = SHAREGPT if form is OPENAI else OPENAI
    written, text = message.get(other.role_key), message.get(other.content_key)
    if isinstance(written, str) and other.roles.get(written, role) != role:
        raise RejectedLine(
            "two roles", f"message {number} has '{form.role_key}' and '{other.role_key}', which differ; keep one"
        )
    if isinstance(text, str) and text and text != message.get(form.content_key):
        raise RejectedLine(
            "two contents",
            f"message {number} has '{form.content_key}' and '{other.content_key}', which differ; keep one",
        )


def _reasoning(message: dict[str, Any], role: Role, number: int) -> str:
    found = {key: message[key] for key in REASONING_KEYS if message.get(key) not in EMPTY}
    if not found:
        return ""
    key, value = next(iter(found.items()))
    if role != "assistant":
        raise RejectedLine(
            "reasoning on another role",
            f"'{key}' of message {number}, {with_article(role)} turn; only assistants reason",
        )
    for each, text in found.items():
        if not isinstance(text, str):
            raise RejectedLine("wrong type", f"'{each}' of message {number} is {a_type(text)}, not a string")
    if len(set(found.values())) > 1:
        shown = " and ".join(f"'{each}'" for each in found)
        raise RejectedLine("two reasonings", f"message {number} has {shown}, which differ; keep one")
    if THINK_END in value:
        raise RejectedLine(
            "end of reasoning inside it",
            f"'{key}' of message {number} holds {THINK_END}, which would end it; remove it",
        )
    return str(value)


def _calls(message: dict[str, Any], role: Role, number: int, form: Form) -> tuple[ToolCall, ...]:
    found = [key for key in ("tool_calls", "function_call") if message.get(key) not in EMPTY]
    if message[form.role_key] in form.calls:
        if found:
            raise RejectedLine(
                "two lists of calls",
                f"message {number} is {with_article(message[form.role_key])} and has '{found[0]}'; keep one",
            )
        return read_call_text(required_text(message, form.content_key, f"message {number}"), number)
    if found and role != "assistant":
        raise RejectedLine(
            "tool call on another role",
            f"'{found[0]}' of message {number}, {with_article(role)} turn; only assistants call tools",
        )
    if len(found) > 1:
        raise RejectedLine("two lists of calls", f"message {number} has 'tool_calls' and 'function_call'; keep one")
    return read_calls(message[found[0]], found[0], number) if found else ()


def _of_a_result(message: dict[str, Any], key: str, role: Role, number: int) -> str:
    value = message.get(key)
    if value in EMPTY:
        return ""
    if role != "tool":
        raise RejectedLine(
            f"unsupported {key}",
            f"'{key}' of message {number}, {with_article(role)} turn: only results of tools have one",
        )
    if not isinstance(value, str):
        raise RejectedLine("wrong type", f"'{key}' of message {number} is {a_type(value)}, not a string")
    return value


def _content(message: dict[str, Any], key: str, number: int, may_be_empty: bool) -> str:
    if may_be_empty and message.get(key) in (None, "", []):
        return ""
    if isinstance(message.get(key), list):
        return _joined(message[key], key, number, may_be_empty)
    return required_text(message, key, f"message {number}")


def _joined(parts: list[Any], key: str, number: int, may_be_empty: bool) -> str:
    """The text of content parts, one after the other with nothing between."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            shown = shorten(kind) if isinstance(kind, str) else a_type(part)
            raise RejectedLine(
                "unsupported content part",
                f"'{key}' of message {number} holds {shown}; only parts of type text are trained",
            )
        if not isinstance(part.get("text"), str):
            raise RejectedLine("wrong type", f"a text part of message {number} has no string under 'text'")
        check_inside(part, PART_KEYS, "part", f"a part of message {number}")
        texts.append(part["text"])
    if not any(texts) and not may_be_empty:
        raise RejectedLine("empty content", f"'{key}' of message {number} is empty")
    return "".join(texts)
