"""What mends a refused line, by the rule that it breaks: an option, or a jq program over the JSONL file.

Programs are for lists of `messages`; for ShareGPT's the keys are conversations, from and value.
"""

from __future__ import annotations

_CONVERT = (
    "convert the file to UTF-8 without a byte order mark (iconv -f UTF-16 -t UTF-8, or sed '1s/^\\xEF\\xBB\\xBF//')"
)
_WITH_CONTENT = "jq -c '.messages |= map(select(.content != \"\" and .content != null))'"
_NO_FLAG = "remove the flag (jq -c 'del(.messages[].weight)'), or correct it"
_CALLS = 'write {"name": NAME, "arguments": OBJECT} into tool_calls'
REMEDIES: dict[str, str] = {
    "answer not to be learned": "leave such lines out (jq -c 'select(.label != false)')",
    "another format": "give --format another name, or leave it out",
    "byte order mark": _CONVERT,
    "call without result": "give the calls in the order of their results, or remove the unanswered ones",
    "contradicting flags": "keep one flag of the turn (jq -c 'del(.messages[].weight)')",
    "dangling tool_call_id": "correct the id, or let the order tell (jq -c 'del(.messages[].tool_call_id)')",
    "duplicate key": "write every key once; jq -c . keeps the last one",
    "empty content": f"remove empty turns ({_WITH_CONTENT})",
    "empty conversation": "remove such lines (jq -c 'select((.messages | length) > 0)')",
    "end of reasoning inside it": 'jq -c \'.messages[].reasoning_content |= (. // "" | gsub("</think>"; ""))\'',
    "flag on another role": "jq -c '(.messages[] | select(.role != \"assistant\")) |= del(.weight, .train, .loss)'",
    "flag value": _NO_FLAG,
    "invalid JSON": "write one JSON object a line (jq -c . FILE, or jq -c '.[]' FILE for a JSON array)",
    "invalid UTF-8": "convert the file (iconv -f LATIN1 -t UTF-8)",
    "line too long": "split the conversation into several lines",
    "lone surrogate": "write the file anew with a tool that replaces broken characters",
    "mask not proven": "remove white space at the beginning of replies (jq -c '(.messages[] | select(.role == "
    '"assistant")).content |= sub("^\\\\s+"; "")\'), or what the template does not show; lumina template check shows it',
    "missing key": "name the keys as `lumina data formats` shows (jq -c '{messages: .dialog}')",
    "nested too deeply": "remove the deep value, which means nothing here",
    "no assistant turn": "remove such lines (jq -c 'select(any(.messages[]; .role == \"assistant\"))')",
    "no turn to train": "leave the line out, change its flags, or choose another --train-turns or --train-reasoning",
    "not an object": "write one JSON object a line (jq -c '.[]' for lists)",
    "number out of range": "write the number as text, or remove it",
    "preference without a prompt": "give the prompt beside chosen, or chosen as a list of messages",
    "reasoning on another role": "jq -c '(.messages[] | select(.role != \"assistant\")) |= del(.reasoning_content)'",
    "refused by the template": "mend what the reason names, or choose another --chat-template",
    "result of no call": "correct the name, or let the order tell (jq -c 'del(.messages[].name)')",
    "tool call": _CALLS,
    "tool call on another role": "give the calls to an assistant's turn",
    "tool definition": 'write {"type": "function", "function": {"name": NAME, "parameters": SCHEMA}} into tools',
    "two calls of one id": "give every call an id of its own, or none",
    "two conversations": "choose one with --format messages or --format sharegpt, or jq -c 'del(.conversations)'",
    "two contents": "keep one key (jq -c 'del(.messages[].value)')",
    "two formats": "choose one with --format NAME",
    "two inputs": "keep one (jq -c 'del(.context)')",
    "two lists of calls": "jq -c 'del(.messages[].function_call)'",
    "two lists of tools": "jq -c 'del(.functions)'",
    "two reasonings": "keep one key (jq -c 'del(.messages[].thinking)')",
    "two roles": "keep one key (jq -c 'del(.messages[].from)')",
    "two system prompts": "keep one (jq -c 'del(.system)')",
    "unknown role": 'rename it (jq -c \'(.messages[] | select(.role == "OLD")).role = "user"\')',
    "unreadable row": "mend the row, or write the table anew",
    "unsupported content part": "keep the text (jq -c '.messages[].content |= (arrays |= map(select(.type == \"text\")))')",
    "wrong type": "write the content as text (jq -c '.messages[].content |= tostring')",
}


def remedy(rule: str) -> str | None:
    """What mends lines that break `rule`; None where the reason of the refusal says it."""
    return REMEDIES.get(rule)
