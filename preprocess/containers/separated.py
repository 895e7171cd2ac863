"""CSV and TSV: the header names the keys, each further row is a line of JSON.

A cell is a text, and an empty one is none. Under a key that holds a list or an object, the cell is JSON; a flag may be a
number or true or false. Rows count, not lines: a quoted cell may hold line ends. Reasons name the file's line too.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from lumina_ds.data.formats import FORMATS, LISTS_OF_TURNS
from lumina_ds.data.strict_json import MAX_LINE_BYTES
from lumina_ds.data.turn_keys import FLAGS, JUDGEMENTS
from lumina_ds.errors import DataError
from lumina_ds.foreign_files import shorten
from preprocess.containers.rows import unreadable

# Keys whose cells are lists or objects, those that may be, and those whose cells are a text or messages.
_JSON_KEYS = frozenset({*LISTS_OF_TURNS, "history", "tools", "functions"})
_MAYBE_JSON_KEYS = frozenset({"tool_calls", "function_call", "images", "replies"})
_TEXT_OR_MESSAGES = frozenset({"prompt", "completion", "chosen", "rejected"})
_KEYS = _JSON_KEYS.union(*(form.keys | form.optional for form in FORMATS.values()))
_SEPARATORS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_LINES_AT_ONCE = 256
# Stands for NUL, which the reader takes for the end of a line on some versions of Python. No UTF-8 decodes to it.
_NUL = "\udc00"
_NAMED = {",": "comma", ";": "semicolon", "\t": "tab"}


def find_separator(head: bytes, name: str) -> str | None:
    """What separates the cells: the file's name says that there are any, or names of known keys in the first line.

    One column alone is told by the file's name, or by the name of a list of turns: other headers are words like any.
    """
    for packed in _PACKED:
        name = name.removesuffix(packed)
    possible = next((found for ending, found in _SEPARATORS.items() if name.lower().endswith(ending)), None)
    header = head.splitlines()[0].decode("utf-8", "replace") if head.strip() else ""
    for separator in possible or ",\t;":
        names = next(csv.reader([header], delimiter=separator), [])
        if len(names) == len(set(names)) > 1 and _KEYS.intersection(names):
            return separator
    if header.strip('"') in LISTS_OF_TURNS:
        return ","
    return possible[0] if possible and header else None


def separated_lines(stream: Any, separator: str, shown: object) -> Iterator[bytes]:
    """Lines of JSON, some at a time. Raises EOFError where a quote is never closed, DataError for a header without sense."""
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.TextIOWrapper(io.BufferedReader(_Raw(stream), 1 << 17), "utf-8", "surrogateescape", newline="")
    rows = csv.reader((line.replace("\0", _NUL) for line in text), delimiter=separator, strict=True)
    names = _header(rows, shown)
    writers = [_writer(name) for name in names]
    lines: list[bytes] = []
    begin = rows.line_num + 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error) or "field larger" in str(error):
                raise EOFError(f"the quote that opens in line {begin} is not closed") from error
            lines.append(unreadable(f"{_place(begin, rows.line_num)}: {error}; double the quotes within a quoted cell"))
        else:
            if row:  # a blank line is no row
                lines.append(_line(row, names, writers, separator, begin, rows.line_num))
        begin = rows.line_num + 1
        if len(lines) >= _LINES_AT_ONCE:
            yield b"".join(lines)
            lines = []
    yield b"".join(lines)


def _header(rows: Iterator[list[str]], shown: object) -> list[str]:
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise DataError(f"{shown}: the header cannot be read: {error}") from error
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{shown} has two columns called {shorten(twice[0])}; rename or remove one of them")
    if fault := _fault("".join(names)):
        raise DataError(f"{shown}: {fault} in the header")
    return names


Writer = Callable[[str], bytes]


def _line(row: list[str], names: list[str], writers: list[Writer], separator: str, begin: int, end: int) -> bytes:
    if len(row) != len(names):
        cells = f"{len(row)} cells, and the header has {len(names)}"
        return unreadable(f"{_place(begin, end)}: {cells}; quote cells that hold a {_NAMED[separator]} or a line end")
    try:
        pairs = [write(cell) for write, cell in zip(writers, row, strict=True) if cell]
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: orjson's, for what is no Unicode
        reason = _fault("".join(row)) or error
        return unreadable(f"{_place(begin, end)}: {reason}")
    return b"{" + b",".join(pairs) + b"}\n"


def _writer(name: str) -> Writer:
    """What makes `"name": value` of a cell under this name."""
    key = orjson.dumps(name) + b":"
    if name in FLAGS or name in JUDGEMENTS:
        return lambda cell: key + _flag(cell)
    if name in _JSON_KEYS | _MAYBE_JSON_KEYS:
        return lambda cell: key + _json(name, cell, name in _JSON_KEYS)
    if name in _TEXT_OR_MESSAGES:
        return lambda cell: key + (_messages(cell) or orjson.dumps(cell))
    return lambda cell: key + orjson.dumps(cell)


def _flag(cell: str) -> bytes:
    word = cell.strip().lower()
    return word.encode() if word in ("0", "1", "0.0", "1.0", "true", "false", "null") else orjson.dumps(cell)


def _json(name: str, cell: str, is_needed: bool) -> bytes:
    """The JSON of the cell on one line, exactly as it stands: its reader refuses keys that stand twice."""
    if not cell.lstrip().startswith(("[", "{")):
        if cell.strip() == "null":
            return b"null"
        if not is_needed:
            return orjson.dumps(cell)
    try:
        json.loads(cell)
    except ValueError as error:
        if not is_needed:
            return orjson.dumps(cell)
        remedy = "write it with json.dumps"
        raise ValueError(f"the cell under {shorten(name)} is not JSON ({error}); {remedy}") from error
    # A line end that stands within a string was refused just now.
    return _one_line(cell)


def _messages(cell: str) -> bytes | None:
    """The cell as JSON where it is a list of messages, or one of them; else it is a text."""
    if not cell.lstrip().startswith(("[", "{")) or '"role"' not in cell:
        return None
    try:
        found = json.loads(cell)
    except ValueError:
        return None
    each = found if isinstance(found, list) else [found]
    if not each or not all(isinstance(message, dict) and "role" in message for message in each):
        return None
    return _one_line(cell)


def _one_line(cell: str) -> bytes:
    return cell.replace("\r", " ").replace("\n", " ").encode("utf-8")


def _fault(text: str) -> str | None:
    """What is wrong with a text that is no Unicode."""
    if _NUL in text:
        return "a NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid UTF-8; convert the file, perhaps from Latin-1 (iconv -f LATIN1 -t UTF-8)"
    return None


def _place(begin: int, end: int) -> str:
    return f"line {begin} of the file" if begin >= end else f"lines {begin} to {end} of the file"


class _Raw(io.RawIOBase):
    """A stream of bytes as Python's text layer wants it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._stream.read(len(into))
        into[: len(data)] = data
        return len(data)
