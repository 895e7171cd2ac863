"""Flags of turns and keys of tools and reasoning: obeyed, or refused by a named rule; never passed over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lumina_ds.data.conversation import Conversation, TrainTurns, Turn, parse_conversation
from lumina_ds.data.strict_json import RejectedLine


def line(*flags: dict[str, Any], **beside: Any) -> bytes:
    """user and assistant turns in alternation, one per argument, with what it adds to the message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": f"text {number}"} | extra for number, extra in enumerate(flags)]
    return json.dumps({"messages": messages, **beside}).encode()


def trained(text: bytes, train_turns: TrainTurns = "all") -> list[int]:
    """Numbers of the trained turns."""
    return [number for number, is_on in enumerate(parse_conversation(text, train_turns).trained) if is_on]


def rule(text: bytes, train_turns: TrainTurns = "all") -> str:
    with pytest.raises(RejectedLine) as refused:
        parse_conversation(text, train_turns)
    return refused.value.rule


@pytest.mark.parametrize(
    "off",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"masked": True}, {"loss_scale": 0}],
)
def test_a_turn_that_a_flag_switches_off_is_context(off: dict[str, Any]) -> None:
    text = line({}, off, {}, {"weight": 1})
    assert trained(text) == [3] == trained(text, "last") == trained(text, "marked")
    assert trained(line({}, {}, {}, off)) == [1]
    assert rule(line({}, off)) == rule(line({}, {}, {}, off), "last") == "no turn to train"
    # beside a user turn, what is not trained anyway may be said
    assert trained(line(off, {})) == [1]


@pytest.mark.parametrize("on", [{"weight": 1}, {"train": True}, {"loss": True}, {"masked": False}, {"loss_scale": 1.0}])
def test_marked_trains_only_what_a_flag_marks(on: dict[str, Any]) -> None:
    text = line({}, on, {}, {})
    assert (trained(text), trained(text, "last"), trained(text, "marked")) == ([1, 3], [3], [1])
    assert rule(line({}, {}), "marked") == "no turn to train"
    assert rule(line(on, {})) == "flag on another role"


def test_sharegpt_turns_have_the_same_flags() -> None:
    talk = [("human", {}), ("gpt", {"weight": 0}), ("human", {"train": False}), ("gpt", {"train": True})]
    text = json.dumps({"conversations": [{"from": who, "value": "x"} | flag for who, flag in talk]}).encode()
    assert trained(text) == [3]


@pytest.mark.parametrize(
    ("flag", "broken"),
    [
        ({"weight": 0.5}, "flag value"),
        ({"weight": 2}, "flag value"),
        ({"weight": True}, "flag value"),
        ({"weight": "0"}, "flag value"),
        ({"loss_scale": -1}, "flag value"),
        ({"train": 0}, "flag value"),
        ({"train": "false"}, "flag value"),
        ({"loss": []}, "flag value"),
        ({"masked": 1}, "flag value"),
        ({"train": True, "weight": 0}, "contradicting flags"),
        ({"masked": True, "loss": True}, "contradicting flags"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "unsupported train_detail"),
        ({"tool_calls": [{"id": "1"}]}, "tool call"),
        ({"function_call": {"name": "f"}}, "tool call"),
        ({"tool_call_id": "1"}, "unsupported tool_call_id"),
        ({"tools": [{}]}, "unsupported tools"),
        ({"name": "Ann"}, "unsupported name"),
        ({"reasoning_content": ["hm"]}, "wrong type"),
        ({"reasoning": "hm", "thinking": "ha"}, "two reasonings"),
        ({"thought": "a</think>b"}, "end of reasoning inside it"),
        ({"tool_calls": [{"name": "f", "arguments": {}}], "function_call": {"name": "f"}}, "two lists of calls"),
        ({"audio": "a.wav"}, "unsupported audio"),
        ({"images": ["a.png"]}, "unsupported images"),
        ({"refusal": "I will not"}, "unsupported refusal"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(flag: dict[str, Any], broken: str) -> None:
    assert rule(line({}, flag)) == broken


@pytest.mark.parametrize(
    "key", ["tool_calls", "function_call", "tool_call_id", "reasoning_content", "thought", "images", "refusal"]
)
def test_what_belongs_to_a_turn_is_refused_beside_the_turns(key: str) -> None:
    assert rule(line({}, {}, **{key: [{"name": "f"}]})) == f"unsupported {key}"


@pytest.mark.parametrize(
    ("flag", "trains", "others"),
    [
        ("weight", [1, 1.0], [0, 0.5, 2, True, "1", [1]]),
        ("loss_scale", [1], [0, -1]),
        ("train", [True], [False, 1, "true"]),
        ("loss", [True], [False, 2.31, 0]),
        ("masked", [False], [True, 0]),
    ],
)
def test_a_flag_beside_the_turns_that_would_train_them_otherwise_is_refused(
    flag: str, trains: list[Any], others: list[Any]
) -> None:
    for value in [*trains, None]:
        assert parse_conversation(line({}, {}, **{flag: value})) == parse_conversation(line({}, {}))
        assert trained(line({}, {flag: trains[0]}, {}, {}, **{flag: value}), "marked") == [1]
    for value in others:
        with pytest.raises(RejectedLine, match="give it to the turns") as refused:
            parse_conversation(line({}, {}, **{flag: value}))
        assert refused.value.rule == f"unsupported {flag}", value


def test_keys_that_hold_nothing_are_no_loss() -> None:
    nothing = {
        "weight": None,
        "train": None,
        "name": None,
        "tool_calls": [],
        "function_call": None,
        "thinking": "",
        "images": [],
        "refusal": False,
    }
    expected = parse_conversation(line({}, {}))
    assert (
        parse_conversation(line(nothing, nothing, tools=[], functions=None, system="", conversations=None)) == expected
    )


def test_system_beside_the_turns_is_the_system_turn() -> None:
    found = parse_conversation(line({}, {}, system="be brief"))
    assert found == Conversation((Turn("system", "be brief"), Turn("user", "text 0"), Turn("assistant", "text 1")))
    assert trained(line({}, {"weight": 0}, {}, {}, system="s")) == [4]
    shared = {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert parse_conversation(json.dumps(shared).encode()).turns[0] == Turn("system", "s")
    assert rule(line({"role": "system"}, {}, system="s")) == "two system prompts"
    assert rule(line({}, {}, system=["s"])) == "wrong type"


def test_of_two_lists_of_turns_one_must_be_empty() -> None:
    other = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert rule(line({}, {}, conversations=other)) == "two conversations"
    for nothing in (None, []):
        assert len(parse_conversation(json.dumps({"messages": nothing, "conversations": other}).encode()).turns) == 2


def test_other_keys_are_named_once_per_place() -> None:
    found = parse_conversation(line({"ts": 1}, {"ts": 2, "weight": 1}, id=7, name="a title"))
    assert sorted(found.other_keys) == ["id", "name", "ts", "ts"]
