"""One JSONL line to one conversation: a strict schema, and a reason for every refusal.

First stage of the flow: conversation -> chat_template -> packing -> shards. A refused line raises
RejectedLine, which the pipeline counts and writes to `rejected.jsonl`; it never ends a run by itself.
Consecutive turns of one role are kept as they stand, because real chats have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lumina_ds.data.formats import DataFormat, as_messages, format_of
from lumina_ds.data.formats.preference import REJECTED_SIDES
from lumina_ds.data.messages import FORMS, MESSAGE_ROLES, SHAREGPT_ROLES, Form, form_of, read_message
from lumina_ds.data.rendering import first_with_reasoning
from lumina_ds.data.strict_json import RejectedLine, a_type, parse_object, required_text
from lumina_ds.data.tools import read_tools, results_in_order
from lumina_ds.data.turn_keys import (
    CALL_KEYS,
    DEFINITION_KEYS,
    EMPTY,
    FLAGS,
    HARMLESS_KEYS,
    JUDGEMENTS,
    KNOWN_KEYS,
    PART_KEYS,
    REFUSED_BESIDE,
    REJECTED_KEYS,
    SYSTEM_KEYS,
    TOP_LEVEL_KEYS,
    TURN_KEYS,
    check_flags_beside_turns,
    check_judgement,
    check_unsupported,
    read_flag,
)
from lumina_ds.data.turns import Conversation, Role, ToolCall, TrainReasoning, TrainTurns, Turn

__all__ = [
    "MESSAGE_ROLES", "SHAREGPT_ROLES", "Conversation", "Role", "ToolCall", "TrainReasoning", "TrainTurns", "Turn",
    "is_blank", "parse_conversation", "read_chat", "split_lines",
]  # fmt: skip

NO_ASSISTANT_TURN = "no assistant turn"
NOTHING_TO_TRAIN = "no turn to train"
TEXTS = "documents of plain text: every token is a label"
EARLIER_REASONING = "turns whose reasoning is left out and that are no labels, by --train-reasoning last"

# What may stand beside the turns and is no name without a meaning.
_OF_A_CALL = {"id", "type", "function", "name", "arguments", "index"}
KEYS_BESIDE = TOP_LEVEL_KEYS | FORMS.keys() | HARMLESS_KEYS


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


def parse_conversation(
    line: bytes,
    train_turns: TrainTurns = "all",
    train_reasoning: TrainReasoning = "yes",
    format_name: str | None = None,
) -> Conversation:
    """Parse one JSONL line of any kind in formats/, or of the one that is named.

    A text beside the turns under `system` is the system turn. Contents are kept exactly as written. Keys of turn_keys.py
    are obeyed or refused; others are ignored and named. Raises RejectedLine, also where no turn is left to train.
    """
    document = parse_object(line)
    form = format_of(document, format_name)
    if form is not None and form.text is not None:
        return _document(document, form, train_turns)
    read = as_messages(document, form)
    key, turns, tools = _read(read)
    system = len(turns) - len(read[key])
    flags = [None] * system + [
        read_flag(message, turn.role, number)
        for number, (message, turn) in enumerate(zip(read[key], turns[system:], strict=True), 1)
    ]
    trained, notes = _trained(turns, flags, train_turns, train_reasoning)
    notes += tuple(form.notes(document)) if form is not None and form.notes else ()
    if any(read.get(key) for key in REJECTED_KEYS):
        notes += ((REJECTED_SIDES, 1),)
    return Conversation(turns, trained, tuple(_other_keys(document, form, read, key)), tools, notes)


def read_chat(document: dict[str, Any]) -> Conversation:
    """The turns and tools of a line's object, of whatever roles, to be continued. Raises RejectedLine."""
    form = format_of(document)
    if form is not None and form.text is not None:
        raise RejectedLine("plain text", "a document of plain text asks nothing")
    _, turns, tools = _read(as_messages(document, form))
    return Conversation(turns, tools=tools)


def _document(document: dict[str, Any], form: DataFormat, train_turns: TrainTurns) -> Conversation:
    """A text for continued pretraining; what belongs to chats is refused beside it."""
    assert form.text is not None
    check_unsupported(document, REFUSED_BESIDE, "beside a text")
    for key in sorted(({*DEFINITION_KEYS, *SYSTEM_KEYS}) & document.keys()):
        if document[key]:
            raise RejectedLine(f"unsupported {key}", f"'{key}' beside a text, which has no turns")
    check_flags_beside_turns(document)
    text = required_text(document, form.text)
    if train_turns == "marked" and not any(document.get(key) is not None for key in FLAGS):
        raise RejectedLine(NOTHING_TO_TRAIN, "no flag marks the text, and --train-turns is marked")
    # Beside a text a label is a class of it, and rejected sides are those of nothing.
    known = KEYS_BESIDE - {*JUDGEMENTS, *REJECTED_KEYS, "instruction"} | {form.text}
    return Conversation((Turn("text", text),), other_keys=tuple(sorted(document.keys() - known)), notes=((TEXTS, 1),))


