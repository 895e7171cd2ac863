"""What mends a refused line, by the rule that it breaks: an option, or a jq program over the JSONL file.

The programs read lines of every format: turns stand under different keys, and lines that break no rule come out as they
went in. A test runs each on broken lines of all formats.
"""

from __future__ import annotations

from collections.abc import Iterable

from lumina_ds.data.turn_keys import DEFINITION_KEYS, FLAGS, KNOWN_KEYS, REASONING_KEYS, SYSTEM_KEYS


def _say(text: str, *programs: str) -> str:
    """The text with a command of jq in place of each {}."""
    return text.format(*(f"jq -c '{program}'" for program in programs))


def _without(keys: Iterable[str], turns: str) -> str:
    """The program that removes keys of turns."""
    return f"del({turns} | ({', '.join(f'.{key}' for key in keys)}))"


_LISTS = "((.messages, .conversations, .prompt, .completion, .chosen) | arrays)"
_TURNS = f"{_LISTS}[] | objects"
_ROLE = "(.role // .from)"
_CALLING = f'({_ROLE} | IN("function_call", "tool_call"))'
_ASSISTANTS = f'{_TURNS} | select({_ROLE} | IN("assistant", "ai", "bot", "gpt", "function_call", "tool_call"))'
_OTHERS = f'{_TURNS} | select({_ROLE} | IN("assistant", "ai", "bot", "gpt", "function_call", "tool_call") | not)'
_IS_RESULT = f'({_ROLE} | IN("tool", "function", "observation"))'
_CONTENTS = "(.content, .value)"
_NO_FLAGS = _without(sorted(FLAGS), _TURNS)
_NO_EMPTY_TURNS = (
    f'{_LISTS} |= map(select(type != "object" or .tool_calls or .function_call or {_IS_RESULT} or ((.content // .value // "") '
    '| if type == "array" then (map(.text? // "") | add // "") else . end) != ""))'
)
_NO_EMPTY_FIELDS = (
    'select(([to_entries[] | select(.key | IN("output", "response", "completion", "text", "chosen", "rejected")) | .value] '
    '| all(. != null and . != "")) and (has("instruction") and ([.instruction, .input] | all(. == null or . == "")) | not) '
    'and (has("completion") and .prompt == "" | not))'
)
_ONE_FORM = (
    '((.messages, .prompt, .completion, .chosen) | arrays)[] |= if has("role") then del(.from, .value) else . end '
    '| (.conversations | arrays)[] |= if has("from") then del(.role, .content) else . end'
)
_ONE_REASONING = (
    f"({_TURNS}) |= if .reasoning_content then del(.reasoning, .thinking, .thought) "
    "elif .reasoning then del(.thinking, .thought) elif .thinking then del(.thought) else . end"
)
_ONE_LIST_OF_CALLS = (
    f"({_TURNS}) |= if {_CALLING} then del(.tool_calls, .function_call) "
    "elif .tool_calls then del(.function_call) else . end"
)
_NO_THINK_END = f'({_TURNS} | ({", ".join(f".{key}" for key in REASONING_KEYS)}) | strings) |= gsub("</think>"; "")'
_STRIPPED = f'({_ASSISTANTS} | {_CONTENTS} | strings) |= sub("^\\\\s+"; "")'
_WITH_ASSISTANT = (
    'select([.. | objects | .role?, .from? | strings] | . == [] or any(IN("assistant", "ai", "bot", "gpt")))'
)
_RENAMED = (
    '(.. | objects | select(.role? == "OLD")).role = "user" | (.. | objects | select(.from? == "OLD")).from = "user"'
)
_TEXT_PARTS = (
    f"({_TURNS} | {_CONTENTS} | arrays) |= "
    'map(select(type == "object" and (.type | IN("text", "input_text", "output_text"))))'
)
_AS_LISTS = (
    "((.messages, .conversations) | strings) |= fromjson | ((.messages, .conversations) | objects) |= "
    "(to_entries as $columns | [range($columns[0].value | length) as $n "
    "| $columns | map({key, value: .value[$n]}) | from_entries])"
)
_AS_TEXT = (
    f"({_TURNS} | {_CONTENTS} | (numbers, booleans, objects)) |= tostring | "
    "((.instruction, .input, .output, .response, .completion, .text, .system) | (numbers, booleans)) |= tostring"
)
_CONVERT = (
    "convert the file to UTF-8 without a byte order mark (iconv -f UTF-16 -t UTF-8, or sed '1s/^\\xEF\\xBB\\xBF//')"
)
REMEDIES: dict[str, str] = {
    "answer not to be learned": _say(
        "leave such lines out ({})", "select([.label, .kto_tag] | all(. != false and . != 0))"
    ),
    "another format": "give --format another name, or leave it out",
    "byte order mark": _CONVERT,
    "call without result": "give the calls in the order of their results, or remove the unanswered ones",
    "contradicting flags": _say("keep one flag of each turn; without any all turns are trained ({})", _NO_FLAGS),
    "dangling tool_call_id": _say("correct the id, or let the order tell ({})", _without(["tool_call_id"], _TURNS)),
    "duplicate key": "write every key once; jq -c . keeps the last one",
    "empty content": _say(
        "remove empty turns ({}), or leave lines with an empty text out ({})", _NO_EMPTY_TURNS, _NO_EMPTY_FIELDS
    ),
    "empty conversation": _say("remove such lines ({})", "select([.messages, .conversations, .chosen] | all(. != []))"),
    "end of reasoning inside it": _say("{}", _NO_THINK_END),
    "flag on another role": _say("{}", _without(sorted(FLAGS), _OTHERS)),
    "flag value": _say("correct the flag; without any all turns are trained ({})", _NO_FLAGS),
    "invalid JSON": "write one JSON object a line (jq -c . FILE, or jq -c '.[]' FILE for a JSON array)",
    "invalid UTF-8": "convert the file (iconv -f LATIN1 -t UTF-8)",
    "line too long": "split the conversation into several lines",
    "lone surrogate": "write the file anew with a tool that replaces broken characters",
    "mask not proven": _say(
        "remove white space at the beginning of replies ({}), or what the template does not show; lumina template check "
        "shows it",
        _STRIPPED,
    ),
    "missing key": _say(
        "name the keys as `lumina data formats` shows ({}), or remove turns without a text ({})",
        "if .dialog then {messages: .dialog} else . end",
        _NO_EMPTY_TURNS,
    ),
    "nested too deeply": "remove the deep value, which means nothing here",
    "no assistant turn": _say("remove such lines ({})", _WITH_ASSISTANT),
    "no turn to train": "leave the line out, change its flags, or choose another --train-turns or --train-reasoning",
    "not an object": _say("write one JSON object a line ({})", 'if type == "array" then .[] else . end'),
    "number out of range": "write the number as text, or remove it",
    "preference without a prompt": "give the prompt beside chosen, or chosen as a list of messages",
    "reasoning on another role": _say("{}", _without(REASONING_KEYS, _OTHERS)),
    "refused by the template": "mend what the reason names, or choose another --chat-template",
    "result of no call": _say(
        "correct the name, or let the order tell ({})", _without(["name"], f"{_TURNS} | select({_IS_RESULT})")
    ),
    "tool call": 'write {"name": NAME, "arguments": OBJECT} into tool_calls',
    "tool call on another role": "give the calls to an assistant's turn",
    "tool definition": 'write {"type": "function", "function": {"name": NAME, "parameters": SCHEMA}} into tools',
    "two calls of one id": "give every call an id of its own, or none",
    "two conversations": _say(
        "choose one with --format messages or --format sharegpt, or {}",
        "if .messages then del(.conversations) else . end",
    ),
    "two contents": _say("keep one key ({})", _ONE_FORM),
    "two formats": "choose one with --format NAME",
    "two inputs": _say("keep one ({})", "if .input then del(.context) else . end"),
    "two lists of calls": _say("{}", _ONE_LIST_OF_CALLS),
    "two lists of tools": _say("{}", "if .tools then del(.functions) else . end"),
    "two reasonings": _say("keep one key ({})", _ONE_REASONING),
    "two roles": _say("keep one key ({})", _ONE_FORM),
    "two system prompts": _say(
        "keep the one among the turns ({}), or the first beside them ({})",
        f'if [{_TURNS} | select({_ROLE} | IN("system", "developer"))] == [] then . else del({", ".join(f".{key}" for key in SYSTEM_KEYS)}) end',
        "if .system then del(.system_prompt, .system_message) elif .system_prompt then del(.system_message) else . end",
    ),
    "unknown role": _say("rename it ({})", _RENAMED),
    "unreadable row": "mend the row, or write the table anew",
    "unsupported content part": _say("keep the text ({})", _TEXT_PARTS),
    "wrong type": _say(
        "read turns that stand as JSON text or as an object of columns ({}), write the content as text ({}), and remove "
        "turns that have null ({}), or such lines ({})",
        _AS_LISTS,
        _AS_TEXT,
        _NO_EMPTY_TURNS,
        _NO_EMPTY_FIELDS,
    ),
}

