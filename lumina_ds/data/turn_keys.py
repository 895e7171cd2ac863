"""Keys with a meaning elsewhere: flags that say which turns are trained, and what this version cannot train.

Trainers and dialects write `weight` (OpenAI), `train` and `train_detail` (axolotl), `loss` and `loss_scale` (ms-swift)
and `masked`; tools and reasoning have keys of their own, which messages.py and tools.py read. A key of these is obeyed or refused by rule, never passed
over: passing over it would train other targets than the data says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lumina_ds.data.strict_json import RejectedLine, json_type, shorten

NUMBER_FLAGS = frozenset({"weight", "loss_scale"})
BOOLEAN_FLAGS = frozenset({"train", "loss", "masked"})
FLAGS = NUMBER_FLAGS | BOOLEAN_FLAGS
EMPTY: tuple[Any, ...] = (None, False, [], "", {})  # what holds nothing is no loss
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
# Keys of tools, each with its places: the definitions stand beside the turns, the others at a turn.
DEFINITION_KEYS = frozenset({"tools", "functions"})
CALL_KEYS = frozenset({"tool_calls", "function_call"})
_BESIDE_THE_TURNS = "definitions of tools stand beside the turns (jq -c '.tools = [.messages[].tools // [] | .[]] | del(.messages[].tools)')"
_AT_A_TURN = "this stands at the turn that it belongs to; move it there, or remove it (jq -c 'del(.KEY)')"
_NOT_TRAINED = "{} are not trained; leave such conversations out, or remove the key"
# Refused at a turn, unless they hold nothing. The text is the remedy.
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(DEFINITION_KEYS, _BESIDE_THE_TURNS),
    **{key: _NOT_TRAINED.format("pictures") for key in ("images", "image")},
    **{key: _NOT_TRAINED.format("sound and video") for key in ("audio", "audios", "videos", "video")},
    "refusal": "refusals are not trained apart from the content; write it into the content, or remove it",
    "train_detail": "parts of a turn cannot be switched on or off; split the turn, or use train true or false for all of it",
}
# The same beside the turns. There `name` is a title or a file, not a speaker.
TOP_LEVEL_UNSUPPORTED: dict[str, str] = {
    **{key: text for key, text in UNSUPPORTED.items() if key not in DEFINITION_KEYS | {"train_detail"}},
    **{key: _AT_A_TURN.replace("KEY", key) for key in (*REASONING_KEYS, *sorted(CALL_KEYS), "tool_call_id")},
}
TURN_KEYS = FLAGS | UNSUPPORTED.keys() | CALL_KEYS | {*REASONING_KEYS, "tool_call_id", "name"}
# What a part of a content must not say: a part has no flag, picture, call or reasoning of its own here.
PART_KEYS = TURN_KEYS | {"image_url", "input_image", "input_audio", "file", "input_file"}
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


def check_unsupported(holder: dict[str, Any], remedies: Mapping[str, str], where: str) -> None:
    """Refuse the keys of `remedies` that hold something."""
    for key in sorted(holder.keys() & remedies.keys()):
        if holder[key] not in EMPTY:
            raise RejectedLine(f"unsupported {key}", f"'{key}' {where}: {remedies[key]}")


def check_flags_beside_turns(document: dict[str, Any]) -> None:
    """Refuse a conversation that is not to be trained as it is, or whose flag says anything else here."""
    for key in sorted(FLAGS & document.keys()):
        value, trains = document[key], _TRAINS[key]
        is_like = isinstance(value, bool) == isinstance(trains, bool) and value == trains
        if value not in (None, [], "", {}) and not is_like:
            remedy = "give it to the turns that it is meant for, leave the conversation out, or remove the key"
            raise RejectedLine(f"unsupported {key}", f"'{key}' beside the turns is not {json.dumps(trains)}: {remedy}")


def check_part(part: dict[str, Any], number: int) -> None:
    """Refuse a text part of message `number` that says more than its text."""
    for key in sorted(PART_KEYS & part.keys()):
        value = part[key]
        leaves_it = key in FLAGS and isinstance(value, bool) == isinstance(_TRAINS[key], bool) and value == _TRAINS[key]
        # A flag that is false says something; of other keys, what holds nothing is no loss.
        is_empty = value is None if key in FLAGS else value in EMPTY
        if not is_empty and not leaves_it:
            raise RejectedLine(
                f"unsupported {key} of a part",
                f"'{key}' of a part of message {number}: a part is text alone; split the turn, or leave the conversation out",
            )


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
