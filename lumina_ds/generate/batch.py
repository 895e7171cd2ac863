"""Prompts of a JSONL file and their replies, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumina_ds.data.conversation import Turn
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.generate.chat import stream_reply
from lumina_ds.generate.load import LoadedModel
from lumina_ds.generate.sampling import SamplingSettings

ROLES = ("system", "user", "assistant")


def read_prompts(path: Path, system: str | None = None) -> list[tuple[dict[str, Any], list[Turn]]]:
    """Every line's document and its turns; `system` comes before those that bring no system turn.

    Raises DataError with the line of the first that is no prompt: a whole file is read before a model is.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a JSONL file with --prompts") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text; give a JSONL file with --prompts") from None
    asked = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            turns = _turns(document)
        except ValueError as error:
            raise DataError(
                f'{path}, line {number}: {error}; write {{"prompt": "..."}} or {{"messages": [...]}}'
            ) from None
        opening = [Turn("system", system)] if system and turns[0].role != "system" else []
        asked.append((document, [*opening, *turns]))
    if not asked:
        raise DataError(f"{path} holds no prompt")
    return asked


def replies(
    loaded: LoadedModel, asked: Sequence[tuple[dict[str, Any], list[Turn]]], settings: SamplingSettings
) -> Iterator[dict[str, Any]]:
    """Each document with its "reply"; with "error" beside an empty one where a prompt does not fit the context."""
    for document, turns in asked:
        try:
            yield {**document, "reply": "".join(stream_reply(loaded, turns, settings))}
        except ConfigError as error:
            yield {**document, "reply": "", "error": str(error)}


def _turns(document: Any) -> list[Turn]:
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    if isinstance(document.get("prompt"), str) and document["prompt"]:
        return [Turn("user", document["prompt"])]
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('neither a text "prompt" nor a list "messages"')
    turns = []
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"a message needs a role of {', '.join(ROLES)} and a text content")
        turns.append(Turn(message["role"], message["content"]))
    if turns[-1].role != "user":
        raise ValueError(f"the last turn is the {turns[-1].role}'s, and only a user's is answered")
    return turns
