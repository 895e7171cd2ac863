"""Tools of a conversation: definitions, calls, and which call a result answers.

Arguments are written as an object or as its JSON text; both are one canonical text here. A result that answers no
call is refused: templates say by order which call a result belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from lumina_ds.data.strict_json import RejectedLine, a_type, parse_json
from lumina_ds.data.turn_keys import CALL_KEYS, EMPTY, check_inside
from lumina_ds.data.turns import ToolCall, Turn, canonical_json
from lumina_ds.foreign_files import shorten

DANGLING = "dangling tool_call_id"
UNMATCHED = "result of no call"
MISSING = "call without result"
_CALL = "tool call"
_DEFINITION = "tool definition"


def read_tools(document: dict[str, Any]) -> tuple[str, ...]:
    """The definitions under `tools` or `functions`, each as canonical JSON text. Raises RejectedLine.

    They are kept as given; one without OpenAI's wrapping gets it, {"type": "function", "function": ...}.
    """
    found = [key for key in ("tools", "functions") if document.get(key) not in EMPTY]
    if len(found) > 1:
        raise RejectedLine("two lists of tools", "both 'tools' and 'functions' hold definitions; keep one of them")
    if not found:
        return ()
    (key,) = found
    listed = _parsed(document[key], f"'{key}'", _DEFINITION)
    if not isinstance(listed, list):
        raise RejectedLine(_DEFINITION, f"'{key}' is {a_type(listed)}, not a list")
    return tuple(
        _definition(_parsed(entry, f"entry {n} of '{key}'", _DEFINITION), n, key) for n, entry in enumerate(listed, 1)
    )


def read_calls(value: Any, key: str, number: int) -> tuple[ToolCall, ...]:
    """The calls under `tool_calls` or `function_call` of message `number`. Raises RejectedLine."""
    entries = [value] if key == "function_call" else value
    if not isinstance(entries, list):
        raise RejectedLine(_CALL, f"'{key}' of message {number} is {a_type(value)}, not a list")
    calls = tuple(_call(entry, f"call {n} of message {number}") for n, entry in enumerate(entries, 1))
    ids = [call.id for call in calls if call.id]
    if len(ids) > len(set(ids)):
        raise RejectedLine("two calls of one id", f"message {number} has two calls with the same 'id'")
    return calls


def read_call_text(text: str, number: int) -> tuple[ToolCall, ...]:
    """The calls of a ShareGPT turn `function_call`: the JSON text of one, or of a list of them."""
    value = _parsed(text, f"the call of message {number}", _CALL)
    if value in EMPTY:
        raise RejectedLine(_CALL, f"message {number} calls nothing")
    return read_calls(value if isinstance(value, list) else [value], "value", number)


def results_in_order(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """`turns` with the results of each run of tool turns in the order of their calls.

    A result is matched by its id, else by its name, else by its place. One that says nothing and follows no open call
    stays where it is, as in data that spells calls in the text. Raises RejectedLine where ids or names match no open
    call, and where a call is passed over.
    """
    ordered: list[Turn] = []
    open_calls: tuple[ToolCall, ...] = ()
    while len(ordered) < len(turns):
        turn = turns[len(ordered)]
        if turn.role != "tool":
            open_calls = turn.tool_calls or open_calls
            ordered.append(turn)
            continue
        run = list(takewhile(lambda each: each.role == "tool", turns[len(ordered) :]))
        places = _places(run, open_calls, len(ordered) + 1)
        ordered += [run[n] for n in sorted(range(len(run)), key=lambda n: (places[n] is None, places[n] or 0))]
        open_calls = open_calls[sum(place is not None for place in places) :]
    return tuple(ordered)


def _places(run: Sequence[Turn], calls: Sequence[ToolCall], first_number: int) -> list[int | None]:
    """Which open call each result answers, None for one that says nothing where no call is open."""
    places: list[int | None] = [None] * len(run)
    has_ids = any(call.id for call in calls)
    left = list(range(len(calls)))
    for n in sorted(range(len(run)), key=lambda n: not (has_ids and run[n].tool_call_id)):
        turn, where = run[n], f"turn {first_number + n}"
        if turn.tool_call_id and (has_ids or not left):
            matching = [place for place in left if calls[place].id == turn.tool_call_id]
            if not matching:
                raise RejectedLine(
                    DANGLING,
                    f"{where} has the tool_call_id {shorten(turn.tool_call_id)}, which no open call before it has",
                )
        else:
            matching = [place for place in left if turn.name in ("", calls[place].name)]
        if matching and turn.name not in ("", calls[matching[0]].name):
            matching = []
        if not matching and turn.name:
            raise RejectedLine(
                UNMATCHED, f"{where} is a result of {shorten(turn.name)}, which no open call before it names"
            )
        if matching:
            places[n] = matching[0]
            left.remove(matching[0])
    if left and len(calls) - len(left) > left[0]:
        raise RejectedLine(
            MISSING,
            f"call {left[0] + 1} ({shorten(calls[left[0]].name)}) before turn {first_number} has no result, and a later one has",
        )
    return places


def _definition(entry: Any, place: int, key: str) -> str:
    if not isinstance(entry, dict):
        raise RejectedLine(_DEFINITION, f"entry {place} of '{key}' is {a_type(entry)}, not an object")
    function = entry.get("function", entry)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RejectedLine(_DEFINITION, f"entry {place} of '{key}' names no function")
    return canonical_json(entry if "function" in entry else {"type": "function", "function": entry})


def _call(entry: Any, where: str) -> ToolCall:
    if not isinstance(entry, dict):
        raise RejectedLine(_CALL, f"{where} is {a_type(entry)}, not an object")
    function = entry.get("function", entry)
    if entry.get("type", "function") != "function" or not isinstance(function, dict):
        raise RejectedLine(_CALL, f"{where} is no call of a function")
    check_inside(entry, CALL_KEYS, "call", where)
    check_inside(function, CALL_KEYS, "call", where)
    name, call_id = function.get("name"), entry.get("id")
    if not isinstance(name, str) or not name:
        raise RejectedLine(_CALL, f"{where} has no 'name'")
    if call_id is not None and not isinstance(call_id, str):
        raise RejectedLine(_CALL, f"'id' of {where} is {a_type(call_id)}, not a string")
    if "arguments" not in function:
        raise RejectedLine(_CALL, f"{where} has no 'arguments'")
    arguments = function["arguments"]
    value = {} if arguments in (None, "") else _parsed(arguments, f"'arguments' of {where}", _CALL)
    if not isinstance(value, dict):
        raise RejectedLine(_CALL, f"'arguments' of {where} are {a_type(value)}, not an object")
    return ToolCall(name, canonical_json(value), call_id or "")


def _parsed(value: Any, what: str, rule: str) -> Any:
    """`value`, or what it spells where it is the JSON text of something."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except RejectedLine as fault:
        raise RejectedLine(rule, f"{what}: {fault.reason}") from None
