"""One line to one JSON object, strictly: what is not exactly JSON, or of no bounded size and depth, is refused."""

from __future__ import annotations

from typing import Any

from lumina_ds.foreign_files import INVALID_JSON, INVALID_UTF8, NotStrictJson, strict_json
from lumina_ds.text import with_article

# Far above any context; SentencePiece takes about 50 bytes per character, so this bounds a worker's memory.
MAX_LINE_BYTES = 16 << 20

BYTE_ORDER_MARK = "byte order mark"
LINE_TOO_LONG = "line too long"
# Rules that a line breaks before it is JSON at all.
NOT_JSON_RULES = frozenset({INVALID_JSON, INVALID_UTF8, BYTE_ORDER_MARK, LINE_TOO_LONG})

# What a reader of tables writes in place of a row that is none, with the reason after it. No JSON begins so.
UNREADABLE_ROW = b"\0unreadable row: "


class RejectedLine(Exception):
    """A line that is not a trainable conversation.

    `rule` names the rule it breaks, for counting; `reason` is one phrase about this very line.
    """

    def __init__(self, rule: str, reason: str | None = None) -> None:
        super().__init__(reason or rule)
        self.rule = rule
        self.reason = reason or rule


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises RejectedLine, also for keys that stand twice and depth beyond MAX_DEPTH."""
    document = _parse_json(line)
    if not isinstance(document, dict):
        found = "an empty array" if document == [] else a_type(document)
        raise RejectedLine("not an object", f"{found}, not an object")
    return document


def parse_json(text: str) -> Any:
    """What a JSON text inside a line spells, as strictly as the line itself. Raises RejectedLine."""
    return _parse_json(text.encode("utf-8", "surrogatepass"))


def _parse_json(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise RejectedLine(LINE_TOO_LONG, f"longer than {MAX_LINE_BYTES} bytes")
    if line.startswith(UNREADABLE_ROW):
        raise RejectedLine("unreadable row", line.removeprefix(UNREADABLE_ROW).decode("utf-8", "backslashreplace"))
    if line.startswith(b"\xef\xbb\xbf"):
        raise RejectedLine(BYTE_ORDER_MARK, "starts with a byte order mark")
    try:
        return strict_json(line)
    except NotStrictJson as fault:
        if fault.rule != INVALID_UTF8:
            raise RejectedLine(fault.rule, fault.reason) from None
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise RejectedLine(INVALID_UTF8, "starts with the byte order mark of UTF-16; convert it to UTF-8") from None
        raise RejectedLine(
            INVALID_UTF8, f"{fault.reason}; convert the file, perhaps from Latin-1 (iconv -f LATIN1 -t UTF-8)"
        ) from None


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names: dict[type, str] = {dict: "object", list: "list", str: "string"}
    return names.get(type(value), "number")


def a_type(value: Any) -> str:
    """The type of a value for a sentence: "an object", "a list", "null"."""
    return "null" if value is None else with_article(json_type(value))


def required_text(holder: dict[str, Any], key: str, where: str = "") -> str:
    """The text under `key`; `where` names the holder, such as "message 3". Raises RejectedLine where there is none."""
    if key not in holder:
        raise RejectedLine("missing key", f"{where or 'the line'} has no '{key}'")
    value = holder[key]
    shown = f"'{key}' of {where}" if where else f"'{key}'"
    if not isinstance(value, str):
        raise RejectedLine("wrong type", f"{shown} is {a_type(value)}, not a string")
    if not value:
        raise RejectedLine("empty content", f"{shown} is empty")
    return value
