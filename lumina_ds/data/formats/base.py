"""What a format is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lumina_ds.data.strict_json import required_text

# Lists of turns that need no rewriting.
LISTS_OF_TURNS = ("messages", "conversations")


@dataclass(frozen=True)
class DataFormat:
    """One kind of line.

    A line is of this kind when all `keys` stand in its object and `is_like`, where given, says so; `optional` keys are read
    where they stand. `messages` turns the object into OpenAI's list of messages, and raises RejectedLine; None where the
    line needs no rewriting. `text`: the key of a whole document instead. `notes`: what is to be said of such a line,
    and how often it is true of this one. `example` is such an object.
    """

    meaning: str
    example: dict[str, Any]
    keys: frozenset[str]
    optional: frozenset[str] = frozenset()
    messages: Callable[[dict[str, Any]], list[Any]] | None = None
    is_like: Callable[[dict[str, Any]], bool] | None = None
    text: str | None = None
    notes: Callable[[dict[str, Any]], Iterable[tuple[str, int]]] | None = None

    def matches(self, document: dict[str, Any]) -> bool:
        return self.keys <= document.keys() and (self.is_like is None or self.is_like(document))


def pair(question: str, answer: str) -> Callable[[dict[str, Any]], list[Any]]:
    """`messages` of a format with one question and one answer under these keys, both texts."""
    return lambda document: exchange(required_text(document, question), required_text(document, answer))


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def prompt_and_answer(document: dict[str, Any], answer: str) -> list[Any]:
    """`prompt` and the answer under that key: two texts, or two lists of messages."""
    prompt, answered = document["prompt"], document[answer]
    if isinstance(prompt, list) and isinstance(answered, list):
        return [*prompt, *answered]
    return exchange(required_text(document, "prompt"), required_text(document, answer))