# Of keys that are refused: what mends more than removing them does.
_NOT_A_RESULT = f"{_TURNS} | select({_IS_RESULT} | not)"
_OF_A_KEY: dict[str, str] = {
    "available_tools": _say(
        "call it tools, beside the turns ({})",
        f"[(., ({_TURNS})) | .available_tools | arrays[]] as $found | if $found == [] then . else "
        f"del(.available_tools, ({_TURNS} | .available_tools)) | .tools = $found end",
    ),
    "channel": _say(
        "write analysis into reasoning_content, or remove such turns ({})",
        f'del({_TURNS} | select(.channel and .channel != "final"))',
    ),
    "chat_template": _say("give it as --chat-template FILE.jinja, and remove it ({})", "del(.chat_template)"),
    "instruction": _say(
        "write it into the turns or under system, or remove it ({})",
        f"if [{_TURNS}] == [] then . else del(.instruction) end",
    ),
    "mask": _say(
        "say masked where true means no label ({}), or train where true means one",
        f'({_TURNS} | select(has("mask"))) |= (.masked = .mask | del(.mask)) | del(.mask)',
    ),
    "name": _say("write a speaker's name into the content, or remove it ({})", _without(["name"], _NOT_A_RESULT)),
    "refusal": _say("write it into the content, or remove it ({})", f"del(.refusal, ({_TURNS} | .refusal))"),
    "tool_call_id": _say(
        "remove it where it belongs to no result ({})", f"del(.tool_call_id, ({_NOT_A_RESULT} | .tool_call_id))"
    ),
    "train_detail": _say(
        "split the turn, or use train for all of it; without it the whole turn is trained ({})",
        f"del(.train_detail, ({_TURNS} | .train_detail))",
    ),
}


