"""A second reading of every format, written from the documentation alone: nothing of the package is imported.

read() gives what our template trains of a line's object: (role, text, is a label) of every piece, or None where
the line is refused. Slow and plain on purpose.
"""

from __future__ import annotations

import json
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
MEDIA = ("images", "image", "audio", "audios", "videos", "video", "refusal")
# Refused where they hold something, at a turn and beside the turns.
NOWHERE = (*MEDIA, "image_url", "train_detail", "thinking_blocks", "reasoning_details", "tool_plan", "tool_call")
NOWHERE += ("tool_responses", "tool_results", "available_tools")
NOT_BESIDE = (*NOWHERE, *REASONING, "tool_calls", "function_call", "tool_call_id", "positive_messages")
NOT_BESIDE += ("negative_messages", "add_generation_prompt", "continue_final_message")
NOT_AT_A_TURN = (*NOWHERE, "tools", "functions", "prefix", "partial", "recipient", "add_generation_prompt")
NOT_AT_A_TURN += ("continue_final_message",)
# The same, and their false or 0 says something.
SPEAKING_BESIDE = ("mask", "labels", "assistant_masks", "completion_mask", "chat_template", "chat_template_kwargs")
SPEAKING_BESIDE += ("enable_thinking", "documents")
SPEAKING_AT_A_TURN = ("mask", "label", "kto_tag")
SYSTEM = ("system", "system_prompt", "system_message")
PART_OF_A_TURN = (*NOT_AT_A_TURN, *SPEAKING_AT_A_TURN, *REASONING, "tool_calls", "function_call", "tool_call_id")
PART_OF_A_TURN += ("name", "channel")
FLAGS = {"weight": 1, "loss_weight": 1, "loss_scale": 1, "loss_mask": 1, "step_loss_mask": 1}
FLAGS |= {"train": True, "trainable": True, "train_on_turn": True, "loss": True, "masked": False, "is_masked": False}
COMMON = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "ai": "assistant"}
COMMON |= {"bot": "assistant", "system": "system", "developer": "system", "tool": "tool", "function": "tool"}
SHARED = {**COMMON, "gpt": "assistant", "observation": "tool", "function_call": "call", "tool_call": "call"}
Piece = tuple[str, str, bool]


class Refused(Exception):
    pass


def read(document: Any) -> list[Piece] | None:
    try:
        return pieces(document)
    except Refused:
        return None


def need(condition: Any) -> None:
    if not condition:
        raise Refused


def empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {}) or (type(value) in (int, float) and value == 0)


def says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def pieces(document: Any) -> list[Piece]:
    need(isinstance(document, dict))
    for key in NOT_BESIDE:
        need(empty(document.get(key)))
    for key in SPEAKING_BESIDE:
        need(says_nothing(document.get(key)))
    for key, value in document.items():
        if key in FLAGS and value not in (None, "", [], {}):
            need(isinstance(value, bool) == isinstance(FLAGS[key], bool) and value == FLAGS[key])
    full = [key for key in ("messages", "conversations") if document.get(key)]
    if not full:
        kind = kind_of(document)
        if kind == "text":
            need(not any(document.get(key) for key in ("tools", "functions", *SYSTEM)))
            need(isinstance(document["text"], str) and document["text"])
            return [("text", document["text"], True)]
        need(kind)
        return chat(document, rewritten(document, kind), "role", kind)
    for key in full[1:]:
        need(document[key] is None)
    need(not (document.get("chosen") and document.get("rejected")))
    need(isinstance(document[full[0]], list))
    usual, other = ("role", "from") if full[0] == "messages" else ("from", "role")
    first = document[full[0]][0]
    is_other = isinstance(first, dict) and usual not in first and other in first
    return chat(document, document[full[0]], other if is_other else usual)


