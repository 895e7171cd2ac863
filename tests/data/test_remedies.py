"""Every rule that a line can break has a remedy, and the jq programs among them mend such lines of every format."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import lumina_ds.data
from lumina_ds import foreign_files
from lumina_ds.data.conversation import parse_conversation
from lumina_ds.data.formats import FORMATS
from lumina_ds.data.remedies import REMEDIES, remedy
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.turn_keys import CALL_KEYS, FLAGS, KNOWN_KEYS, PART_KEYS

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "name": "f", "arguments": {"weight": 0, "x": 1}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "name": "f", "content": "c"}


def rules() -> set[str]:
    """The first argument of every RejectedLine in the package, and of what it is made of, constants looked up in their file."""
    found = set()
    for path in [Path(foreign_files.__file__), *Path(lumina_ds.data.__file__).parent.rglob("*.py")]:
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _is_refusal(node) and node.args:
                rule = node.args[0]
                if isinstance(rule, ast.Constant):
                    found.add(rule.value)
                elif isinstance(rule, ast.Name) and rule.id in constants:
                    found.add(constants[rule.id])
    return found


def _is_refusal(call: ast.Call) -> bool:
    """RejectedLine(...), or super().__init__(RULE, ...) of a class made of it."""
    of_base = ast.unparse(call.func) == "super().__init__" and call.args and ast.unparse(call.args[0]) == "UNPROVEN"
    return getattr(call.func, "id", "") in ("RejectedLine", "NotStrictJson") or bool(of_base)


def programs(rule: str) -> list[str]:
    return re.findall(r"jq -c '([^']*)'", remedy(rule) or "")


def outcome(line: str) -> str:
    """The rule that the line breaks, or what it trains."""
    try:
        found = parse_conversation(line.encode())
    except RejectedLine as fault:
        return f"rule: {fault.rule}"
    return str((found.turns, found.trained, found.tools))


@cache
def run(program: str, lines: tuple[str, ...]) -> list[list[str]]:
    """What the program makes of each of `lines`; one process for all."""
    jq = shutil.which("jq")
    if jq is None:
        pytest.skip("jq is not installed")
    # Each line is followed by a mark, so that lines which are left out are seen.
    given = "".join(f'{line}\n"mark"\n' for line in lines)
    done = subprocess.run(
        [jq, "-c", f'if . == "mark" then . else ({program}) end'], input=given, capture_output=True, text=True
    )
    assert done.returncode == 0, (program, done.stderr)
    return [part.splitlines() for part in done.stdout.split('"mark"\n')[:-1]]


def shared(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn of OpenAI's as one of ShareGPT's."""
    names = {"role": "from", "content": "value"}
    roles = {"user": "human", "assistant": "gpt", "tool": "observation"}
    renamed = {names.get(key, key): value for key, value in turn.items()}
    return renamed | ({"from": roles.get(turn["role"], turn["role"])} if isinstance(turn.get("role"), str) else {})


def with_turns(turns: list[Any], **beside: Any) -> list[dict[str, Any]]:
    """A line of each format that holds turns."""
    return [
        {"messages": turns, **beside},
        {"conversations": [shared(turn) if isinstance(turn, dict) else turn for turn in turns], **beside},
        {"messages": [shared(turn) if isinstance(turn, dict) else turn for turn in turns], **beside},
        {"prompt": turns[:1], "completion": turns[1:], **beside},
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": [ASSISTANT], **beside},
    ]


def beside(**keys: Any) -> list[dict[str, Any]]:
    """A line of each chat format with keys beside the turns."""
    return [deepcopy(form.example) | keys for form in FORMATS.values() if form.text is None]


def first_with(extra: dict[str, Any]) -> list[dict[str, Any]]:
    return with_turns([USER | extra, ASSISTANT])


def last_with(extra: dict[str, Any]) -> list[dict[str, Any]]:
    return with_turns([USER, ASSISTANT | extra])


