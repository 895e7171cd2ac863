"""A conversation in memory: turns with what belongs to them, definitions of tools, and which turns are trained.

Every format is read into these (formats/, conversation.py). Every chat template renders them: ours through
rendering.py, a model's own from to_messages().
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

# `text` is a whole document for continued pretraining, which stands alone and has no role markers.
Role = Literal["system", "user", "assistant", "tool", "text"]
# Which assistant turns are labels: all that no flag switches off, the last one, or those that a flag marks.
TrainTurns = Literal["all", "last", "marked"]
# What becomes of reasoning: a label, context without a label, or a label in the last exchange and left out before it.
TrainReasoning = Literal["yes", "no", "last"]

# What ends reasoning in a text: in most templates, and in ours.
THINK_END = "</think>"


def canonical_json(value: Any) -> str:
    """One JSON text for equal values, as `tojson` of a Hugging Face template writes it: keys keep their order."""
    return json.dumps(value, ensure_ascii=False)


class ToolCall(NamedTuple):
    """One call that an assistant makes. `arguments` is the canonical JSON text of an object; id is "" without one."""

    name: str
    arguments: str
    id: str = ""


class Turn(NamedTuple):
    """One turn; what it does not have is empty.

    reasoning: what the assistant thought before the content. tool_calls: calls after it. tool_call_id, name: on a
    `tool` turn, the call that the content is the result of, and its function.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns, which of them are labels (all of the assistant's where nothing is given), and keys that mean nothing here.

    tools: the definitions that the assistant may call, each as canonical JSON text. notes: what is said of such
    conversations, and how often it is true of this one.
    """

    turns: tuple[Turn, ...]
    trained: tuple[bool, ...] = ()
    other_keys: tuple[str, ...] = ()  # one per place where it stands
    tools: tuple[str, ...] = ()
    notes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.trained:
            object.__setattr__(self, "trained", tuple(turn.role in ("assistant", "text") for turn in self.turns))

    @property
    def is_text(self) -> bool:
        """Is it a document for continued pretraining, for which no chat template is asked?"""
        return self.turns[0].role == "text"


def to_messages(
    conversation: Conversation, *, arguments_as_text: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(messages, tools) of a chat as a Hugging Face chat template wants them; tools is None where there are none.

    A message has role and content, and where they are there reasoning_content, tool_calls, tool_call_id and name.
    Arguments of calls are objects; `arguments_as_text` gives JSON text, which some templates ask for.
    """
    assert not conversation.is_text
    messages = [_message(turn, arguments_as_text) for turn in conversation.turns]
    return messages, [json.loads(tool) for tool in conversation.tools] or None


def _message(turn: Turn, arguments_as_text: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [_call(call, arguments_as_text) for call in turn.tool_calls]
    for key in ("tool_call_id", "name"):
        if value := getattr(turn, key):
            message[key] = value
    return message


def _call(call: ToolCall, arguments_as_text: bool) -> dict[str, Any]:
    arguments = call.arguments if arguments_as_text else json.loads(call.arguments)
    entry = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **entry} if call.id else entry
