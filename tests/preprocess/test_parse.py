"""The quick way and the strict parser accept the same lines with the same turns."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data.conversation import RejectedLine, parse_conversation
from preprocess.parse import _quick_turns, parse_line

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def outcome(line: bytes, parse: Any) -> object:
    try:
        turns = parse(line)
    except RejectedLine as fault:
        return fault.rule, fault.reason
    return [tuple(turn) for turn in (turns if parse is parse_line else turns.turns)]


TEXT = st.text(st.sampled_from('ab":, {}[]\\\n\u00e9\u2028\U0001f600\x00') | st.characters(codec="utf-8"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
EXTRAS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "bot", "system", "narrator", 1]), "content": TEXT | SCALARS},
    optional={"name": EXTRAS},
)
DOCUMENTS = st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=4)}, optional={"id": EXTRAS, ' "x': EXTRAS})


@settings(max_examples=400, deadline=None, derandomize=True)
@given(DOCUMENTS, st.booleans(), st.sampled_from([None, (",", ":"), (" ,\t", " : ")]))
def test_any_document(document: dict[str, Any], ascii_only: bool, separators: tuple[str, str] | None) -> None:
    line = json.dumps(document, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "surrogatepass")
    assert outcome(line, parse_line) == outcome(line, parse_conversation)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage(data: st.DataObject) -> None:
    line = bytearray(GOOD.replace(b'"a"', b'"a\\n: \\":"').replace(b"]}", b'], "n": 1.5}'))
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(line)))
        length = data.draw(st.integers(0, 3))
        line[begin : begin + length] = data.draw(
            st.sampled_from([b"", b'"', b":", b"\\", b"{", b"]", b",", b"\xff", b'"role":"x",'])
        )
    assert outcome(bytes(line), parse_line) == outcome(bytes(line), parse_conversation)


@pytest.mark.parametrize("line", [
    GOOD,
    GOOD.replace(b'"a"', b'"\\"role\\": \\"x\\" : y"'),  # text that looks like keys
    GOOD.replace(b": ", b"\t: "),
    GOOD.replace(b'"a"', b'"a\\u003a :"'),
    GOOD[:-1] + b', "id": 7, "meta": {"tags": ["x", {"y": 1e5}]}}',
    b'{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}',
])  # fmt: skip
def test_good_lines_take_the_quick_way(line: bytes) -> None:
    turns = _quick_turns(line)
    assert turns is not None and list(turns) == list(parse_conversation(line).turns)


@pytest.mark.parametrize("line", [
    b'{"messages": [], ' + GOOD[1:],
    GOOD.replace(b'"role": "user"', b'"role": "system", "role": "user"'),
    GOOD.replace(b'"role": "user"', b'"role": "system", "r\\u006fle": "user"'),
    # an escaped colon is no key's
    GOOD.replace(b'"content": "a"', b'"content": "", "content": "\\u003a"'),
    GOOD[:-1] + b', "id": 1, "id": 2}',
    GOOD[:-1] + b', "id": 1, "id" : 2}',
    GOOD[:-1] + b', "x": {"y": 1, "y": 1}}',
    # a key twice in one place is not outweighed by text elsewhere
    GOOD[:-1] + b', "x": [{"y": 1, "y" \t: "\\":"}]}',
])  # fmt: skip
def test_a_key_that_stands_twice_is_always_found(line: bytes) -> None:
    with pytest.raises(RejectedLine, match="stands twice"):
        parse_line(line)
