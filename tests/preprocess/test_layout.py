"""The batch layout, compiled and interpreted, equals the chat template's reference, token for token."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate
from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import Conversation, Role, Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import ToolCall, TrainReasoning, to_messages
from preprocess import layout
from preprocess.layout import lay_out
from preprocess.scan import Conversations, read_conversations
from preprocess.sources import Block

TOY = ChatTemplate(
    before={"system": ("<|system|>",), "user": ("<|end|>", "<|end|>", "<|user|>"), "assistant": ("<|assistant|>",)},
    after={"system": ("<|end|>",), "user": (), "assistant": ("<|end|>", "<|end|>")},
)
ROLES: list[Role] = ["system", "user", "assistant"]


def conversations(count: int) -> list[Conversation]:
    generator = random.Random(count)
    result = []
    for _ in range(count):
        roles = generator.choices(ROLES, k=generator.randint(0, 6))
        roles.insert(generator.randint(0, len(roles)), "assistant")
        texts = ["the fox", " ", "a\n\u2581 b", "<|end|>", "dog " * 40, "\x00"]
        trained = [role == "assistant" and generator.random() < 0.7 for role in roles]
        trained[roles.index("assistant")] = True
        turns = tuple(Turn(role, generator.choice(texts)) for role in roles)
        result.append(Conversation(turns, tuple(trained)))
    return result


def with_tools(count: int) -> list[Conversation]:
    """Tools, calls, results, reasoning and texts between plain conversations."""
    call = ToolCall("f", '{"x": "\u2581</tool_call>"}', "c")
    asked = (Turn("user", "a"), Turn("assistant", "b" * (count % 3), "the fox\n" * (count % 2 + 1), (call,)))
    whole = (*asked, Turn("tool", "", tool_call_id="c"), Turn("assistant", " dog", "hm"))
    chats = [Conversation(whole, tools=('{"type": "function", "function": {"name": "f"}}',)), Conversation(asked)]
    texts = [Conversation((Turn("text", text),)) for text in ("the fox", " ", "\u2581")]
    return [*chats, *conversations(2), *texts, *chats]


def as_lines(made: list[Conversation]) -> list[bytes]:
    lines = []
    for one in made:
        if one.is_text:
            lines.append(json.dumps({"text": one.turns[0].content}).encode())
            continue
        messages, tools = to_messages(one)
        for message, trained in zip(messages, one.trained, strict=True):
            message["weight"] = int(trained)
        lines.append(json.dumps({"messages": messages, "tools": tools}).encode())
    return lines


@pytest.mark.parametrize("train_reasoning", ["yes", "no", "last"])
@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("template", [TEMPLATES[DEFAULT_TEMPLATE], TOY], ids=[DEFAULT_TEMPLATE, "toy"])
def test_equals_the_template_with_tools(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    has_bos: bool,
    train_reasoning: TrainReasoning,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_bos:
        monkeypatch.setattr(tokenizer, "bos_id", None)
    made = [one for count in range(4) for one in with_tools(count)]
    block = Block("s", 1, 0, b"\n".join(as_lines(made)))
    read = read_conversations(block, [], train_reasoning=train_reasoning)
    assert [one.turns for one in read.whole()] == [one.turns for one in made]
    documents = lay_out(read, tokenizer, np.uint16, template)
    expected = encode_conversations(list(read.whole()), tokenizer, template, train_reasoning)
    assert documents.ids.tolist() == [token for ids, _ in expected for token in ids]
    assert documents.mask.tolist() == [value for _, mask in expected for value in mask]
    assert documents.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert documents.first_trained.tolist() == [mask.index(1) for _, mask in expected]


def joined(made: list[Conversation]) -> Conversations:
    """As lines, each turn with the flag that it needs."""
    lines = [
        json.dumps({
            "messages": [
                {"role": turn.role, "content": turn.content, "weight": int(trained)}
                for turn, trained in zip(one.turns, one.trained, strict=True)
            ]
        }).encode()
        for one in made
    ]  # fmt: skip
    return read_conversations(Block("s", 1, 0, b"\n".join(lines)), [])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("template", [TEMPLATES[DEFAULT_TEMPLATE], TOY], ids=[DEFAULT_TEMPLATE, "toy"])
@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_equals_the_template(
    tokenizer: Tokenizer,
    count: int,
    has_bos: bool,
    template: ChatTemplate,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr(layout, "_loop", lambda: layout._fill)
    if not has_bos:
        monkeypatch.setattr(tokenizer, "bos_id", None)
    made = conversations(count)
    documents = lay_out(joined(made), tokenizer, np.uint16, template)
    expected = encode_conversations(made, tokenizer, template)
    assert documents.ids.dtype == np.uint16 and documents.mask.dtype == np.uint8
    assert documents.ids.tolist() == [token for ids, _ in expected for token in ids]
    assert documents.mask.tolist() == [value for _, mask in expected for value in mask]
    assert documents.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert documents.first_trained.tolist() == [mask.index(1) for _, mask in expected]


def test_where_takes_whole_documents(tokenizer: Tokenizer) -> None:
    made = conversations(5)
    chosen = np.array([True, False, False, True, True])
    some = lay_out(joined(made), tokenizer, np.uint16).where(chosen)
    expected = lay_out(joined([made[0], made[3], made[4]]), tokenizer, np.uint16)
    for column, other in zip(some, expected, strict=True):
        assert column.tolist() == other.tolist() and column.dtype == other.dtype
