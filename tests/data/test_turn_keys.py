"""Flags of turns and keys of tools and reasoning: obeyed, or refused by a named rule; never passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.data.conversation import Conversation, TrainTurns, Turn, parse_conversation
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.turn_keys import FLAGS, KNOWN_KEYS, NOT_TRAINED_FLAGS, NUMBER_FLAGS


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
        with pytest.raises(RejectedLine, match="so not all is to be trained") as refused:
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


def test_every_flag_of_the_table_is_obeyed() -> None:
    for flag in FLAGS:
        off, on = (0, 1) if flag in NUMBER_FLAGS else (flag in NOT_TRAINED_FLAGS, flag not in NOT_TRAINED_FLAGS)
        text = line({}, {flag: off}, {}, {flag: on}, {}, {})
        assert (trained(text), trained(text, "marked")) == ([3, 5], [3]), flag
    assert {"weight", "loss_weight", "train_on_turn", "trainable", "is_masked", "loss_mask"} < FLAGS


def test_every_refused_key_of_the_table_is_refused_where_it_stands() -> None:
    for key, known in KNOWN_KEYS.items():
        for value in ("?!", *([False, 0] if known.false_speaks else [])):
            if known.at_a_turn == "refused":
                assert rule(line({key: value}, {})) == rule(line({}, {key: value})) == f"unsupported {key}", key
            if known.beside == "refused":
                assert rule(line({}, {}, **{key: value})) == f"unsupported {key}", key
        for nothing in (None, "") if "system" in key else (None, "", [], {}):
            assert parse_conversation(line({}, {}, **{key: nothing})) == parse_conversation(line({}, {})) or (
                known.beside == "unknown"
            )


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_an_answer_that_is_judged_bad_is_refused_in_every_chat_format(key: str) -> None:
    for good in (True, 1, 1.0, None):
        assert trained(line({}, {}, **{key: good})) == [1]
    for bad in (False, 0, 0.0):
        assert rule(line({}, {}, **{key: bad})) == "answer not to be learned"
        assert rule(json.dumps({"instruction": "i", "output": "o", key: bad}).encode()) == "answer not to be learned"
        # beside a text it is a class
        assert parse_conversation(json.dumps({"text": "t", key: bad}).encode()).other_keys == (key,)
    assert rule(line({}, {}, **{key: 2})) == rule(line({}, {}, **{key: "good"})) == f"unsupported {key}"


@pytest.mark.parametrize("key", ["system_prompt", "system_message"])
def test_other_names_of_the_system_prompt(key: str) -> None:
    assert parse_conversation(line({}, {}, **{key: "s"})).turns[0] == Turn("system", "s")
    assert parse_conversation(line({}, {}, system="s", **{key: "s"})).turns[0] == Turn("system", "s")
    assert len(parse_conversation(line({"role": "system", "content": "s"}, {}, **{key: "s"})).turns) == 2
    assert rule(line({}, {}, system="t", **{key: "s"})) == "two system prompts"
    assert rule(line({}, {}, **{key: 5})) == "wrong type"


def test_an_instruction_beside_turns_may_be_a_copy_of_them() -> None:
    assert parse_conversation(line({}, {}, instruction="text 0")).other_keys == ()
    assert rule(line({}, {}, instruction="Be brief.")) == "unsupported instruction"
    assert parse_conversation(json.dumps({"text": "t", "instruction": "i"}).encode()).other_keys == ("instruction",)


def test_rejected_sides_beside_turns_are_left_out_and_said() -> None:
    for key in ("rejected_messages", "rejected_response"):
        found = parse_conversation(line({}, {}, **{key: "bad"}))
        assert found.notes == (("rejected sides of preferences: left out, the chosen one is trained", 1),)
        assert parse_conversation(line({}, {}, **{key: None})).notes == ()


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"masked": True}, {"mask": 1}, {"thinking": "hm"}, {"tool_call_id": "2"}]
)
def test_a_call_has_no_flag_of_its_own(flag: dict[str, Any]) -> None:
    (key,) = flag
    plain = {"name": "f", "arguments": {key: 0}}
    for calls in ([plain | flag], [{"type": "function", "function": plain | flag}], [{"function": plain} | flag]):
        assert rule(line({}, {"tool_calls": calls})) == f"unsupported {key} of a call"
    assert rule(line({}, {"function_call": plain | flag})) == f"unsupported {key} of a call"
    shared = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(plain | flag)}]
    assert rule(json.dumps({"conversations": shared}).encode()) == f"unsupported {key} of a call"


def test_what_a_call_may_say_and_what_of_it_is_counted() -> None:
    call = {
        "name": "f",
        "arguments": {"weight": 0},
        "index": 0,
        "weight": 1,
        "train": True,
        "masked": False,
        "thinking": "",
    }
    assert trained(line({}, {"tool_calls": [call]})) == [1]
    assert parse_conversation(line({}, {"tool_calls": [call | {"note": 1}]})).other_keys == ("note",)


def test_gpt_oss_channels() -> None:
    assert trained(line({}, {"channel": "final"})) == [1]
    assert rule(line({}, {"channel": "analysis"})) == "unsupported channel"


def test_the_page_names_every_key_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert [key for key in KNOWN_KEYS if f"`{key}`" not in page] == []