TEXT_KEYS = [
    ("alpaca", "output"),
    ("instruction-response", "response"),
    ("prompt-completion", "completion"),
    ("text", "text"),
]
BROKEN: dict[str, list[Any]] = {
    "answer not to be learned": beside(label=False) + beside(kto_tag=0),
    "contradicting flags": last_with({"weight": 1, "train": False}),
    "dangling tool_call_id": with_turns([USER, CALL, {"role": "tool", "tool_call_id": "2", "content": "c"}]),
    "empty content": with_turns([USER, ASSISTANT, {"role": "user", "content": ""}, USER, CALL, RESULT])
    + with_turns([USER, ASSISTANT, {"role": "user", "content": [{"type": "text", "text": ""}]}])
    + [FORMATS[name].example | {key: ""} for name, key in TEXT_KEYS]
    + [{"instruction": "", "output": "x"}, {"prompt": "", "completion": "x"}],
    "empty conversation": [{"messages": []}, {"conversations": []}],
    "end of reasoning inside it": last_with({"thinking": "a</think>b"}),
    "flag on another role": first_with({"weight": 1}),
    "flag value": last_with({"loss_scale": 0.5}),
    "missing key": [{"dialog": [USER, ASSISTANT]}, *with_turns([USER, ASSISTANT, {"role": "user"}])],
    "no assistant turn": [*with_turns([USER, USER])[:3], {"prompt": {"role": "prompter", "text": "a"}}],
    "not an object": [[{"messages": [USER, ASSISTANT]}]],
    "reasoning on another role": first_with({"reasoning_content": "hm"}),
    "result of no call": with_turns([USER, CALL, {"role": "tool", "name": "g", "content": "c"}]),
    "two conversations": [{"messages": [USER, ASSISTANT], "conversations": [shared(USER), shared(ASSISTANT)]}],
    "two contents": [{"messages": [USER, ASSISTANT | {"value": "x"}]}, {"conversations": [shared(USER), shared(ASSISTANT) | {"content": "x"}]}],
    "two inputs": [{"instruction": "a", "input": "b", "context": "c", "response": "d"}],
    "two lists of calls": [*with_turns([USER, CALL | {"function_call": {"name": "f", "arguments": "{}"}}]),
        {"conversations": [shared(USER), {"from": "function_call", "value": '{"name": "f", "arguments": {}}', "tool_calls": [1]}]}],
    "two lists of tools": beside(tools=[{"name": "f"}], functions=[{"name": "f"}]),
    "two reasonings": last_with({"reasoning": "a", "thought": "b"}) + last_with({"reasoning_content": "a", "reasoning": "b"}),
    "two roles": [{"messages": [USER, ASSISTANT | {"from": "human"}]}, {"conversations": [shared(USER) | {"role": "assistant"}, shared(ASSISTANT)]}],
    "two system prompts": with_turns([{"role": "system", "content": "s"}, USER, ASSISTANT], system="t"),
    "unknown role": [*with_turns([{"role": "OLD", "content": "a"}, ASSISTANT]),
        {"prompt": {"role": "OLD", "text": "a", "replies": [{"role": "assistant", "text": "b"}]}}],
    "unsupported content part": with_turns([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ASSISTANT]),
    "wrong type": [{"messages": json.dumps([USER, ASSISTANT])}, {"conversations": json.dumps([shared(USER), shared(ASSISTANT)])},
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}] + with_turns([{"role": "user", "content": 5}, {"role": "assistant", "content": {"a": 1}}])
    + with_turns([USER, ASSISTANT, {"role": "assistant", "content": None}, CALL | {"content": None}])
    + [FORMATS[name].example | {key: value} for name, key in TEXT_KEYS for value in (7, None)],
    # A flag of KNOWN_KEYS in each place where it is refused.
    **{f"unsupported {key} of a part": with_turns([{"role": "user", "content": [{"type": "text", "text": "a", key: "x"}]}, ASSISTANT])
       for key in sorted(PART_KEYS)},
    **{f"unsupported {key} of a call": with_turns([USER, CALL | {"tool_calls": [{"name": "f", "arguments": {key: 1}, key: "x"}]}])
       + with_turns([USER, CALL | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}", key: "x"}}]}])
       + [{"conversations": [shared(USER), {"from": "function_call", "value": json.dumps([{"name": "f", "arguments": {key: 1}, key: "x"}])}]}]
       + last_with({"function_call": {"name": "f", "arguments": "{}", key: "x"}})
       for key in sorted(CALL_KEYS)},
}  # fmt: skip


