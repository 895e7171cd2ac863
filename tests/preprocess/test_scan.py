"""The compiled scanner and the strict parser accept the same lines with the same turns, and keep the same account."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_ds.data.conversation import Conversation, TrainTurns, is_blank, parse_conversation
from lumina_ds.data.rendering import RENDERED_ROLES, render
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.turn_keys import KNOWN_KEYS
from preprocess import scan
from preprocess.scan import Conversations, Rejection, read_conversations
from preprocess.sources import Block

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
SHAREGPT = (
    b'{"id": 7, "conversations": [{"from": "human", "value": "q"}, {"value": "r", "from": "gpt", "x": {"y": []}}]}'
)

# Text with everything that JSON writes in a special way, and long runs of what it does not.
TEXT = st.text(
    st.sampled_from('ab":, {}[]\\/\n\t\x08\x0c\r\u00e9\u07ff\u2028\u2581\uffff\U0001f600\U0010ffff\x00\x7f')
    | st.characters(codec="utf-8"),
    max_size=40,
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
EXTRAS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
# Flags as they should be, and as they should not.
# Names of every key with a meaning elsewhere: what it holds is read by the strict parser, or harmless.
KNOWN = st.dictionaries(
    st.sampled_from(sorted(KNOWN_KEYS)), st.sampled_from(["x", "a", None, True, False, 0, 1, []]), max_size=2
)
FLAGS = {"weight": st.sampled_from([0, 1, 1.0, None, 2]), "train": st.booleans() | SCALARS, "masked": st.booleans()}
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "ai", "bot", "system", "gpt", "narrator", 1]),
        "content": TEXT | SCALARS,
    },
    optional={"name": EXTRAS, "n": EXTRAS, **FLAGS},
)
TURNS = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "users"]), "value": TEXT},
    optional=FLAGS | {"tool_calls": EXTRAS},
)
DOCUMENTS = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGES, max_size=4)},
        optional={"id": EXTRAS, "x": EXTRAS, "system": TEXT, "tools": EXTRAS},
    ),
    st.fixed_dictionaries({"conversations": st.lists(TURNS, max_size=4)}, optional={"messages": EXTRAS, "y": EXTRAS}),
)


# One way holds for all examples of a test, so its fixture need not be made anew for each.
BOTH_WAYS = [HealthCheck.function_scoped_fixture]


def turns_of(found: Conversations) -> list[list[tuple[str, str]]]:
    turns = [(RENDERED_ROLES[role], text) for role, text in zip(found.roles.tolist(), found.texts.split(), strict=True)]
    return [turns[begin:end] for begin, end in pairwise(found.first_turns.tolist())]


def strict(line: bytes, train_turns: TrainTurns) -> Conversation | tuple[str, str] | None:
    if is_blank(line):
        return None
    try:
        return parse_conversation(line, train_turns)
    except RejectedLine as fault:
        return fault.rule, fault.reason


def check(lines: list[bytes], train_turns: TrainTurns = "all") -> None:
    """Good lines around them, so that nothing of a refused line may stay behind."""
    lines = [GOOD, *(part for line in lines for part in (line, SHAREGPT))]
    rejections: list[Rejection] = []
    found = read_conversations(Block("s", 5, 100, b"\n".join(lines)), rejections, train_turns=train_turns)
    expected = [strict(line.removesuffix(b"\r"), train_turns) for line in lines]
    good = [(number, outcome) for number, outcome in enumerate(expected) if isinstance(outcome, Conversation)]
    assert turns_of(found) == [[(piece.role, piece.text) for piece in render(outcome)] for _, outcome in good]
    assert found.trained.tolist() == [piece.is_trained for _, outcome in good for piece in render(outcome)]
    assert [(one.turns, one.tools) for one in found.whole()] == [(one.turns, one.tools) for _, one in good]
    assert found.other_keys == Counter(key for _, outcome in good for key in outcome.other_keys)
    assert found.num_with_other_keys == sum(bool(outcome.other_keys) for _, outcome in good)
    assert found.lines.tolist() == [5 + number for number, _ in good]
    starts = [100 + sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert rejections == [
        Rejection("s", 5 + number, starts[number], *outcome)
        for number, outcome in enumerate(expected)
        if isinstance(outcome, tuple)
    ]
    assert found.has_space_symbol == any("\u2581" in text for turns in turns_of(found) for _, text in turns)


@pytest.fixture(params=["compiled", "interpreted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "interpreted":
        monkeypatch.setattr(scan, "_kernel", lambda: None)
    else:
        pytest.importorskip("numba")


@pytest.mark.usefixtures("way")
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=BOTH_WAYS)
@given(
    st.lists(DOCUMENTS, min_size=1, max_size=3),
    st.lists(KNOWN, min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([None, (",", ":"), (" ,\t", " : ")]),
    st.sampled_from(["all", "last", "marked"]),
)
def test_any_documents(
    documents: list[Any],
    known: list[dict[str, Any]],
    ascii_only: bool,
    separators: tuple[str, str] | None,
    train_turns: TrainTurns,
) -> None:
    for document, keys in zip(documents, known, strict=False):
        holders = [document, *document.get("conversations", document.get("messages"))]
        holder = holders[len(keys) % len(holders)]
        assert isinstance(holder, dict)
        holder.update({key: value for key, value in keys.items() if key not in holder})
    lines = [json.dumps(one, ensure_ascii=ascii_only, separators=separators).encode() for one in documents]
    check(lines, train_turns)


@pytest.mark.usefixtures("way")
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=BOTH_WAYS)
@given(st.data())
def test_any_damage(data: st.DataObject) -> None:
    line = bytearray(data.draw(st.sampled_from([GOOD, SHAREGPT])))
    line = line.replace(b'"a"', b'"a\\n: \\":\xc3\xa9\xe2\x96\x81\\ud83d\\ude00"').replace(
        b"]}", b'], "n": [-1.5, {"m": null}]}'
    )
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(line)))
        length = data.draw(st.integers(0, 3))
        pieces = [
            b"",
            b'"',
            b":",
            b"\\",
            b"{",
            b"]",
            b",",
            b"\xff",
            b"\xe2\x96",
            b"0",
            b"1e9",
            b"\r",
            b"\t",
            b'"role":"x",',
            b"\\ud83d",
        ]
        line[begin : begin + length] = data.draw(st.sampled_from(pieces))
    check([bytes(line)])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("line", [
    GOOD + b"\r", b" \t" + GOOD + b" \r", b"\r", b"", b" ", b"{}", b"[]", GOOD + b"x", GOOD[:-1], GOOD + GOOD,
    b'{"messages": []}', b'{"messages": [{}]}', b'{"messages": [{"role": "assistant"}]}', SHAREGPT.replace(b"7", b"07"),
    b'{"messages": [{"role": "assistant", "content": ""}]}', GOOD.replace(b'"b"', b"null"), GOOD.replace(b"ant", b"\\u0061nt"),
    GOOD.replace(b"content", b"con\\u0074ent"), GOOD.replace(b'"role"', b'"role": "user", "role"', 1),
    GOOD.replace(b'"content"', b'"content": "c", "content"', 1), GOOD.replace(b'"messages"', b'"messages": 1, "messages"'),
    SHAREGPT.replace(b'"x"', b'"messages"'), SHAREGPT.replace(b'"id"', b'"messages"'), SHAREGPT.replace(b"gpt", b"bot"),
    GOOD.replace(b'"a"', b'"\\ud800"'), GOOD.replace(b'"a"', b'"\\udc00\\ud800"'), GOOD.replace(b'"a"', b'"\\ud83d\\ude00"'),
    GOOD.replace(b'"a"', b'"\xed\xa0\x80"'), GOOD.replace(b'"a"', b'"\xc0\x80"'), GOOD.replace(b'"a"', b'"\xf4\x90\x80\x80"'),
    GOOD.replace(b'"a"', b'"\xe0\x80\x80"'), GOOD.replace(b'"a"', b'"\xf0\x9f"'), GOOD.replace(b'"a"', b'"a\x01"'),
    GOOD.replace(b'"a"', b'"\\u00"'), GOOD.replace(b'"a"', b'"\\x"'), GOOD.replace(b'"a"', b'"\\u2581"'),
    *(SHAREGPT.replace(b"7", value) for value in (
        b"-0", b"-", b"1.", b".5", b"1e5", b"1e999", b"-1.25", b"9" * 5000, b"NaN", b"-Infinity", b"truex", b"nul", b"[1,]",
        b"[" * 90 + b"]" * 90, b"[" * 101 + b"]" * 101, b'{"a": 1, "a": 2}', b'{"a": {"a": [{"a": 1}]}}', b'{"a" 1}', b"{,}",
        b"{" + b",".join(b'"%d":0' % n for n in range(80)) + b"}", b'"\\ud800"', b'"\xff"', b"[[], {}, [{}]]", b'{"a": 1,}',
    )),
])  # fmt: skip
def test_single_lines(line: bytes) -> None:
    check([line])
    check([line, line])


@pytest.mark.usefixtures("way")
def test_more_names_of_keys_than_the_scanner_holds() -> None:
    lines = [GOOD[:-1] + b', "key %d": 1, "id": 1}' % number for number in range(50)]
    check([*lines, *lines])


@pytest.mark.usefixtures("way")
def test_the_last_line_may_lack_its_end_and_a_limit_ends_the_account() -> None:
    rejections: list[Rejection] = []
    block = Block("s", 1, 0, b"\n".join([GOOD, b"x", GOOD, b"y", GOOD]))
    assert read_conversations(block, rejections).lines.tolist() == [1, 3, 5]
    assert [rejection.line for rejection in rejections] == [2, 4]
    rejections.clear()
    found = read_conversations(block, rejections, max_conversations=2)
    assert turns_of(found) == [[("user", "a"), ("assistant", "b")]] * 2
    assert [rejection.line for rejection in rejections] == [2]


@pytest.mark.usefixtures("way")
def test_a_line_of_the_shortest_messages_fits() -> None:
    line = b'{"messages":[' + b",".join([b'{"role":"ai","content":"x"}'] * 5000) + b"]}"
    found = read_conversations(Block("s", 1, 0, line), [])
    assert turns_of(found) == [[("assistant", "x")] * 5000]


TOOLS = {"tools": [{"name": "f"}], "messages": [
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [{"id": "1", "name": "f", "arguments": {}}]},
    {"role": "tool", "tool_call_id": "1", "content": ""}, {"role": "assistant", "content": "b"},
]}  # fmt: skip


@pytest.mark.usefixtures("way")
def test_lines_of_tools_and_of_other_formats_between_plain_ones() -> None:
    others = [TOOLS, {"text": "a \u2581 document"}, {"prompt": "p", "chosen": "c", "rejected": "r"}]
    developer = {"messages": [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(each).encode() for each in [*others, developer, *others]]
    check(lines)
    check(lines, "last")


def test_notes_contexts_and_named_formats() -> None:
    block = Block("s", 1, 0, b"\n".join([json.dumps(TOOLS).encode(), GOOD, b'{"text": "t"}']))
    found = read_conversations(block, [], train_reasoning="no")
    assert found.context_bytes == {2: len("<think>\nhm\n</think>\n\n")} and list(found.rendered) == [0, 2]
    assert list(found.notes.values()) == [1] and found.first(2).context_bytes == found.context_bytes
    rejections: list[Rejection] = []
    assert read_conversations(block, rejections, format_name="text").num_conversations == 1
    assert [rejection.rule for rejection in rejections] == ["another format"] * 2
