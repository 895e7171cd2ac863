"""Mutated lines of every format against a second reading (independent_reading.py): the same lines are taken, as the same pieces.

More of them by hand: python tests/data/test_formats_fuzz.py 100000
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from copy import deepcopy
from typing import Any

from independent_reading import (
    COMMON,
    FLAGS,
    MEDIA,
    NOT_AT_A_TURN,
    NOT_BESIDE,
    REASONING,
    SHARED,
    SPEAKING_AT_A_TURN,
    SPEAKING_BESIDE,
    SYSTEM,
    read,
)

from lumina_ds.data.conversation import parse_conversation
from lumina_ds.data.formats import FORMATS
from lumina_ds.data.rendering import render
from lumina_ds.data.strict_json import RejectedLine

NUM_LINES = 12_000
TEXTS = [
    "a",
    "b",
    " c\n",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|end|>",
    "über \u2028 漢字",
    "{}",
    "[]",
    "x" * 50,
]
VALUES: list[Any] = [None, "", [], {}, 0, 1, 2, 1.5, True, False, "x", ["x"], {"a": 1}, "{}", "[1]", "null", 0.0, 1.0]
KEYS = [
    *FLAGS, *REASONING, *MEDIA[:3], "tool_calls", "function_call", "tool_call_id", "name", "tools", "functions", "system",
    "messages", "conversations", "text", "prompt", "chosen", "rejected", "train_detail", "role", "from", "content",
    "value", "id", "instruction", "output", "response", "completion", "rank", "score", "deleted", "replies", "arguments",
    "label", "input", "context", "image_url", *NOT_AT_A_TURN, *NOT_BESIDE, *SPEAKING_AT_A_TURN, *SPEAKING_BESIDE, *SYSTEM,
    "channel", "cache_control", "rejected_messages", "rejected_response",
]  # fmt: skip


class Lines:
    """Objects of lines, most of them good, of all formats."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)

    def line(self) -> Any:
        makers = [self.chat, self.chat, self.shared, self.pair, self.preference, self.tree, self.text]
        document = self.pick.choice(makers)()
        for _ in range(self.pick.choice([0, 0, 0, 1, 1, 2, 3])):
            self.mutate(document)
        return document

    def one(self, of: Any) -> Any:
        return self.pick.choice(of)

    def word(self) -> str:
        return str(self.one(TEXTS))

    def maybe(self, share: float = 0.3) -> bool:
        return self.pick.random() < share

    def arguments(self) -> Any:
        value = self.one([{}, {"a": 1}, {"x": self.word(), "n": 1.0}])
        return json.dumps(value, ensure_ascii=self.maybe()) if self.maybe() else value

    def call(self, number: int, has_id: bool) -> dict[str, Any]:
        function = {"name": self.one(["f", "g"]), "arguments": self.arguments()}
        entry = function if self.maybe() else {"type": "function", "function": function}
        return {**entry, "id": f"c{number}"} if has_id else dict(entry)

    def content(self) -> Any:
        return (
            [{"type": "text", "text": self.word()}, {"type": "text", "text": "z"}] if self.maybe(0.1) else self.word()
        )

    def definitions(self) -> Any:
        listed: list[Any] = [{"name": name, "parameters": {}} for name in ("f", "g")]
        if self.maybe(0.5):
            listed = [{"type": "function", "function": each} for each in listed]
        return json.dumps(listed) if self.maybe() else listed

    def beside(self) -> dict[str, Any]:
        given: dict[str, Any] = {"system": self.word()} if self.maybe(0.2) else {}
        if self.maybe():
            given[self.one(["tools", "functions"])] = self.definitions()
        return given

    def chat(self) -> dict[str, Any]:
        messages: list[Any] = [{"role": "system", "content": self.content()}] if self.maybe(0.2) else []
        for _ in range(self.one([1, 1, 2, 3])):
            messages.append({"role": self.one(["user", "human"]), "content": self.content()})
            if self.maybe():
                messages += self.round_of_calls()
            answer = {"role": self.one(["assistant", "ai"]), "content": self.content()}
            if self.maybe():
                answer[self.one(REASONING)] = self.word()
            if self.maybe(0.2):
                key = self.one(list(FLAGS))
                answer[key] = self.maybe(0.5) if isinstance(FLAGS[key], bool) else self.one([0, 1])
            messages.append(answer)
        return {self.one(["messages", "messages", "conversations"]): messages, **self.beside()}

    def round_of_calls(self) -> list[Any]:
        has_ids = self.maybe(0.6)
        calls = [self.call(number, has_ids) for number in range(self.one([1, 1, 2, 3]))]
        asking: dict[str, Any] = {"role": "assistant", "content": self.one([None, "", "Let me see."])}
        if len(calls) == 1 and self.maybe(0.2):
            asking["function_call"] = calls[0].get("function", calls[0])
        else:
            asking["tool_calls"] = calls
        results = []
        for call in calls:
            result = {"role": self.one(["tool", "function"]), "content": self.one([self.word(), ""])}
            if has_ids and self.maybe(0.8):
                result["tool_call_id"] = call["id"]
            if self.maybe(0.2):
                result["name"] = call.get("function", call)["name"]
            results.append(result)
        if self.maybe():
            self.pick.shuffle(results)
        return [asking, *results[: self.one([1, 3, 3, 3])]]

    def shared(self) -> dict[str, Any]:
        turns = []
        for _ in range(self.one([1, 2])):
            turns.append({"from": "human", "value": self.word()})
            if self.maybe(0.5):
                calls = [self.call(number, False) for number in range(self.one([1, 1, 2]))]
                written = json.dumps(calls[0] if len(calls) == 1 else calls)
                turns.append({"from": self.one(["function_call", "tool_call"]), "value": written})
                turns += [{"from": self.one(["observation", "tool"]), "value": self.word()} for _ in calls]
            turns.append({"from": "gpt", "value": self.word()})
        return {self.one(["conversations", "conversations", "messages"]): turns, **self.beside()}

    def pair(self) -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [
            {"instruction": self.word(), "input": self.one(["", None, self.word()]), "output": self.word()},
            {"instruction": self.word(), "output": self.word(), "history": self.one([[], None, [["p", "q"]]])},
            {"instruction": self.word(), "response": self.word()},
            {"prompt": self.word(), "completion": self.word()},
            {"prompt": self.chat_of("user"), "completion": self.chat_of("assistant")},
        ]
        return {**self.one(kinds), **self.beside()}

    def chat_of(self, role: str) -> list[Any]:
        return [{"role": role, "content": self.word()}]

    def preference(self) -> dict[str, Any]:
        question = self.chat_of("user")
        answer = self.chat_of("assistant")
        kinds: list[dict[str, Any]] = [
            {"prompt": self.word(), "chosen": self.word()},
            {"prompt": question, "chosen": answer},
            {"prompt": question[0]["content"], "chosen": [*question, *answer]},
            {"prompt": question, "chosen": [*self.chat_of("system"), *question, *answer]},
            {"chosen": [*question, *answer]},
        ]
        return {**self.one(kinds), "rejected": self.word()}

    def tree(self) -> dict[str, Any]:
        return {"prompt": self.node("prompter", 0), "message_tree_id": "t"}

    def node(self, role: str, depth: int) -> dict[str, Any]:
        node: dict[str, Any] = {"role": role, "text": self.word()}
        for key, values in (("rank", [0, 1, 2, None]), ("score", [0.1, 0.5, 1]), ("deleted", [False, True])):
            if self.maybe():
                node[key] = self.one(values)
        if self.maybe(0.2):
            node["labels"] = {"quality": {"value": self.one([0.2, 0.7])}}
        below = "assistant" if role == "prompter" else "prompter"
        count = self.one([0, 1, 2, 3]) if depth < 3 else 0
        node["replies"] = [self.node(below, depth + 1) for _ in range(count)]
        return node

    def text(self) -> dict[str, Any]:
        return {"text": self.word(), **({"id": 3} if self.maybe() else {})}

    def mutate(self, document: Any) -> None:
        """Change one place of `document`, chosen at random."""
        holders = list(_holders(document))
        holder = self.one(holders)
        if isinstance(holder, dict):
            key = self.one([*holder, self.one(KEYS)])
            if self.maybe() and key in holder:
                del holder[key]
            elif key in ("role", "from") and self.maybe(0.7):
                holder[key] = self.one([*COMMON, *SHARED, "narrator"])
            else:
                holder[key] = deepcopy(self.one([*VALUES, self.word(), self.definitions(), [self.call(0, True)]]))
        elif holder:
            number = self.pick.randrange(len(holder))
            if self.maybe():
                del holder[number]
            elif self.maybe(0.5):
                holder.insert(number, deepcopy(holder[self.pick.randrange(len(holder))]))
            else:
                holder[number] = deepcopy(self.one(VALUES))