def _of_known_keys() -> Iterator[tuple[str, list[Any]]]:
    # A list of definitions where definitions are meant, and true where a reader may take it for a flag.
    values = {"tools": [{"name": "f"}], "functions": [{"name": "f"}], "available_tools": [{"name": "f"}], "mask": True}
    for key, known in KNOWN_KEYS.items():
        value = values.get(key, "x")
        lines: list[Any] = []
        if known.at_a_turn == "refused" or key in ("name", "tool_call_id"):
            lines += first_with({key: value})
        if key == "channel":
            lines += with_turns([USER, ASSISTANT | {key: "analysis"}, ASSISTANT])
        if known.beside == "refused" and key not in FLAGS:
            lines += [
                line
                for line in beside(**{key: value})
                if not (key in line and key in FORMATS["alpaca"].keys and "output" in line)
            ]
        if key in FLAGS or key in ("label", "kto_tag"):
            lines += beside(**{key: "x"})
        if key in ("system", "system_prompt", "system_message", "tools", "functions"):
            lines.append(FORMATS["text"].example | {key: value})
        if key == "instruction":
            lines = with_turns([USER, ASSISTANT], instruction="x")
        if lines:
            yield f"unsupported {key}", lines


BROKEN.update(_of_known_keys())


def test_every_rule_has_a_remedy_and_every_remedy_a_rule() -> None:
    # A prompt of generation is read by rules of its own.
    assert rules() - REMEDIES.keys() == {"plain text", "unsupported channel", "unsupported instruction"}
    assert len(rules()) > 30 and REMEDIES.keys() - rules() == set()
    assert all(remedy(f"unsupported {key}") for key, known in KNOWN_KEYS.items() if "refused" in known)


def test_every_jq_program_belongs_to_a_rule_that_is_tried_here() -> None:
    # A file of another kind, a template, and duplicates that jq reads as its last.
    elsewhere = {"invalid JSON", "mask not proven", "duplicate key"}
    assert {rule for rule in REMEDIES if programs(rule)} - elsewhere == REMEDIES.keys() & BROKEN.keys()


@pytest.mark.parametrize("rule", sorted(BROKEN))
def test_a_broken_line_of_each_format_is_mended(rule: str) -> None:
    lines = tuple(json.dumps(line) for line in BROKEN[rule])
    assert {outcome(line) for line in lines} == {f"rule: {rule}"}, [
        line for line in lines if outcome(line) != f"rule: {rule}"
    ]
    made = [run(program, lines) for program in programs(rule)]
    assert made
    for number, line in enumerate(lines):
        after = [results[number] for results in made]
        assert any(not any(outcome(one).startswith("rule") for one in lines) for lines in after), (line, after)


def test_no_program_changes_a_good_line() -> None:
    flags = with_turns([USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT, CALL, RESULT], tools=[{"name": "f"}])
    lines = tuple(json.dumps(line) for line in [*(form.example for form in FORMATS.values()), *flags])
    # These remove what is refused only sometimes, and say so.
    removing = {"contradicting flags", "flag value", "dangling tool_call_id", "result of no call", "duplicate key"}
    assert not any(outcome(line).startswith("rule") for line in lines)
    for rule in sorted(set(BROKEN) | REMEDIES.keys() - removing):
        if rule in removing:
            continue
        for program in programs(rule):
            if program == ".[]":
                continue
            for line, made in zip(lines, run(program, lines), strict=True):
                assert [outcome(one) for one in made] == [outcome(line)], (rule, program, line)
