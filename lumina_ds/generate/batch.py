"""Prompts of a JSONL file and their replies, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumina_ds.data.conversation import Conversation, Turn, is_blank, read_chat, split_lines
from lumina_ds.data.strict_json import RejectedLine, parse_object
from lumina_ds.data.tools import read_tools
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.generate.chat import stream_reply
from lumina_ds.generate.load import LoadedModel
from lumina_ds.generate.sampling import SamplingSettings


def read_prompts(path: Path, system: str | None = None) -> list[tuple[dict[str, Any], Conversation]]:
    """Every line's document and its turns and tools; `system` comes before those that bring no system turn.

    Raises DataError with the line of the first that is no prompt: a whole file is read before a model is.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a JSONL file with --prompts") from None
    asked = []
    for number, (_, line) in enumerate(split_lines(content), 1):
        if is_blank(line):
            continue
        try:
            document = parse_object(line)
            chat = _prompt(document)
        except RejectedLine as refused:
            raise DataError(
                f'{path}, line {number}: {refused.reason}; write {{"prompt": "..."}} or {{"messages": [...]}}'
            ) from None
        if system and chat.turns[0].role != "system":
            chat = Conversation((Turn("system", system), *chat.turns), tools=chat.tools)
        asked.append((document, chat))
    if not asked:
        raise DataError(f"{path} holds no prompt")
    return asked


def replies(
    loaded: LoadedModel, asked: Sequence[tuple[dict[str, Any], Conversation]], settings: SamplingSettings
) -> Iterator[dict[str, Any]]:
    """Each document with its "reply"; with "error" beside an empty one where a prompt does not fit the context, or the
    run's own template refuses it."""
    for document, chat in asked:
        try:
            yield {**document, "reply": "".join(stream_reply(loaded, chat.turns, settings, chat.tools))}
        except (ConfigError, DataError) as error:
            yield {**document, "reply": "", "error": str(error)}


def _prompt(document: dict[str, Any]) -> Conversation:
    """The turns that a reply follows, and the tools that it may call. Raises RejectedLine."""
    if document.get("prompt"):
        if not isinstance(document["prompt"], str):
            raise RejectedLine("wrong type", "'prompt' is no text")
        return Conversation((Turn("user", document["prompt"]),), tools=read_tools(document))
    chat = read_chat(document)
    if chat.turns[-1].role not in ("user", "tool"):
        raise RejectedLine(
            "no question",
            f"the last turn is the {chat.turns[-1].role}'s, and only a user's or a tool's is answered",
        )
    return chat
