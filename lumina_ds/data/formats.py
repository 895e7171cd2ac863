"""The kinds of lines that are read: how each becomes the list of messages that conversation.py checks.

An entry of FORMATS adds one. Lines of `messages` and `conversations` are read as they stand, by a compiled scanner where
that is there (preprocess/scan.py); the others are rewritten here, so that flags, roles and refusals hold for all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lumina_ds.data.strict_json import RejectedLine, json_type

# Lists of turns that need no rewriting. Where one holds something, the line is of that kind, whatever else it has.
LISTS_OF_TURNS = ("messages", "conversations")


@dataclass(frozen=True)
class DataFormat:
    """One kind of line.

    A line is of this kind when all `keys` stand in its object; `optional` ones are read where they stand. `messages` turns
    the object into OpenAI's list of messages, and raises RejectedLine; None where the line needs no rewriting.
    `example` is such an object.
    """

    meaning: str
    example: dict[str, Any]
    keys: frozenset[str]
    optional: frozenset[str] = frozenset()
    messages: Callable[[dict[str, Any]], list[Any]] | None = None


def as_messages(document: dict[str, Any]) -> dict[str, Any]:
    """The line's object with its turns under `messages` or `conversations`. Raises RejectedLine."""
    if any(document.get(key) for key in LISTS_OF_TURNS):
        return document
    found = [name for name, form in FORMATS.items() if form.messages and form.keys <= document.keys()]
    if not found:
        return document
    if len(found) > 1:
        raise RejectedLine("two formats", f"the keys are those of {' and of '.join(found)}; keep those of one")
    form = FORMATS[found[0]]
    assert form.messages is not None
    read = form.keys | form.optional | set(LISTS_OF_TURNS)
    rest = {key: value for key, value in document.items() if key not in read}
    return {**rest, "messages": form.messages(document)}


def pair(question: str, answer: str) -> Callable[[dict[str, Any]], list[Any]]:
    """`messages` of a format with one question and one answer under these keys, both texts."""
    return lambda document: [*_exchange(_text(document, question), _text(document, answer))]


def _alpaca(document: dict[str, Any]) -> list[Any]:
    asked = [_text(document, key) for key in ("instruction", "input") if document.get(key) not in (None, "")]
    if not asked:
        raise RejectedLine("empty content", "'instruction' and 'input' are empty")
    return [*_history(document), *_exchange("\n".join(asked), _text(document, "output"))]


def _history(document: dict[str, Any]) -> list[Any]:
    """Earlier exchanges, as pairs of question and answer."""
    pairs = document.get("history") or []
    if not isinstance(pairs, list):
        raise RejectedLine("wrong type", f"'history' is a {json_type(pairs)}, not a list")
    for number, each in enumerate(pairs, 1):
        if not (isinstance(each, list) and len(each) == 2 and all(isinstance(text, str) for text in each)):
            raise RejectedLine("wrong type", f"entry {number} of 'history' is no pair of question and answer")
    return [message for each in pairs for message in _exchange(*each)]


def _prompt_and_completion(document: dict[str, Any]) -> list[Any]:
    """Two texts, or two lists of messages."""
    prompt, completion = document["prompt"], document["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    return [*_exchange(_text(document, "prompt"), _text(document, "completion"))]


def _exchange(question: str, answer: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def _text(document: dict[str, Any], key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise RejectedLine("wrong type", f"'{key}' is a {json_type(value)}, not a string")
    if not value:
        raise RejectedLine("empty content", f"'{key}' is empty")
    return value


FORMATS: dict[str, DataFormat] = {
    "messages": DataFormat(
        "OpenAI's list of messages",
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, how are you?"}]},
        frozenset({"messages"}),
    ),
    "sharegpt": DataFormat(
        "ShareGPT's list of turns",
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi, how are you?"}]},
        frozenset({"conversations"}),
    ),
    "alpaca": DataFormat(
        "an instruction, perhaps with an input below it and earlier exchanges, and the output",
        {"instruction": "Answer the greeting.", "input": "Hello", "output": "Hi, how are you?", "history": []},
        frozenset({"instruction", "output"}),
        frozenset({"input", "history"}),
        _alpaca,
    ),
    "prompt-completion": DataFormat(
        "one user turn and one assistant turn, or two lists of messages",
        {"prompt": "Hello", "completion": "Hi, how are you?"},
        frozenset({"prompt", "completion"}),
        messages=_prompt_and_completion,
    ),
    "instruction-response": DataFormat(
        "one user turn and one assistant turn",
        {"instruction": "Say hello.", "response": "Hi, how are you?"},
        frozenset({"instruction", "response"}),
        messages=pair("instruction", "response"),
    ),
}
