"""What a conversation is checked for: rules by name, their level, and pure functions that find breaches.

Errors are the rules of parse_conversation(): `lumina preprocess` refuses such a line. Warnings are lines that it
takes but that are rarely meant so: roles out of order, damaged text, duplicates, tokens that training never sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from lumina_ds.data.conversation import Turn
from lumina_ds.report.data.visible import excerpt

Level = Literal["error", "warning"]

SYSTEM_NOT_FIRST = "system turn not first"
REPEATED_ROLE = "repeated role"
STARTS_WITH_ASSISTANT = "starts with assistant"
ENDS_WITHOUT_ASSISTANT = "does not end with assistant"
BLANK_CONTENT = "blank content"
CONTROL_CHARACTER = "control character"
REPLACEMENT_CHARACTER = "replacement character"
MOJIBAKE = "mojibake"
CONTROL_TOKEN_TEXT = "control-token text"
DUPLICATE = "duplicate conversation"
OVERLONG = "longer than a row"
NO_TRAINED_END = "no trained end of turn"
NOTHING_TRAINED = "no trained token in its row"
OTHER_KEYS = "keys without a meaning"
UNDEFINED_TOOL = "call of an undefined tool"
WRONG_ARGUMENTS = "arguments against the schema"
INVALID_SCHEMA = "invalid schema of a tool"
TAG_IN_TEXT = "tool or reasoning tag in text"
UNKNOWN_IDS = "unknown ids"
CHANGED_TEXT = "text does not come back"

WARNINGS: dict[str, str] = {
    SYSTEM_NOT_FIRST: "a system turn stands after the first turn",
    REPEATED_ROLE: "two turns of one role follow each other",
    STARTS_WITH_ASSISTANT: "an assistant turn comes before any user turn",
    ENDS_WITHOUT_ASSISTANT: "what follows the last assistant turn is never trained",
    BLANK_CONTENT: "a turn holds nothing but white space",
    CONTROL_CHARACTER: "text holds a control character other than tab and line end",
    REPLACEMENT_CHARACTER: "text holds U+FFFD, left by a decoder that lost a character",
    MOJIBAKE: "text looks like UTF-8 that was read in another encoding",
    CONTROL_TOKEN_TEXT: "text spells a control token of some chat format; it stays text",
    DUPLICATE: "the same roles and contents stood on an earlier line",
    OVERLONG: "more tokens than --seq-length; truncation loses the rest",
    NO_TRAINED_END: "training sees no end of an assistant turn, so the model does not learn to stop",
    OTHER_KEYS: "preprocessing ignores keys that it does not know; what they say is not trained",
    UNDEFINED_TOOL: "an assistant calls a function that 'tools' does not define",
    WRONG_ARGUMENTS: "a call's arguments are not what the JSON schema of its tool allows",
    INVALID_SCHEMA: "a tool's 'parameters' are no JSON schema, so calls of it are not checked",
    TAG_IN_TEXT: "an assistant's content spells a tag of calls or reasoning; move it to tool_calls or reasoning_content, "
    "or it is trained as it stands and --train-reasoning does not see it",
    UNKNOWN_IDS: "the tokenizer cannot spell a character and has one id for all such",
    CHANGED_TEXT: "a turn that was tried does not decode to its text: the tokenizer changes or drops characters",
    NOTHING_TRAINED: "every trained token lies beyond --seq-length; truncation drops the conversation",
}


class Fault(NamedTuple):
    """One breach: the rule, one phrase about this very conversation, and the text around it."""

    rule: str
    reason: str
    excerpt: str


def level_of(rule: str) -> Level:
    """Every rule that is no warning is one of parse_conversation()'s, hence an error."""
    return "warning" if rule in WARNINGS else "error"


def conversation_faults(turns: Sequence[Turn]) -> Iterator[Fault]:
    """Every rule that the turns break, each once: the first place where they do."""
    if turns[0].role != "text":
        yield from _role_faults(turns)
    seen: set[str] = set()
    for number, (role, content, *_) in enumerate(turns, 1):
        if _is_plain(content):
            continue
        for fault in _text_faults(content, f"turn {number} ({role})", role == "assistant"):
            if fault.rule not in seen:
                seen.add(fault.rule)
                yield fault


