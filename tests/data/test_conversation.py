"""Strict parsing: what is accepted, and each broken kind with its rule."""

from __future__ import annotations

import json

import pytest

from lumina_ds.data.conversation import (
    Conversation,
    Turn,
    is_blank,
    parse_conversation,
    split_lines,
)
from lumina_ds.data.strict_json import MAX_LINE_BYTES, RejectedLine


def line(*turns: tuple[str, object], key: str = "messages", names: tuple[str, str] = ("role", "content")) -> bytes:
    return json.dumps({key: [dict(zip(names, turn, strict=True)) for turn in turns]}).encode()


GOOD = '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]'


@pytest.mark.parametrize(("written", "role"), [
    ("user", "user"), ("human", "user"), ("prompter", "user"),
    ("assistant", "assistant"), ("ai", "assistant"), ("bot", "assistant"), ("system", "system"),
])  # fmt: skip
def test_roles_of_messages(written: str, role: str) -> None:
    assert parse_conversation(line((written, "x"), ("assistant", "y"))).turns[0] == Turn(role, "x")


def test_sharegpt() -> None:
    shared = line(("human", "a"), ("gpt", "b"), key="conversations", names=("from", "value"))
    assert parse_conversation(shared) == Conversation((Turn("user", "a"), Turn("assistant", "b")))


@pytest.mark.parametrize("content", [
    "  spaces kept \n\t", "<s></s><unk>", "<|assistant|><|end|>", "\u2581", "\0", "\u2028\u0085\x0b", "\U0001f600", " ",
])  # fmt: skip
def test_content_is_kept_unaltered(content: str) -> None:
    assert parse_conversation(line(("assistant", content))).turns == (Turn("assistant", content),)


def test_other_keys_and_repeated_roles_are_fine() -> None:
    text = b'{"id":1e3,"x":[{"y":null}],"messages":[{"role":"user","content":"a","w":0.5},{"role":"user","content":"b"},{"role":"bot","content":"c"}]}'
    assert [turn.content for turn in parse_conversation(text).turns] == ["a", "b", "c"]


DEEP = "[" * 99 + "]" * 99  # inside the top-level object: depth 100, the limit


def test_nesting_up_to_the_limit() -> None:
    assert parse_conversation(f'{GOOD},"x":{DEEP}}}'.encode())
    assert parse_conversation(line(("assistant", "[{" * 5000)))  # brackets in text are no nesting


@pytest.mark.parametrize(("text", "rule"), [
    # a parser that is not strict accepts these
    (GOOD + ',"x":NaN}', "invalid JSON"),
    (GOOD + ',"x":-Infinity}', "invalid JSON"),
    (GOOD + ',"x":1e999}', "number out of range"),
    (GOOD + ',"x":' + "9" * 5000 + "}", "number out of range"),
    (GOOD + ',"x":1,"x":2}', "duplicate key"),
    ('{"messages":[{"role":"assistant","role":"user","content":"b"}]}', "duplicate key"),
    ('{"messages":[{"role":"assistant","content":"\\ud800"}]}', "lone surrogate"),
    (GOOD + ',"\\uDFFF":1}', "lone surrogate"),
    ("[]", "not an object"), ('"text"', "not an object"), ("null", "not an object"), ("1", "not an object"),
    ("true", "not an object"), ("{}", "missing key"), ('{"txt":"a"}', "missing key"),
    ('{"messages":[]}', "empty conversation"), ('{"messages":{}}', "wrong type"), ('{"messages":null}', "wrong type"),
    ('{"messages":["a"]}', "wrong type"), ('{"messages":[{"role":1,"content":"a"}]}', "wrong type"),
    ('{"messages":[{"role":"assistant","content":null}]}', "wrong type"),
    ('{"messages":[{"role":"assistant","content":["a"]}]}', "unsupported content part"),
    ('{"messages":[{"role":"assistant"}]}', "missing key"), ('{"messages":[{"content":"a"}]}', "missing key"),
    ('{"messages":[{"role":"assistant","content":""}]}', "empty content"),
    ('{"messages":[{"role":"Assistant","content":"a"}]}', "unknown role"),
    ('{"messages":[{"role":"gpt","content":"a"}]}', "unknown role"),
    ('{"messages":[{"role":"tools","content":"a"}]}', "unknown role"),
    ('{"messages":[{"role":"user","content":"a"}]}', "no assistant turn"),
    # every parser refuses these
    (GOOD, "invalid JSON"), (GOOD + ",}", "invalid JSON"), (GOOD + "} {}", "invalid JSON"),
    ("\ufeff" + GOOD + "}", "byte order mark"), (GOOD + '}"', "invalid JSON"), (GOOD + "} // c", "invalid JSON"),
    ('{"messages":[{"role":"assistant","content":"\n"}]}', "invalid JSON"),
    (f'{GOOD},"x":[{DEEP}]}}', "nested too deeply"), ("[" * 100_000, "nested too deeply"),
    ("{'messages':1}", "invalid JSON"), ("plain text", "invalid JSON"),
])  # fmt: skip
def test_rejected(text: str, rule: str) -> None:
    with pytest.raises(RejectedLine) as caught:
        parse_conversation(text.encode())
    assert caught.value.rule == rule
    assert len(caught.value.reason) < 150


@pytest.mark.parametrize(("data", "rule"), [
    (b'{"messages":"\xff"}', "invalid UTF-8"),
    (b'{"messages":"\xed\xa0\x80"}', "invalid UTF-8"),  # a surrogate in UTF-8
    ((GOOD + "}").encode("utf-16"), "invalid UTF-8"),
    (b"\x1f\x8b\x08\x00", "invalid UTF-8"),
    (b" " * (MAX_LINE_BYTES + 1), "line too long"),
])  # fmt: skip
def test_rejected_bytes(data: bytes, rule: str) -> None:
    with pytest.raises(RejectedLine) as caught:
        parse_conversation(data)
    assert caught.value.rule == rule


def test_reasons_name_the_fault() -> None:
    with pytest.raises(RejectedLine, match="message 2 has the unknown role 'narrator'"):
        parse_conversation(line(("user", "a"), ("narrator", "b")))
    with pytest.raises(RejectedLine, match="'content' of message 1 is a number, not a string"):
        parse_conversation(line(("user", 5)))


def test_lines_end_at_newlines_only() -> None:
    block = "a\u2028b\r\n\n \t\r\nlast\x0b\u0085".encode()
    assert list(split_lines(block)) == [
        (0, "a\u2028b".encode()),
        (7, b""),
        (8, b" \t"),
        (12, "last\x0b\u0085".encode()),
    ]
    assert [is_blank(text) for _, text in split_lines(block)] == [False, True, True, False]
    assert list(split_lines(b"a\n")) == [(0, b"a")] and list(split_lines(b"")) == []
