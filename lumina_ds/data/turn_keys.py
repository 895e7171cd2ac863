"""Keys with a meaning elsewhere: flags that say which turns are trained, and what this version cannot train.

Trainers and dialects write `weight` (OpenAI), `train` and `train_detail` (axolotl), `loss` and `loss_scale` (ms-swift)
and `masked`; tools and reasoning have keys of their own. A key of these is obeyed or refused by rule, never passed
over: passing over it would train other targets than the data says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lumina_ds.data.strict_json import RejectedLine, json_type, shorten

NUMBER_FLAGS = frozenset({"weight", "loss_scale"})
BOOLEAN_FLAGS = frozenset({"train", "loss", "masked"})
FLAGS = NUMBER_FLAGS | BOOLEAN_FLAGS
# Refused at a turn and beside the turns, unless they hold nothing. The text is the remedy.
_NO_TOOLS = "tools are not trained yet; write calls and results into the text, or leave such conversations out"
_NO_REASONING = "reasoning is not trained apart from the content; write it into the content, or remove it"
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), _NO_TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), _NO_REASONING),
    "images": "pictures are not trained; leave such conversations out, or remove the key",
    "refusal": "refusals are not trained apart from the content; write it into the content, or remove it",
    "name": "speakers' names are not trained; write them into the content, or remove the key (jq 'del(.messages[].name)')",
    "train_detail": "parts of a turn cannot be switched on or off; split the turn, or use train true or false for all of it",
}
# Known beside the turns. There `name` is a title or a file, not a speaker.
TOP_LEVEL_UNSUPPORTED = UNSUPPORTED.keys() - {"name", "train_detail"}
TURN_KEYS = FLAGS | UNSUPPORTED.keys()
# Beside the turns a flag speaks of all of them: these values leave everything to the flags of turns.
_TRAINS: dict[str, int | bool] = {"weight": 1, "loss_scale": 1, "train": True, "loss": True, "masked": False}


def read_flag(message: dict[str, Any], role: str, number: int) -> bool | None:
    """Whether message `number` is to be trained: what its flags say, None where they say nothing.

    Raises RejectedLine on another value than a flag may have, on flags that contradict each other, and on a flag that
    asks to train another role than the assistant's.
    """
    said: dict[str, bool] = {}
    for key in sorted(FLAGS & message.keys()):
        value = message[key]
        if value is not None:  # columns that not every row fills
            said[key] = _flag(key, value, number)
    if not said:
        return None
    if len(set(said.values())) > 1:
        shown = " and ".join(f"'{key}' {message[key]!r}" for key in said)
        raise RejectedLine("contradicting flags", f"message {number} has {shown}")
    (flag,) = set(said.values())
    if flag and role != "assistant":
        key = next(iter(said))
        raise RejectedLine(
            "flag on another role",
            f"'{key}' of message {number} asks to train a {role} turn; only assistant turns are trained",
        )
    return flag


def check_unsupported(holder: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Refuse keys of UNSUPPORTED that hold something; null, false, an empty list and an empty text are no loss."""
    for key in sorted(keys):
        if holder[key] not in (None, False, [], "", {}):
            raise RejectedLine(f"unsupported {key}", f"'{key}' {where}: {UNSUPPORTED[key]}")


def check_flags_beside_turns(document: dict[str, Any]) -> None:
    """Refuse a conversation that is not to be trained as it is, or whose flag says anything else here."""
    for key in sorted(FLAGS & document.keys()):
        value, trains = document[key], _TRAINS[key]
        is_like = isinstance(value, bool) == isinstance(trains, bool) and value == trains
        if value not in (None, [], "", {}) and not is_like:
            remedy = "give it to the turns that it is meant for, leave the conversation out, or remove the key"
            raise RejectedLine(f"unsupported {key}", f"'{key}' beside the turns is not {json.dumps(trains)}: {remedy}")


def _flag(key: str, value: Any, number: int) -> bool:
    if key in BOOLEAN_FLAGS:
        if isinstance(value, bool):
            return value is not (key == "masked")
        wanted = "true or false"
    else:
        if type(value) in (int, float) and value in (0, 1):
            return value == 1
        wanted = "0 or 1"
    shown = (
        shorten(value) if isinstance(value, str) else repr(value) if json_type(value) == "number" else json_type(value)
    )
    raise RejectedLine("flag value", f"'{key}' of message {number} is {shown}, not {wanted}")
