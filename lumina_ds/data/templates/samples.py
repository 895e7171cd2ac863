"""Conversations made to try a chat template on: of every length, script and kind, the same in every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lumina_ds.data.templates.leaves import Message

TEXTS = (
    "What is two plus three?",
    "Five, since 2 + 3 = 5.",
    "Zażółć gęślą jaźń; naïve œuvre, İstanbul, Đà Nẵng.",
    "Съешь же ещё этих мягких французских булок.",
    "私は東京に住んでいます。你好,世界! 안녕하세요",
    "مرحبا بالعالم ١٢٣ नमस्ते สวัสดี",
    "\U0001f469\u200d\U0001f52c e\u0301 \u00bd \U00020bb7",
    "def f(x):\n\treturn {'a': x ** 2}  # why?\n\n    if x:\n        pass",
    "1, 22, 333, 4444, 55555.5",
    "{% if x %}{{ y }}{% endif %} {# not a template #}",
    "Qx",
    "system\nuser\nassistant\nmodel\ntool",
    "\"quoted\" and 'quoted' \\ backslash & <b>bold</b>",
    "a" * 70,
)
# White space at the edges, which templates trim and tokenizers merge with what stands before.
EDGES = (" leading", "trailing ", "\nfirst line empty", "last line empty\n\n", "\t tabs \t")

SYSTEM, MANY, REASONING, CALLS, WHITE_SPACE = "system turns", "several turns", "reasoning", "tool calls", "white space"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Sample(NamedTuple):
    """kind: what a template need not take, or None where a template that cannot show it is of no use."""

    kind: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def trained(self) -> list[bool]:
        return [message["role"] == "assistant" for message in self.messages]


def samples() -> Iterator[Sample]:
    """All of them."""
    for number, text in enumerate(TEXTS):
        yield Sample(None, exchange(text, TEXTS[number - 1]))
    for number in range(0, len(TEXTS), 2):
        yield Sample(MANY, chat([*TEXTS[number:], *TEXTS[:number]], 2 + number % 3))
        yield Sample(SYSTEM, [turn("system", TEXTS[number]), *chat(TEXTS, 1 + number % 2)])
    for text in EDGES:
        yield Sample(WHITE_SPACE, exchange(text, text))
        yield Sample(WHITE_SPACE, [*exchange("Hello", text), *exchange(text, "Bye")])
    for number in (1, 2):
        yield Sample(
            REASONING, [*exchange("Why?", "Because.", "Let me think."), *exchange("So?", "So.", "Hm.")][-2 * number :]
        )
        tagged = exchange("Why?", "<think>\nLet me think.\n</think>\n\nBecause.")
        yield Sample(REASONING, [*tagged, *exchange("So?", "So.")][: 2 * number])
    yield Sample(CALLS, called("Sunny."), [WEATHER])
    yield Sample(CALLS, [*called("Sunny."), *exchange("Thanks", "At your service.")], [WEATHER])


def forgeries(names: Sequence[str]) -> Iterator[tuple[Sample, Sample]]:
    """Conversations that spell special tokens, each with one of the same form that spells none."""
    plain = exchange("a b", "c d")
    for first in range(0, len(names), 40):
        some = names[first : first + 40]
        spelled = f"a {' b '.join(some)} {''.join(some)} c"
        yield Sample(None, exchange(spelled, spelled)), Sample(None, plain)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def exchange(question: str, answer: str, reasoning: str | None = None) -> list[dict[str, Any]]:
    thought = {} if reasoning is None else {"reasoning_content": reasoning}
    return [turn("user", question), {**turn("assistant", answer), **thought}]


def chat(texts: Sequence[str], num_exchanges: int) -> list[dict[str, Any]]:
    return [message for n in range(num_exchanges) for message in exchange(texts[2 * n], texts[2 * n + 1])]


def called(answer: str) -> list[dict[str, Any]]:
    """A question, a call, its result and the answer."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Łódź"}}}
    return [
        turn("user", "What is the weather in Łódź?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": '{"sky": "clear"}'},
        turn("assistant", answer),
    ]


def as_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]
