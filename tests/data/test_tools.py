"""Calls, definitions and results as data writes them: one reading for all spellings, and a rule for what cannot be one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lumina_ds.data.conversation import parse_conversation
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.turns import Conversation, ToolCall, Turn

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "Warm?"}
ANSWER = {"role": "assistant", "content": "Yes."}


def parsed(*messages: dict[str, Any], **beside: Any) -> Conversation:
    return parse_conversation(json.dumps({"messages": messages, **beside}).encode())


def calls(*ids: str, **beside: Any) -> dict[str, Any]:
    """An assistant's message that calls `weather` once per id."""
    listed = [{"id": i, "type": "function", "function": {"name": "weather", "arguments": {"n": i}}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": listed, **beside}


def result(content: str, **beside: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **beside}


def test_arguments_are_an_object_or_its_text() -> None:
    spelled = [{"city": "Ülm", "n": 1.0}, '{"city":"Ülm","n":1.0}', ' {"city": "\\u00dclm", "n": 1.0} ']
    for arguments in spelled:
        for call in ({"function": {"name": "f", "arguments": arguments}}, {"name": "f", "arguments": arguments}):
            turns = parsed(ASK, {"role": "assistant", "tool_calls": [call]}).turns
            assert turns[1] == Turn("assistant", "", tool_calls=(ToolCall("f", '{"city": "Ülm", "n": 1.0}'),))
        old = parsed(ASK, {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": arguments}})
        assert old.turns == turns
    nothing = parsed(ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": ""}]})
    assert nothing.turns[1].tool_calls == (ToolCall("f", "{}"),)


def test_sharegpt_and_openai_give_equal_conversations() -> None:
    call = {"name": "weather", "arguments": {"city": "Ulm"}}
    for name, value in (("function_call", call), ("tool_call", [call])):
        shared = {
            "system": "s",
            "tools": json.dumps([WEATHER["function"]]),
            "conversations": [
                {"from": "human", "value": "Warm?"},
                {"from": name, "value": json.dumps(value)},
                {"from": "observation", "value": "21"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        asked = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
        system = {"role": "developer", "content": [{"type": "text", "text": "s"}]}
        wanted = parsed(system, ASK, asked, result("21"), ANSWER, tools=[WEATHER])
        assert parse_conversation(json.dumps(shared).encode()) == wanted
        assert wanted.trained == (False, False, True, False, True) and wanted.tools == (json.dumps(WEATHER),)


def test_definitions_in_every_spelling() -> None:
    spelled: list[dict[str, Any]] = [
        {"tools": [WEATHER]},
        {"tools": json.dumps([WEATHER])},
        {"tools": [json.dumps(WEATHER)]},
        {"tools": [WEATHER["function"]]},
        {"functions": [WEATHER["function"]], "tools": None},
    ]
    assert {parsed(ASK, ANSWER, **each).tools for each in spelled} == {(json.dumps(WEATHER),)}


def test_contents_of_parts_and_roles_of_other_names() -> None:
    parts = [{"type": "text", "text": "Wa"}, {"type": "text", "text": "rm?"}]
    assert parsed({"role": "user", "content": parts}, ANSWER) == parsed(ASK, ANSWER)
    old = parsed(ASK, calls("a"), {"role": "function", "name": "weather", "content": "21"}, ANSWER)
    assert old.turns[2] == Turn("tool", "21", name="weather")
    swapped = {"conversations": [ASK, ANSWER]}
    assert parse_conversation(json.dumps(swapped).encode()) == parsed(ASK, ANSWER)


def test_reasoning_under_every_key() -> None:
    for key in ("reasoning_content", "reasoning", "thinking", "thought"):
        assert parsed(ASK, {**ANSWER, key: "hm"}).turns[1] == Turn("assistant", "Yes.", "hm")
    assert parsed(ASK, {**ANSWER, "reasoning": "hm", "reasoning_content": "hm"}).turns[1].reasoning == "hm"


@pytest.mark.parametrize(
    ("messages", "beside", "rule", "says"),
    [
        ([ASK, calls("a"), result("1", tool_call_id="b")], {}, "dangling tool_call_id", "turn 3 .*'b'"),
        ([ASK, ANSWER, result("1", tool_call_id="b")], {}, "dangling tool_call_id", "turn 3"),
        ([ASK, calls("a"), result("1", name="other")], {}, "result of no call", "turn 3 .*'other'"),
        ([ASK, calls("a"), result("1", tool_call_id="a", name="other")], {}, "result of no call", "'other'"),
        ([ASK, ANSWER, result("1", name="f")], {}, "result of no call", "turn 3"),
        ([ASK, calls("a", "b"), result("1", tool_call_id="b")], {}, "call without result", "call 1 .*before turn 3"),
        ([ASK, calls("a", "a")], {}, "two calls of one id", "message 2"),
        ([ASK, {**calls("a"), "role": "user"}], {}, "tool call on another role", "a user turn"),
        ([{**ASK, "thinking": "hm"}, ANSWER], {}, "reasoning on another role", "a user turn"),
        ([ASK, {**ANSWER, "tool_calls": {"a": 1}}], {}, "tool call", "an? object, not a list"),
        ([ASK, {**ANSWER, "tool_calls": [1]}], {}, "tool call", "call 1 of message 2 is a number"),
        ([ASK, {**ANSWER, "tool_calls": [{"type": "web_search"}]}], {}, "tool call", "no call of a function"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": ""}]}], {}, "tool call", "has no 'name'"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": "f"}]}], {}, "tool call", "has no 'arguments'"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}], {}, "tool call", "invalid JSON"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}], {}, "tool call", "are a list"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {}, "id": 1}]}], {}, "tool call", "'id'"),
        ([ASK, ANSWER], {"tools": [1]}, "tool definition", "entry 1 of 'tools' is a number"),
        ([ASK, ANSWER], {"tools": "x"}, "tool definition", "invalid JSON"),
        ([ASK, ANSWER], {"tools": {"name": "f"}}, "tool definition", "not a list"),
        ([ASK, ANSWER], {"tools": [{"type": "function"}]}, "tool definition", "names no function"),
        ([ASK, ANSWER], {"tools": [WEATHER], "functions": [WEATHER]}, "two lists of tools", "keep one"),
        ([{"role": "user", "content": None}, ANSWER], {}, "wrong type", "is null"),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": []}], {}, "wrong type", "is null"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER], {},
            "unsupported content part", "'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}, ANSWER], {}, "wrong type", "text part"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}, ANSWER], {}, "empty content", "is empty"),
    ],
)  # fmt: skip
def test_refusals(messages: list[Any], beside: dict[str, Any], rule: str, says: str) -> None:
    with pytest.raises(RejectedLine, match=says) as refused:
        parsed(*messages, **beside)
    assert refused.value.rule == rule


def test_results_without_a_call_in_the_data_are_kept_where_they_say_nothing() -> None:
    """Some data spells calls in the text: then a result follows no call that could be looked for."""
    assert parsed(ASK, ANSWER, result("21"), ANSWER).turns[2] == Turn("tool", "21")
    assert parsed(ASK, calls("a"), result(""), result("more"), ANSWER).turns[2:4] == (
        Turn("tool", ""),
        Turn("tool", "more"),
    )