def kind_of(document: dict[str, Any]) -> str | None:
    kinds = {
        "alpaca": {"instruction", "output"},
        "completion": {"prompt", "completion"},
        "response": {"instruction", "response"},
        "preference": {"chosen", "rejected"},
    }
    found = [name for name, keys in kinds.items() if keys <= set(document)]
    if isinstance(document.get("prompt"), dict):
        found.append("tree")
    need(len(found) < 2)
    if not found and "text" in document and not {"role", "parent_id", "message_id", "replies"} & set(document):
        return "text"
    return found[0] if found else None


def text(value: Any) -> str:
    need(isinstance(value, str) and value)
    return str(value)


def rewritten(document: dict[str, Any], kind: str) -> list[Any]:
    if kind == "tree":
        return [{"role": node["role"], "content": node["text"]} for node in best_path(document["prompt"])]
    if kind == "response":
        below = {text(document[key]) for key in ("input", "context") if document.get(key) not in (None, "")}
        need(len(below) < 2)
        return pair("\n".join([text(document["instruction"]), *below]), text(document["response"]))
    if kind == "alpaca":
        parts = [document.get("instruction"), document.get("input")]
        asked = "\n".join(text(part) for part in parts if part is not None and part != "")
        history = document.get("history") or []
        need(asked and isinstance(history, list))
        turns = []
        for entry in history:
            need(isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry))
            turns += pair(*entry)
        return turns + pair(asked, text(document["output"]))
    prompt, answer = document.get("prompt"), document["completion" if kind == "completion" else "chosen"]
    if kind == "completion":
        both = isinstance(prompt, list) and isinstance(answer, list)
        return [*prompt, *answer] if both else pair(text(prompt), text(answer))
    if not isinstance(answer, list):
        return pair(text(prompt), text(answer))
    if prompt is None or prompt in ("", []):
        return answer
    asked_turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    for skipped in (0, 1):
        has_system = skipped == 0 or (is_system(answer[:1]) and not is_system(asked_turns[:1]))
        if has_system and answer[skipped : skipped + len(asked_turns)] == asked_turns:
            return answer
    return [*asked_turns, *answer]


