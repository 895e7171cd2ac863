"""Keys with a meaning elsewhere: one table of what each means, and whether it is obeyed, refused or harmless here.

The keys are those that OpenAI, Mistral and Anthropic document, and those that axolotl, TRL, ms-swift, LLaMA-Factory,
NeMo, verl and chat templates of Hugging Face read. A key that would change what is trained is obeyed or refused by
rule, never passed over: passing over it would train other targets than the data says. What the table does not hold is
ignored, counted and named. remedies.py has what mends a refused line.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from lumina_ds.data.strict_json import RejectedLine, a_type, json_type
from lumina_ds.foreign_files import shorten

Use = Literal["obeyed", "refused", "harmless", "unknown"]


class KnownKey(NamedTuple):
    """What a key means, and what becomes of it at a turn and beside the turns. Unknown ones are counted and named.

    false_speaks: its false and 0 say something, which of other keys hold nothing.
    """

    meaning: str
    at_a_turn: Use = "unknown"
    beside: Use = "unknown"
    false_speaks: bool = False


_PICTURES = KnownKey("pictures are not trained", "refused", "refused")
_RECORDINGS = KnownKey("sound and video are not trained", "refused", "refused")
_FLAG = KnownKey("a flag: is the turn a label?", "obeyed", "obeyed", True)
_DEFINITIONS = KnownKey("definitions of tools stand beside the turns", "refused", "obeyed")
_OF_A_TURN = KnownKey("this stands at the turn that it belongs to", "obeyed", "refused")
_REASONING = KnownKey("reasoning is read as a text under reasoning_content", "refused", "refused")
_CALLS = KnownKey(
    "calls and results of tools are read under tool_calls and in turns of the role tool", "refused", "refused"
)
_BEGUN = KnownKey("the turn is the beginning of an answer, which has no end to learn", "refused", "refused")
_FOR_A_TEMPLATE = KnownKey(
    "it changes what a template writes, and no template is given it", beside="refused", false_speaks=True
)
_OF_A_PROMPT = KnownKey("the line ends in a prompt for a generation, not in an answer", "refused", "refused")
_LABELS = KnownKey("labels of single tokens are not read", beside="refused", false_speaks=True)
_JUDGED = KnownKey("false: the answer is not to be learned", "refused", "obeyed", True)
_REJECTED = KnownKey("the rejected side of a preference, which is left out", beside="obeyed")
_EMBEDDING = KnownKey("pairs for embeddings are not trained", beside="refused")
_SYSTEM = KnownKey("the system turn", beside="obeyed")
KNOWN_KEYS: dict[str, KnownKey] = {
    **dict.fromkeys(("weight", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask"), _FLAG),
    **dict.fromkeys(("train", "trainable", "train_on_turn", "loss", "masked", "is_masked"), _FLAG),
    "mask": KnownKey("it says trained in some programs and not trained in others", "refused", "refused", True),
    "train_detail": KnownKey("parts of a turn cannot be switched on or off", "refused", "refused"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), _OF_A_TURN),
    **dict.fromkeys(("thinking_blocks", "reasoning_details", "tool_plan"), _REASONING),
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), _OF_A_TURN),
    **dict.fromkeys(("tool_call", "tool_responses", "tool_results"), _CALLS),
    **dict.fromkeys(("tools", "functions"), _DEFINITIONS),
    "available_tools": KnownKey("definitions of tools are read under tools", "refused", "refused"),
    # Beside the turns a name is a title or a file.
    "name": KnownKey("only results of tools have one", "obeyed"),
    "channel": KnownKey("reasoning and calls are read under reasoning_content and tool_calls", "obeyed"),
    "recipient": KnownKey("a call is read under tool_calls", "refused"),
    "refusal": KnownKey("refusals are not trained apart from the content", "refused", "refused"),
    **dict.fromkeys(("prefix", "partial"), _BEGUN._replace(beside="unknown")),
    **dict.fromkeys(("image", "images", "image_url"), _PICTURES),
    **dict.fromkeys(("audio", "audios", "video", "videos"), _RECORDINGS),
    **dict.fromkeys(("system", "system_prompt", "system_message"), _SYSTEM),
    "instruction": KnownKey("it stands in none of the turns", beside="refused"),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking", "documents"), _FOR_A_TEMPLATE),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), _OF_A_PROMPT),
    **dict.fromkeys(("labels", "assistant_masks", "completion_mask"), _LABELS),
    **dict.fromkeys(("label", "kto_tag"), _JUDGED),
    **dict.fromkeys(("rejected_messages", "rejected_response"), _REJECTED),
    **dict.fromkeys(("positive_messages", "negative_messages"), _EMBEDDING),
    "cache_control": KnownKey("what a server keeps in its cache", "harmless", "harmless"),
    "parallel_tool_calls": KnownKey("whether a server may answer with several calls", beside="harmless"),
}  # fmt: skip


def _keys(place: Literal["at_a_turn", "beside"], *uses: Use) -> frozenset[str]:
    return frozenset(name for name, key in KNOWN_KEYS.items() if getattr(key, place) in uses)


FLAGS = frozenset(name for name, key in KNOWN_KEYS.items() if key is _FLAG)
NUMBER_FLAGS = frozenset({"weight", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask"})
NOT_TRAINED_FLAGS = frozenset({"masked", "is_masked"})
EMPTY: tuple[Any, ...] = (None, False, [], "", {})  # what holds nothing is no loss
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
JUDGEMENTS = ("label", "kto_tag")
REJECTED_KEYS = _keys("beside", "obeyed") & {"rejected_messages", "rejected_response"}
DEFINITION_KEYS = frozenset({"tools", "functions"})
REFUSED_AT_A_TURN = _keys("at_a_turn", "refused")
# `instruction` is one of a format, and refused by its text beside a list of turns.
REFUSED_BESIDE = _keys("beside", "refused") - {"instruction"}
TURN_KEYS = _keys("at_a_turn", "obeyed", "refused")
HARMLESS_KEYS = _keys("at_a_turn", "harmless") | _keys("beside", "harmless")
TOP_LEVEL_KEYS = _keys("beside", "obeyed", "refused")
# What a part of a content, and a call, must not say: they have no flag, picture or reasoning of their own here.
PART_KEYS = TURN_KEYS | {"input_image", "input_audio", "file", "input_file"}
CALL_KEYS = TURN_KEYS - {"name"}


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
        raise RejectedLine(
            "flag on another role",
            f"'{next(iter(said))}' of message {number} asks to train the turn of the {role}; only assistant turns are trained",
        )
    return flag


def check_unsupported(holder: dict[str, Any], refused: Collection[str], where: str) -> None:
    """Refuse the keys among `refused` that hold something."""
    for key in sorted(holder.keys() & refused):
        known, value = KNOWN_KEYS[key], holder[key]
        says_false = known.false_speaks and value is not None and isinstance(value, (bool, int, float))
        if says_false or value not in EMPTY:
            raise RejectedLine(f"unsupported {key}", f"'{key}' {where}: {known.meaning}")


def check_flags_beside_turns(document: dict[str, Any]) -> None:
    """Refuse a conversation that is not to be trained as it is, or whose flag says anything else here."""
    for key in sorted(FLAGS & document.keys()):
        if document[key] not in (None, [], "", {}) and not _trains(key, document[key]):
            trains = json.dumps(_trained_value(key))
            raise RejectedLine(
                f"unsupported {key}", f"'{key}' beside the turns is not {trains}, so not all is to be trained"
            )


def check_judgement(document: dict[str, Any]) -> None:
    """Refuse a chat whose answer is marked as a bad one, or marked by anything else than true and false."""
    for key in JUDGEMENTS:
        value = document.get(key)
        if value in (None, "", [], {}) or (value is True or (type(value) in (int, float) and value == 1)):
            continue
        if value is False or (type(value) in (int, float) and value == 0):
            raise RejectedLine("answer not to be learned", f"'{key}' {json.dumps(value)} marks the answer as a bad one")
        raise RejectedLine(
            f"unsupported {key}", f"'{key}' is {_shown(value)}, not true or false; classes are not trained"
        )


def check_inside(part: dict[str, Any], known: Collection[str], kind: str, where: str) -> None:
    """Refuse a part of a turn (`kind`: part, call) that says more than its text or its call."""
    for key in sorted(part.keys() & known):
        value = part[key]
        # A flag that is false says something; of other keys, what holds nothing is no loss.
        is_empty = value is None if key in FLAGS else value in EMPTY
        if not is_empty and not (key in FLAGS and _trains(key, value)):
            raise RejectedLine(
                f"unsupported {key} of a {kind}", f"'{key}' of {where}: only a whole turn can be switched on or off, "
                "or have reasoning, pictures or calls",
            )  # fmt: skip


def _trained_value(flag: str) -> int | bool:
    """What a flag says of what is trained."""
    return 1 if flag in NUMBER_FLAGS else flag not in NOT_TRAINED_FLAGS


def _trains(flag: str, value: Any) -> bool:
    trained = _trained_value(flag)
    return bool(isinstance(value, bool) == isinstance(trained, bool) and value == trained)


def _flag(key: str, value: Any, number: int) -> bool:
    if key not in NUMBER_FLAGS:
        if isinstance(value, bool):
            return value is not (key in NOT_TRAINED_FLAGS)
        wanted = "true or false"
    else:
        if type(value) in (int, float) and value in (0, 1):
            return value == 1
        wanted = "0 or 1"
    raise RejectedLine("flag value", f"'{key}' of message {number} is {_shown(value)}, not {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return shorten(value)
    return repr(value) if json_type(value) == "number" else a_type(value)