def _holders(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _holders(each)


def ours(line: str) -> list[tuple[str, str, bool]] | None:
    try:
        conversation = parse_conversation(line.encode())
    except RejectedLine:
        return None
    return [(piece.role, piece.text, piece.is_trained) for piece in render(conversation)]


def compare(num_lines: int, seed: int) -> Counter[str]:
    """Counts of taken and refused lines. AssertionError at the first that is read in two ways."""
    lines, counts = Lines(seed), Counter[str]()
    for number in range(num_lines):
        line = json.dumps(lines.line(), ensure_ascii=number % 2 == 0)
        expected = read(json.loads(line))
        assert ours(line) == expected, f"line {number} of seed {seed}: {line}"
        counts["refused" if expected is None else "taken"] += 1
        for role in {role for role, _, _ in expected or []}:
            counts[role] += 1
    return counts


def test_both_readings_agree() -> None:
    counts = compare(NUM_LINES, 20)
    assert counts["taken"] > NUM_LINES / 3 and counts["refused"] > NUM_LINES / 6
    assert min(counts[role] for role in ("system", "user", "assistant", "tool", "tools", "text")) > NUM_LINES / 50


def test_the_second_reading_reads_the_examples() -> None:
    for form in FORMATS.values():
        *_, (_, text, is_label) = read(form.example) or [("", "", False)]
        assert (text, is_label) == ("Hi, how are you?", True)


if __name__ == "__main__":
    print(compare(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