def is_system(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") in ("system", "developer")


def pair(question: str, answer: str) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def best_path(node: Any) -> list[Any]:
    path: list[Any] = []
    while node is not None:
        need(isinstance(node, dict))
        need(isinstance(node.get("role"), str) and isinstance(node.get("text"), str))
        need(node["role"] in ("prompter", "user", "human", "assistant"))
        path.append(node)
        replies = node.get("replies") or []
        need(isinstance(replies, list) and all(isinstance(reply, dict) for reply in replies))
        kept = [r for r in replies if r.get("deleted") is not True and r.get("review_result") is not False]
        ranked = [reply for reply in kept if number(reply.get("rank"))]
        best = None
        if ranked:
            lowest = min(reply["rank"] for reply in ranked)
            kept = [reply for reply in ranked if reply["rank"] == lowest]
        scored = [reply for reply in kept if score(reply) is not None]
        if scored:
            highest = max(score(reply) for reply in scored)
            best = next(reply for reply in scored if score(reply) == highest)
        elif kept:
            best = kept[0]
        node = best
    while path and path[-1]["role"] != "assistant":
        path.pop()
    need(path)
    return path


def number(value: Any) -> bool:
    return type(value) in (int, float)


def score(reply: dict[str, Any]) -> Any:
    if number(reply.get("score")):
        return reply["score"]
    labels = reply.get("labels")
    quality = labels.get("quality") if isinstance(labels, dict) else None
    value = quality.get("value") if isinstance(quality, dict) else None
    return value if number(value) else None


def chat(document: dict[str, Any], messages: Any, role_key: str, kind: str | None = None) -> list[Piece]:
    need(isinstance(messages, list) and messages)
    for key in ("label", "kto_tag"):
        verdict = document.get(key)
        need(says_nothing(verdict) or (type(verdict) in (int, float, bool) and verdict == 1))
    turns = [turn(message, role_key) for message in messages]
    beside_turns = [document[key] for key in SYSTEM if document.get(key) is not None and document[key] != ""]
    need(all(isinstance(each, str) for each in beside_turns))
    prompts = [each["text"] for each in turns if each["role"] == "system"]
    if prompts:
        need(all(each in prompts for each in beside_turns))
    elif beside_turns:
        need(len(set(beside_turns)) == 1)
        turns.insert(0, {"role": "system", "text": beside_turns[0], "calls": [], "label": False})
    if kind not in ("alpaca", "response") and not empty(document.get("instruction")):
        asked = document["instruction"]
        need(
            (isinstance(asked, str) and any(asked in each["content"] for each in turns if "content" in each))
            or asked in beside_turns
        )
    need(any(each["label"] for each in turns))
    out = [("tools", "\n".join(definitions(document)), False)] if definitions(document) else []
    return out + [(each["role"], each["text"], each["label"]) for each in sorted_results(turns)]


def definitions(document: dict[str, Any]) -> list[str]:
    found = [document[key] for key in ("tools", "functions") if not empty(document.get(key))]
    need(len(found) < 2)
    listed = spelled(found[0]) if found else []
    need(isinstance(listed, list))
    texts = []
    for entry in map(spelled, listed):
        need(isinstance(entry, dict))
        function = entry.get("function", entry)
        need(isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"])
        whole = entry if "function" in entry else {"type": "function", "function": entry}
        texts.append(json.dumps(whole, ensure_ascii=False))
    return texts


def spelled(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Refused from None


def turn(message: Any, role_key: str) -> dict[str, Any]:
    need(isinstance(message, dict))
    named = text(message.get(role_key))
    roles = COMMON if role_key == "role" else SHARED
    need(named in roles)
    role = roles[named]
    for key in NOT_AT_A_TURN:
        need(empty(message.get(key)))
    need(all(says_nothing(message.get(key)) for key in SPEAKING_AT_A_TURN))
    need(empty(message.get("channel")) or message["channel"] == "final")
    only_one_meaning(message, role_key, "assistant" if role == "call" else role)
    is_assistant = role in ("assistant", "call")
    thoughts = [message[key] for key in REASONING if not empty(message.get(key))]
    need(all(isinstance(thought, str) for thought in thoughts) and len(set(thoughts)) < 2)
    need(not thoughts or (is_assistant and "</think>" not in thoughts[0]))
    lists = [key for key in ("tool_calls", "function_call") if not empty(message.get(key))]
    need(len(lists) < 2 and (not lists or role == "assistant"))
    content = message.get("content" if role_key == "role" else "value")
    listed: Any = []
    if role == "call":
        listed = spelled(text(content))
        need(not empty(listed))
        listed, content = listed if isinstance(listed, list) else [listed], ""
    elif lists:
        listed = [message["function_call"]] if lists == ["function_call"] else message["tool_calls"]
        need(isinstance(listed, list))
    made = [call(entry) for entry in listed]
    ids = [each["id"] for each in made if each["id"]]
    need(len(ids) == len(set(ids)))
    found = {"calls": made, "id": beside(message, "tool_call_id", role), "name": beside(message, "name", role)}
    body = words(content, bool(made) or role == "tool")
    thought = f"<think>\n{thoughts[0]}\n</think>\n\n" if thoughts else ""
    block = "\n".join(f"<tool_call>\n{each['text']}\n</tool_call>" for each in made)
    whole = thought + body + ("\n" if body and block else "") + block
    role = "assistant" if is_assistant else role
    return {"role": role, "text": whole, "content": body, "label": is_label(message, role), **found}


def only_one_meaning(message: dict[str, Any], role_key: str, role: str) -> None:
    """The keys of the other dialect may stand beside these where they say the same, or nothing."""
    other, written, ours = ("from", "value", "content") if role_key == "role" else ("role", "content", "value")
    known = {name: each for name, each in (SHARED if other == "from" else COMMON).items() if each != "call"}
    if isinstance(message.get(other), str):
        need(known.get(message[other], role) == role)
    if isinstance(message.get(written), str) and message[written]:
        need(message[written] == message.get(ours))


def beside(message: dict[str, Any], key: str, role: str) -> str:
    value = message.get(key)
    if empty(value):
        return ""
    need(role == "tool" and isinstance(value, str))
    return str(value)


def words(content: Any, may_be_empty: bool) -> str:
    if isinstance(content, list) and content:
        for part in content:
            need(isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text"))
            need(isinstance(part.get("text"), str))
            for key in (*PART_OF_A_TURN, "input_image", "file"):
                need(empty(part.get(key)))
            leaves_all_trained(part)
        content = "".join(part["text"] for part in content)
    if may_be_empty and (content is None or content in ("", [])):
        return ""
    return text(content)


def leaves_all_trained(part: dict[str, Any]) -> None:
    for key, value in FLAGS.items():
        said = part.get(key)
        need(said is None or (isinstance(said, bool) == isinstance(value, bool) and said == value))


def call(entry: Any) -> dict[str, Any]:
    need(isinstance(entry, dict))
    function = entry.get("function", entry)
    need(("type" not in entry or entry["type"] == "function") and isinstance(function, dict))
    for holder in (entry, function):
        need(all(empty(holder.get(key)) for key in PART_OF_A_TURN if key != "name"))
        leaves_all_trained(holder)
    name, call_id = function.get("name"), entry.get("id")
    need(isinstance(name, str) and name and (call_id is None or isinstance(call_id, str)) and "arguments" in function)
    given = function["arguments"]
    arguments = {} if given is None or given == "" else spelled(given)
    need(isinstance(arguments, dict))
    shown = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return {"name": name, "id": call_id or "", "text": shown.replace("</tool_call>", "<\\/tool_call>")}


def is_label(message: dict[str, Any], role: str) -> bool:
    said = set()
    for key, on in FLAGS.items():
        value = message.get(key)
        if value is None:
            continue
        if isinstance(on, bool):
            need(isinstance(value, bool))
            said.add(value is on)
        else:
            need(type(value) in (int, float) and value in (0, 1))
            said.add(value == 1)
    need(len(said) < 2)
    need(said != {True} or role == "assistant")
    return role == "assistant" and said != {False}


def sorted_results(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    place = 0
    while place < len(turns):
        if turns[place]["role"] != "tool":
            waiting = turns[place]["calls"] or waiting
            done.append(turns[place])
            place += 1
            continue
        run = []
        while place < len(turns) and turns[place]["role"] == "tool":
            run.append(turns[place])
            place += 1
        answered = answers(run, waiting)
        order = sorted(range(len(run)), key=lambda n: (answered.get(n, len(turns)), n))
        done += [run[n] for n in order]
        waiting = waiting[len(answered) :]
    return done


def answers(run: list[dict[str, Any]], waiting: list[dict[str, Any]]) -> dict[int, int]:
    """result -> the waiting call that it answers."""
    by_id = any(each["id"] for each in waiting)
    found: dict[int, int] = {}
    late = []
    for n, result in enumerate(run):
        if not (by_id and result["id"]):
            late.append(n)
            continue
        same = [k for k, each in enumerate(waiting) if each["id"] == result["id"] and k not in found.values()]
        need(same)
        found[n] = same[0]
    for n in late:
        free = [k for k in range(len(waiting)) if k not in found.values()]
        need(free or not run[n]["id"])
        free = [k for k in free if run[n]["name"] in ("", waiting[k]["name"])]
        need(free or not run[n]["name"])
        if free:
            found[n] = free[0]
    need(all(run[n]["name"] in ("", waiting[k]["name"]) for n, k in found.items()))
    need(sorted(found.values()) == list(range(len(found))))
    return found