def remedy(rule: str) -> str | None:
    """What mends lines that break `rule`; None where nobody knows."""
    if rule in REMEDIES or not rule.startswith("unsupported "):
        return REMEDIES.get(rule)
    name, _, place = rule.removeprefix("unsupported ").partition(" of a ")
    if place == "part":
        return _say(
            "split the turn, or remove it ({})", _without([name], f"{_TURNS} | {_CONTENTS} | arrays[] | objects")
        )
    if place == "call":
        return _say("give it to the turn, or remove it ({})", _without_in_calls(name))
    if name in DEFINITION_KEYS:
        return _say(
            "move it beside the turns ({}), or remove it beside a text ({})",
            _moved_beside(name),
            _without_beside_a_text(name),
        )
    if name in SYSTEM_KEYS:
        return _say("remove it beside a text ({})", _without_beside_a_text(name))
    if name in FLAGS:
        return _say("give it to the turns that it is meant for, leave the line out, or remove it ({})", f"del(.{name})")
    if name in _OF_A_KEY:
        return _OF_A_KEY[name]
    if KNOWN_KEYS[name].at_a_turn == "obeyed":
        return _say("move it to the turn that it belongs to, or remove it ({})", f"del(.{name})")
    return _say("leave such lines out, or remove it ({})", f"del(.{name}, ({_TURNS} | .{name}))")


def _moved_beside(name: str) -> str:
    return (
        f"[{_TURNS} | .{name} | arrays[]] as $found | if $found == [] then . else "
        f"del({_TURNS} | .{name}) | .tools = $found end"
    )


def _without_beside_a_text(name: str) -> str:
    return f"if .text and [{_TURNS}] == [] then del(.{name}) else . end"


def _without_in_calls(name: str) -> str:
    """Calls stand as objects, or as the JSON text of a turn of ShareGPT's."""
    in_call = f"del(.{name}, (.function | objects | .{name}))"
    return (
        f"({_TURNS} | ((.tool_calls | arrays[]), .function_call) | objects) |= {in_call} | "
        f"({_TURNS} | select({_CALLING}) | {_CONTENTS} | strings) |= "
        f'(fromjson | if type == "array" then map({in_call}) else {in_call} end | tojson)'
    )