def beginning(turns: Sequence[Turn]) -> str:
    """The first words of a conversation, as they stand."""
    return "  ".join([f"{turn.role}: {turn.content[:100]}" for turn in turns[:4]])[:100]


def describe(turns: Sequence[Turn]) -> str:
    """The first words of a conversation on one line, made visible."""
    return excerpt(beginning(turns))


def _is_plain(text: str) -> bool:
    """Whether no rule about text can be broken: most text is, and needs no closer look."""
    return text.isascii() and text.isprintable() and "<" not in text and "[" not in text and not text.isspace()


def _role_faults(turns: Sequence[Turn]) -> Iterator[Fault]:
    roles = [turn.role for turn in turns]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        yield Fault(SYSTEM_NOT_FIRST, f"turn {number} of {len(turns)} is a system turn", describe(turns[number - 1 :]))
    for number, (before, role) in enumerate(pairwise(roles), 2):
        if before == role not in ("system", "tool"):
            yield Fault(
                REPEATED_ROLE, f"turns {number - 1} and {number} are both {role}", describe(turns[number - 2 :])
            )
            break
    spoken = [role for role in roles if role != "system"]
    if spoken[0] == "assistant":
        yield Fault(STARTS_WITH_ASSISTANT, "the first turn that is no system turn is the assistant's", describe(turns))
    if roles[-1] != "assistant":
        yield Fault(ENDS_WITHOUT_ASSISTANT, f"the last turn is of the {roles[-1]}", describe(turns[-2:]))


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Markers of the common chat formats, ours included.
_CONTROL_TOKEN = re.compile(
    r"<\|[a-z_]{2,30}\|>|</?s>|<(?:unk|pad|bos|eos)>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
# Characters that the bytes 0x80 to 0xBF become in Latin-1 and in Windows-1252.
_BYTE = f"[\u0080-\u00bf{bytes(range(0x80, 0xA0)).decode('cp1252', 'ignore')}]"
# Lead bytes of UTF-8 read as letters. Only pairs and runs that no language writes: ß“ and É… are ordinary text.
_MOJIBAKE = re.compile(
    f"[ÂÃ]{_BYTE}"  # Latin letters and signs: Ã©, Â°
    f"|â[€\u0080]{_BYTE}"  # quotation marks and dashes: â€™
    f"|ã[€\u201a\u0192\u0080-\u0083]{_BYTE}"  # Japanese
    f"|à[¤-¿]{_BYTE}"  # scripts of India, Thai
    f"|ð[Ÿ\u009f]{_BYTE}"  # emoji
    f"|(?:[ÐÑ]{_BYTE}){{2}}"  # Cyrillic
    f"|(?:[ã-é]{_BYTE}{{2}}){{2}}"  # Chinese and Japanese
    "|ï»¿|ï¿½"  # byte order mark, replacement character
)


_TAG = re.compile("</?(?:think|tool_call|tool_response)>")


def _text_faults(text: str, where: str, is_assistant: bool) -> Iterator[Fault]:
    if text.isspace():
        yield Fault(BLANK_CONTENT, f"{where} holds only white space", excerpt(text))
    if not text.isprintable() and (found := _CONTROL.search(text)):
        yield Fault(CONTROL_CHARACTER, f"U+{ord(found[0]):04X} in {where}", excerpt(text, found.start()))
    if ("<" in text or "[" in text) and (found := _CONTROL_TOKEN.search(text)):
        yield Fault(CONTROL_TOKEN_TEXT, f"{found[0]} in {where}", excerpt(text, found.start()))
    if is_assistant and "<" in text and (found := _TAG.search(text)):
        yield Fault(TAG_IN_TEXT, f"{found[0]} in {where}", excerpt(text, found.start()))
    if text.isascii():
        return
    if count := text.count("\ufffd"):
        times = "once" if count == 1 else f"{count:,} times"
        yield Fault(REPLACEMENT_CHARACTER, f"{times} in {where}", excerpt(text, text.index("\ufffd")))
    if found := _MOJIBAKE.search(text):
        yield Fault(MOJIBAKE, f"{found[0]!r} in {where}", excerpt(text, found.start()))
