"""The kinds of lines that are read: how each becomes the list of messages that conversation.py checks.

An entry of FORMATS adds one. Lines of `messages` and `conversations` are read as they stand, by a compiled scanner where
that is there (preprocess/scan.py); the others are rewritten, so that flags, roles and refusals hold for all alike.
"""

from __future__ import annotations

from typing import Any

from lumina_ds.data.formats.alpaca import ALPACA
from lumina_ds.data.formats.base import LISTS_OF_TURNS, DataFormat, pair
from lumina_ds.data.formats.lists_of_turns import MESSAGES, SHAREGPT
from lumina_ds.data.formats.oasst import OASST
from lumina_ds.data.formats.pairs import INSTRUCTION_RESPONSE, PROMPT_COMPLETION
from lumina_ds.data.formats.preference import PREFERENCE
from lumina_ds.data.formats.text import TEXT
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.errors import ConfigError
from lumina_ds.text import nearest

__all__ = ["ANSWER_KEYS", "FORMATS", "LISTS_OF_TURNS", "DataFormat", "as_messages", "check_format", "format_of", "pair"]

FORMATS: dict[str, DataFormat] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "prompt-completion": PROMPT_COMPLETION,
    "instruction-response": INSTRUCTION_RESPONSE,
    "oasst": OASST,
    "text": TEXT,
    "preference": PREFERENCE,
}


_AS_THEY_STAND = ("messages", "sharegpt")
# Beside a list of turns these make a line one of two formats: the list may be the prompt alone, its answers not to be
# learned. What other formats have there is named as without a meaning.
ANSWER_KEYS = PREFERENCE.keys


def check_format(name: str | None) -> None:
    """Raises ConfigError where a format is named that FORMATS does not hold."""
    if name is not None and name not in FORMATS:
        raise ConfigError(f"there is no format {name}{nearest(name, list(FORMATS))}; use {', '.join(FORMATS)}")


def format_of(document: dict[str, Any], name: str | None = None) -> DataFormat | None:
    """The format of a line's object: the named one, or what its keys tell; None for a list of turns as it stands.

    Raises RejectedLine where the line is of no format, of two, or not of the one that is named.
    """
    if name is not None:
        form = FORMATS[name]
        if not form.matches(document):
            keys = " and ".join(f"'{key}'" for key in sorted(form.keys))
            raise RejectedLine("another format", f"a line of {name} has {keys}, and --format names that format")
        return form
    found = [name for name, form in FORMATS.items() if name not in _AS_THEY_STAND and form.matches(document)]
    # Where the keys are those of turns too, a text beside them is a copy of these.
    chats = [name for name in found if FORMATS[name].text is None]
    turns = [name for name in _AS_THEY_STAND if any(document.get(key) for key in FORMATS[name].keys)]
    if turns:
        if not all(document.get(key) for key in ANSWER_KEYS):
            return None
        chats = ["preference"]
    found = [*turns, *chats] or found
    if len(found) > 1:
        raise RejectedLine(
            "two formats", f"the keys are those of {' and of '.join(found)}; name the one that is meant with --format"
        )
    if found:
        return FORMATS[found[0]]
    if not any(key in document for key in LISTS_OF_TURNS):
        raise RejectedLine(
            "missing key", "no key 'messages' or 'conversations'; lumina data formats shows what is read"
        )
    return None


def as_messages(document: dict[str, Any], form: DataFormat | None) -> dict[str, Any]:
    """The line's object with its turns under `messages` or `conversations`. Raises RejectedLine."""
    if form is None:
        return document
    if form.messages is None:  # one list of turns is named
        return {key: value for key, value in document.items() if key not in LISTS_OF_TURNS or key in form.keys}
    read = form.keys | form.optional | set(LISTS_OF_TURNS)
    rest = {key: value for key, value in document.items() if key not in read}
    return {**rest, "messages": form.messages(document)}
