"""A conversation as pieces of text under the templates of config/chat_templates.py: tools, calls, results and reasoning.

    tools  (before everything)  one definition per line, JSON           <|system|><|system|> ... <|end|>
    assistant                   <think>\\n reasoning \\n</think>\\n\\n   content   <tool_call>\\n JSON \\n</tool_call>
    tool                        the result, verbatim                    <|system|><|user|> ... <|end|>
    text                        a document for continued pretraining    ... <|end|>

Definitions and results have headers of two role tokens. No text becomes a special token, so no user or system prompt can
write what looks like either. Reasoning and calls are marked by tags within the assistant's own turn, which nobody else
writes. A conversation without any of these is its turns, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lumina_ds.config.chat_templates import ROLE_MARKERS
from lumina_ds.data.tools import results_in_order
from lumina_ds.data.turns import THINK_END, Conversation, ToolCall, TrainReasoning, Turn, canonical_json

# Where roles of pieces are numbers, these are their meanings; those of plain turns stand first.
RENDERED_ROLES = (*ROLE_MARKERS, "tool", "tools", "text")
_THINK_BEGIN, _THINK_END = "<think>\n", f"\n{THINK_END}\n\n"
_CALL_BEGIN, _CALL_END = "<tool_call>\n", "\n</tool_call>"


class Piece(NamedTuple):
    """One content between special tokens. is_trained: label tokens, but for the first `context_bytes` of its UTF-8."""

    role: str
    text: str
    is_trained: bool
    context_bytes: int = 0


def render(conversation: Conversation, train_reasoning: TrainReasoning = "yes", is_prompt: bool = False) -> list[Piece]:
    """The pieces that templates put their special tokens around; `is_prompt`: an assistant's reply is to follow."""
    if is_plain(conversation):
        both = zip(conversation.turns, conversation.trained, strict=True)
        return [Piece(turn.role, turn.content, bool(on)) for turn, on in both]
    turns = kept_turns(conversation.turns, train_reasoning, is_prompt)
    pieces = [Piece("tools", "\n".join(conversation.tools), False)] if conversation.tools else []
    # Only results change places, and none of them is trained.
    for turn, on in zip(results_in_order(turns), conversation.trained, strict=True):
        reasoning = f"{_THINK_BEGIN}{turn.reasoning}{_THINK_END}" if turn.reasoning else ""
        is_context = bool(on) and train_reasoning == "no"
        text = reasoning + turn.content
        calls = "\n".join(map(_call, turn.tool_calls))
        text += f"\n{calls}" if calls and turn.content else calls
        pieces.append(Piece(turn.role, text, bool(on), len(reasoning.encode()) if is_context else 0))
    return pieces


def is_plain(conversation: Conversation) -> bool:
    """Are there only system, user and assistant turns with a content and nothing else?"""
    return not conversation.tools and all(
        turn.role in ROLE_MARKERS and not turn.reasoning and not turn.tool_calls for turn in conversation.turns
    )


def kept_turns(turns: Sequence[Turn], train_reasoning: TrainReasoning, is_prompt: bool = False) -> Sequence[Turn]:
    """The turns without the reasoning that --train-reasoning last leaves out."""
    if train_reasoning != "last":
        return turns
    first = first_with_reasoning(turns, is_prompt)
    return [turn._replace(reasoning="") if number < first else turn for number, turn in enumerate(turns)]


def read_reply(text: str) -> Turn:
    """An assistant's turn from the text that a model wrote: reasoning at its beginning is taken from the content."""
    if text.startswith(_THINK_BEGIN) and _THINK_END in text:
        reasoning, _, content = text.removeprefix(_THINK_BEGIN).partition(_THINK_END)
        if reasoning and THINK_END not in reasoning:
            return Turn("assistant", content, reasoning)
    return Turn("assistant", text)


def first_with_reasoning(turns: Sequence[Turn], is_prompt: bool = False) -> int:
    """Where the last exchange begins: after the last user turn that an assistant turn follows, or is to follow."""
    end = len(turns)
    if not is_prompt:
        end = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    return max((number for number, turn in enumerate(turns[:end]) if turn.role == "user"), default=-1) + 1


def _call(call: ToolCall) -> str:
    text = f'{{"name": {canonical_json(call.name)}, "arguments": {call.arguments}}}'
    # Within JSON a slash may be escaped: so no argument can end the call.
    return _CALL_BEGIN + text.replace("</tool_call>", "<\\/tool_call>") + _CALL_END