def _read(document: dict[str, Any]) -> tuple[str, tuple[Turn, ...], tuple[str, ...]]:
    """(key of the list of messages, turns, definitions of tools)."""
    check_unsupported(document, REFUSED_BESIDE, "beside the turns")
    check_flags_beside_turns(document)
    check_judgement(document)
    tools = read_tools(document)
    present = [key for key in FORMS if key in document]
    filled = [key for key in present if document[key]]
    if len(filled) > 1:
        raise RejectedLine("two conversations", "both 'messages' and 'conversations' hold turns; keep one of them")
    key = (filled or present)[0]
    turns = _with_system(document, _turns(document[key], key, form_of(document[key], key)))
    results_in_order(turns)
    _check_instruction(document, turns)
    return key, turns, tools


def _with_system(document: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """`turns` after the system turn that stands beside them, unless they begin with the same one."""
    found = {key: document[key] for key in SYSTEM_KEYS if document.get(key) not in (None, "")}
    for key, text in found.items():
        if not isinstance(text, str):
            raise RejectedLine("wrong type", f"'{key}' is {a_type(text)}, not a string")
    written = {turn.content for turn in turns if turn.role == "system"}
    if len(written | set(found.values())) > len(written or {""}):
        shown = " and ".join(f"'{key}'" for key in found)
        raise RejectedLine("two system prompts", f"{shown} beside the turns and another system prompt, which differ")
    return turns if written or not found else (Turn("system", next(iter(found.values()))), *turns)


def _check_instruction(document: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    """Refuse an instruction beside the turns, unless it is a copy of what they say."""
    text = document.get("instruction")
    if text not in EMPTY and not (isinstance(text, str) and any(text in turn.content for turn in turns)):
        raise RejectedLine(
            "unsupported instruction", f"'instruction' beside the turns: {KNOWN_KEYS['instruction'].meaning}"
        )


def _trained(
    turns: Sequence[Turn], flags: Sequence[bool | None], train_turns: TrainTurns, train_reasoning: TrainReasoning
) -> tuple[tuple[bool, ...], tuple[tuple[str, int], ...]]:
    """(which turns are labels, what is to be said of it)."""
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
    shortened: set[int] = set()
    if train_reasoning == "last":
        first_kept = first_with_reasoning(turns)
        shortened = {number for number, turn in enumerate(turns[:first_kept]) if turn.reasoning}
        # An answer without the reasoning that led to it is no answer that the model should learn to give.
        chosen -= shortened
        if not chosen:
            raise RejectedLine(
                NOTHING_TO_TRAIN, "the turns to train have reasoning that --train-reasoning last leaves out"
            )
    notes = ((EARLIER_REASONING, len(shortened)),) if shortened else ()
    return tuple(number in chosen for number in range(len(turns))), notes


def _other_keys(document: dict[str, Any], form: DataFormat | None, read: dict[str, Any], key: str) -> Iterator[str]:
    """Names of the keys that mean nothing here, one per place where they stand. `read`: the document that `key` is in."""
    known = KEYS_BESIDE | (form.keys | form.optional if form else set())
    yield from document.keys() - known
    yield from (each for each in FORMS if each in document and each not in read and document[each])
    if form and form.messages and key in document and document[key]:
        yield key
    turns_form = form_of(read[key], key)
    known = TURN_KEYS | HARMLESS_KEYS | turns_form.keys
    for message in read[key]:
        yield from message.keys() - known
        content = message.get(turns_form.content_key)
        for part in content if isinstance(content, list) else ():
            yield from part.keys() - PART_KEYS - HARMLESS_KEYS - {"type", "text"}
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            yield from call.keys() - CALL_KEYS - HARMLESS_KEYS - _OF_A_CALL


def _turns(messages: Any, key: str, form: Form) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise RejectedLine("wrong type", f"'{key}' is {a_type(messages)}, not a list")
    if not messages:
        raise RejectedLine("empty conversation", f"'{key}' is empty")
    return tuple(read_message(message, number, form) for number, message in enumerate(messages, 1))
