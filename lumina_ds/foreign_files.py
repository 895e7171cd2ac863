"""Files that somebody else wrote, opened and read so that none leads elsewhere, hangs, or takes memory without bound.

    names      is_plain_name(): what a manifest may name, one file of its own folder
    files      open_plain(): a regular file only; no FIFO, device or folder, and no link where the name came from a manifest
    size       read_bounded(): never more bytes than the reader expects
    JSON       read_json(), strict_json(): bounded depth, no key twice, no NaN, no number without end

What a reader makes of a document is its own typed schema, and raises its own error. Everything here raises
ForeignFileError, a ValueError whose text is one phrase about the file, or the kernel's OSError.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_DOCUMENT_BYTES = 16 << 20  # of a manifest or a configuration; a parsed document takes up to 25 times as much
MAX_DEPTH = 100
MAX_NUMBER_DIGITS = 4300
INVALID_JSON = "invalid JSON"
INVALID_UTF8 = "invalid UTF-8"
MAX_NAME_BYTES = 255  # as file systems have it

_UNPRINTED = re.compile("[\x00-\x1f\x7f]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 100
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class ForeignFileError(ValueError):
    """A file, a name or a content that is not what it ought to be: one phrase, to be put behind the file's name."""


class NotStrictJson(ForeignFileError):
    """`rule` names what is broken, for counting; the text is about this very document."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason


def is_plain_name(name: str) -> bool:
    """Whether a manifest may name a file so: one in its own folder, spelled without control characters."""
    is_one = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    return is_one and not _UNPRINTED.search(name) and len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES


def open_plain(path: str | Path, follow_links: bool = True) -> BinaryIO:
    """The regular file `path`, opened unbuffered for reading. It never waits, whatever lies there.

    follow_links: as for a path that the user gave, and for a model's folder (the cache of the Hub consists of links). A
    name that a manifest gave is no link: it would lead out of the folder.
    """
    look = os.stat if follow_links else os.lstat
    _check_regular(look(path).st_mode)  # before opening, which some devices take as an order
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _check_regular(os.fstat(descriptor).st_mode)
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: str | Path, most_bytes: int = MAX_DOCUMENT_BYTES, follow_links: bool = True) -> bytes:
    """All of a regular file, which has at most `most_bytes`, also where it grows meanwhile."""
    with open_plain(path, follow_links) as file:
        size = os.fstat(file.fileno()).st_size
        pieces: list[bytes] = []
        left = most_bytes + 1
        # A file of the kernel's says 0 bytes and has some.
        while size <= most_bytes and (piece := file.read(min(left, max(1 << 16, size)))):
            pieces.append(piece)
            left -= len(piece)
    if size > most_bytes or left <= 0:
        raise ForeignFileError(f"is larger than {most_bytes:,} bytes")
    return b"".join(pieces)


def read_json(path: str | Path, most_bytes: int = MAX_DOCUMENT_BYTES, follow_links: bool = True) -> Any:
    """The document in a file of strict JSON."""
    return strict_json(read_bounded(path, most_bytes, follow_links))


def strict_json(content: bytes) -> Any:
    """The document that UTF-8 bytes spell. Raises NotStrictJson. The caller bounds their number."""
    try:
        document = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotStrictJson(INVALID_UTF8, f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise NotStrictJson(INVALID_JSON, f"invalid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    # Both checks walk the whole document, so they run only where the bytes leave room for a fault.
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH and _is_deeper(document, MAX_DEPTH):
        raise _too_deep()
    if (b"\\ud" in content or b"\\uD" in content) and _has_lone_surrogate(document):
        raise NotStrictJson("lone surrogate", "a lone surrogate, which is no character")
    return document


def shown(value: Any) -> str:
    """A value of a foreign file for a message: on one line, printable, and short."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shorten(text: str) -> str:
    """A text of a foreign file in quotes, at most 40 characters of it."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ForeignFileError(f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a plain file")


def _too_deep() -> NotStrictJson:
    return NotStrictJson("nested too deeply", f"nested deeper than {MAX_DEPTH}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotStrictJson("duplicate key", f"the key {shorten(key)} stands twice")
            seen.add(key)
    return document


def _no_constant(name: str) -> Any:
    raise NotStrictJson(INVALID_JSON, f"invalid JSON: {name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise NotStrictJson("number out of range", f"a number of more than {MAX_NUMBER_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise NotStrictJson("number out of range", f"the number {shorten(digits)} is out of range")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite
)


def _is_deeper(document: Any, limit: int) -> bool:
    level = [document]
    for _ in range(limit + 1):
        level = [value for value in level if isinstance(value, (dict, list))]
        if not level:
            return False
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
    return True


def _has_lone_surrogate(document: Any) -> bool:
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            if _LONE_SURROGATE.search(value):
                return True
        elif isinstance(value, dict):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False
