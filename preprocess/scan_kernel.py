"""The compiled scanner of scan.py: lines of JSON to the UTF-8 of their turns, without a Python object on the way.

It knows all of JSON, and accepts a line only where nothing about it is unusual: no key with an escape or twice, no
number that could be out of range, no lone surrogate, nothing nested deeply, no key of turn_keys.py, no role of tools,
no part of a content. Where it meets
anything else it gives up on the line, and the strict parser of lumina_ds.data.conversation says what is the matter, so
it needs no reasons.

numba compiles this at first use, as it does tokenizer/kernel.py. Import it only where numba may be missing. All of it
stands in one file, and what other modules say is an argument (`words`), because numba compiles anew only when a
function's own file has changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from lumina_ds.data.conversation import KEYS_BESIDE
from lumina_ds.data.formats import ANSWER_KEYS
from lumina_ds.data.messages import MESSAGE_ROLES, SHAREGPT_ROLES
from lumina_ds.data.strict_json import MAX_LINE_BYTES
from lumina_ds.data.tokenizer.tokenizer import ROLES
from lumina_ds.data.turn_keys import HARMLESS_KEYS, TURN_KEYS

# What `progress` holds: how far the block is read, and how much stands in each output.
POSITION, LINE, TEXT_BYTES, TURNS, ROWS, SPACE_SYMBOLS, OTHER_KEYS, OTHER_KEY_LINES = range(8)
# Keys of open objects, and the open objects themselves: more is for the strict parser, which knows the real limits.
MAX_KEYS = 64
# Names of keys that mean nothing here; a line with another one is for the strict parser.
MAX_OTHER_KEYS = 32
# What a row of `other_keys` holds: where the name stands, how often it was met, and how often before this line.
_BEGIN, _END, _COUNT, _COUNT_BEFORE = range(4)
_MAX_NUMBER_CHARACTERS = 300

_QUOTE, _BACKSLASH, _COLON, _COMMA, _NEWLINE = (ord(character) for character in '"\\:,\n')
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_LIST, _CLOSE_LIST = (ord(character) for character in "{}[]")
_MINUS, _PLUS, _POINT, _ZERO, _NINE = (ord(character) for character in "-+.09")
_NO_ROLE = 255


def _word(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


_MESSAGES, _ROLE, _CONTENT = _word("messages"), _word("role"), _word("content")
_CONVERSATIONS, _FROM, _VALUE = _word("conversations"), _word("from"), _word("value")
_TRUE, _FALSE, _NULL = _word("true"), _word("false"), _word("null")
# ASCII that stands for itself within a string.
_IS_PLAIN = np.array([0x20 <= byte < 0x80 and byte not in (_QUOTE, _BACKSLASH) for byte in range(256)])
# What follows a backslash, and the byte that it stands for.
_ESCAPES = np.zeros(256, np.uint8)
for _letter, _meaning in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True):
    _ESCAPES[ord(_letter)] = ord(_meaning)


class Words(NamedTuple):
    """What other modules say. Names stand one per row, filled up with NUL."""

    top_level: np.ndarray  # keys that change what is trained, or may, beside the turns
    turn: np.ndarray  # the same at a turn
    harmless: np.ndarray  # keys that are not counted
    roles: np.ndarray  # those that only ShareGPT's form knows stand last
    role_codes: np.ndarray  # [roles] places in tokenizer.ROLES
    num_message_roles: int
    assistant: int
    max_line_bytes: int


@cache
def known_words() -> Words:
    names = sorted(SHAREGPT_ROLES, key=lambda name: name not in MESSAGE_ROLES)
    return Words(
        _rows((KEYS_BESIDE | ANSWER_KEYS) - HARMLESS_KEYS),
        _rows((TURN_KEYS | {"role", "content", "from", "value"}) - HARMLESS_KEYS),
        _rows(HARMLESS_KEYS),
        _rows(names),
        np.array([ROLES.index(SHAREGPT_ROLES[name]) for name in names], np.uint8),
        len(MESSAGE_ROLES),
        ROLES.index("assistant"),
        MAX_LINE_BYTES,
    )


def _rows(names: Iterable[str]) -> np.ndarray:
    words = [name.encode() for name in names]
    width = max(map(len, words)) + 1  # a NUL at the end of each
    return np.array([list(word.ljust(width, b"\0")) for word in words], np.uint8)


@numba.njit(cache=True, nogil=True)
def scan_lines(
    words: Words,
    data: np.ndarray,
    progress: np.ndarray,
    text: np.ndarray,
    offsets: np.ndarray,
    roles: np.ndarray,
    first_turns: np.ndarray,
    lines: np.ndarray,
    keys: np.ndarray,
    other_keys: np.ndarray,
) -> bool:
    """Read lines from progress[POSITION] on; True at the end of `data`, False before a line to be looked at.

    words: known_words(). data: uint8, whole lines, the last one with its line end too. Appended to: text: uint8, a space before each content;
    offsets: int64 [turns + 1], where that space stands; roles: uint8 [turns], of tokenizer.ROLES; first_turns:
    int64 [rows + 1]; lines: int64 [rows]. keys: int64 [MAX_KEYS, 2], working memory.
    other_keys: int64 [MAX_OTHER_KEYS, 4], names that were met in accepted lines and mean nothing here.
    """
    while progress[POSITION] < len(data):
        begin = progress[POSITION]
        position = _space(data, begin)
        if data[position] != _NEWLINE:
            turns = progress[TURNS]
            num_others = progress[OTHER_KEYS]
            for other in range(num_others):
                other_keys[other, _COUNT_BEFORE] = other_keys[other, _COUNT]
            position, num_turns, num_bytes, num_symbols = _document(
                words, data, position, text, offsets, roles, turns, progress, keys, other_keys
            )
            if position < 0 or position - begin > words.max_line_bytes:
                for other in range(num_others):
                    other_keys[other, _COUNT] = other_keys[other, _COUNT_BEFORE]
                progress[OTHER_KEYS] = num_others
                return False
            for other in range(progress[OTHER_KEYS]):
                if other >= num_others or other_keys[other, _COUNT] > other_keys[other, _COUNT_BEFORE]:
                    progress[OTHER_KEY_LINES] += 1
                    break
            row = progress[ROWS]
            lines[row] = progress[LINE]
            first_turns[row + 1] = num_turns
            progress[ROWS], progress[TURNS], progress[TEXT_BYTES] = row + 1, num_turns, num_bytes
            progress[SPACE_SYMBOLS] += num_symbols
        progress[POSITION] = position + 1
        progress[LINE] += 1
    return True


@numba.njit(cache=True, nogil=True)
def _document(
    words: Words,
    data: np.ndarray,
    position: int,
    text: np.ndarray,
    offsets: np.ndarray,
    roles: np.ndarray,
    num_turns: int,
    progress: np.ndarray,
    keys: np.ndarray,
    other_keys: np.ndarray,
) -> tuple[int, int, int, int]:
    """(position of the line end or -1, turns, bytes of text, U+2581 in it) after one line's object."""
    failed = (-1, 0, 0, 0)
    num_bytes = progress[TEXT_BYTES]
    count = num_symbols = 0
    has_turns = False
    if data[position] != _OPEN_OBJECT:
        return failed
    while True:
        position = _key(data, _space(data, position + 1), keys, 0, count)
        if position < 0:
            return failed
        is_messages = _is_word(data, keys[count], _MESSAGES)
        count += 1
        if is_messages or _is_word(data, keys[count - 1], _CONVERSATIONS):
            if has_turns:
                return failed
            has_turns = True
            position, num_turns, num_bytes, num_symbols = _turns(
                words, data, position, is_messages, text, offsets, roles, num_turns, num_bytes, progress, keys,
                count, other_keys,
            )  # fmt: skip
        elif _count_other(data, keys[count - 1], words.top_level, words.harmless, progress, other_keys):
            position = _pass_value(data, position, keys, count)
        else:
            return failed
        if position < 0:
            return failed
        position = _space(data, position)
        if data[position] != _COMMA:
            break
    if data[position] != _CLOSE_OBJECT or not has_turns:
        return failed
    position = _space(data, position + 1)
    return (position, num_turns, num_bytes, num_symbols) if data[position] == _NEWLINE else failed


@numba.njit(cache=True, nogil=True)
def _turns(
    words: Words,
    data: np.ndarray,
    position: int,
    is_messages: bool,
    text: np.ndarray,
    offsets: np.ndarray,
    roles: np.ndarray,
    num_turns: int,
    num_bytes: int,
    progress: np.ndarray,
    keys: np.ndarray,
    first_key: int,
    other_keys: np.ndarray,
) -> tuple[int, int, int, int]:
    """As _document, for the list of messages."""
    failed = (-1, 0, 0, 0)
    num_symbols = 0
    has_assistant = False
    if data[position] != _OPEN_LIST:
        return failed
    while True:
        position = _space(data, position + 1)
        if data[position] != _OPEN_OBJECT:
            return failed
        role = _NO_ROLE
        begin = num_bytes
        count = first_key
        while True:
            position = _key(data, _space(data, position + 1), keys, first_key, count)
            if position < 0:
                return failed
            name = keys[count]
            count += 1
            if _is_word(data, name, _ROLE if is_messages else _FROM):
                role, position = _read_role(words, data, position, is_messages)
            elif _is_word(data, name, _CONTENT if is_messages else _VALUE):
                position, num_bytes, more_symbols = _content(data, position, text, num_bytes)
                num_symbols += more_symbols
            elif _count_other(data, name, words.turn, words.harmless, progress, other_keys):
                position = _pass_value(data, position, keys, count)
            else:
                return failed
            if position < 0:
                return failed
            position = _space(data, position)
            if data[position] != _COMMA:
                break
        # A content of no bytes leaves its space alone.
        if data[position] != _CLOSE_OBJECT or role == _NO_ROLE or num_bytes < begin + 2:
            return failed
        has_assistant |= role == words.assistant
        roles[num_turns] = role
        num_turns += 1
        offsets[num_turns] = num_bytes
        position = _space(data, position + 1)
        if data[position] != _COMMA:
            break
    if data[position] != _CLOSE_LIST or not has_assistant:
        return failed
    return position + 1, num_turns, num_bytes, num_symbols


@numba.njit(cache=True, nogil=True)
def _count_other(
    data: np.ndarray,
    name: np.ndarray,
    known: np.ndarray,
    harmless: np.ndarray,
    progress: np.ndarray,
    other_keys: np.ndarray,
) -> bool:
    """Count a key that is neither role nor content; False where it is one of `known`, or one name too many."""
    if _is_one_of(data, name, known):
        return False
    if _is_one_of(data, name, harmless):
        return True
    count = progress[OTHER_KEYS]
    for other in range(count):
        if _is_word(data, name, data[other_keys[other, _BEGIN] : other_keys[other, _END]]):
            other_keys[other, _COUNT] += 1
            return True
    if count == MAX_OTHER_KEYS:
        return False
    other_keys[count, _BEGIN], other_keys[count, _END], other_keys[count, _COUNT] = name[0], name[1], 1
    progress[OTHER_KEYS] += 1
    return True


@numba.njit(cache=True, nogil=True)
def _is_one_of(data: np.ndarray, name: np.ndarray, known: np.ndarray) -> bool:
    begin, size = name[0], name[1] - name[0]
    if size >= known.shape[1]:
        return False
    for row in range(len(known)):
        same = 0
        while same < size and known[row, same] == data[begin + same]:
            same += 1
        if same == size and known[row, same] == 0:
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _read_role(words: Words, data: np.ndarray, position: int, is_messages: bool) -> tuple[int, int]:
    """(role or _NO_ROLE, position after it or -1)."""
    if data[position] != _QUOTE:
        return _NO_ROLE, -1
    begin = position + 1
    for row in range(words.num_message_roles if is_messages else len(words.roles)):
        size = 0
        while words.roles[row, size] != 0 and data[begin + size] == words.roles[row, size]:
            size += 1
        if words.roles[row, size] == 0 and data[begin + size] == _QUOTE:
            return np.int64(words.role_codes[row]), begin + size + 1
    return _NO_ROLE, -1


@numba.njit(cache=True, nogil=True)
def _content(data: np.ndarray, position: int, text: np.ndarray, num_bytes: int) -> tuple[int, int, int]:
    """Write a space and the string at `position`, unescaped: (position after it or -1, bytes of text, U+2581 in it)."""
    failed = (-1, 0, 0)
    if data[position] != _QUOTE:
        return failed
    # Unsigned indices, here where nearly all the time is spent: numba adds a branch for negative ones.
    one = np.uint64(1)
    at, to = np.uint64(position + 1), np.uint64(num_bytes + 1)
    text[num_bytes] = 0x20
    num_symbols = 0
    while True:
        byte = data[at]
        while _IS_PLAIN[byte]:
            text[to] = byte
            to += one
            at += one
            byte = data[at]
        if byte == _QUOTE:
            return np.int64(at) + 1, np.int64(to), num_symbols
        if byte == _BACKSLASH:
            meaning = _ESCAPES[data[at + one]]
            if meaning:
                text[to] = meaning
                to += one
                at += np.uint64(2)
                continue
            code, size = _escape(data, np.int64(at))
            if size == 0:
                return failed
            at += np.uint64(size)
            to = np.uint64(_write_character(text, np.int64(to), code))
            num_symbols += code == 0x2581
            continue
        size = _character_size(data, np.int64(at))
        if size == 0:
            return failed
        num_symbols += byte == 0xE2 and data[at + one] == 0x96 and data[at + np.uint64(2)] == 0x81
        for _ in range(np.uint64(size)):
            text[to] = data[at]
            to += one
            at += one


@numba.njit(cache=True, nogil=True)
def _escape(data: np.ndarray, position: int) -> tuple[int, int]:
    """(code point, bytes) of the escape at `position`, a pair of surrogates as one; (0, 0) where it is none."""
    letter = data[position + 1]
    if letter != 0x75:  # u
        return (np.int64(_ESCAPES[letter]), 2) if _ESCAPES[letter] else (0, 0)
    code = _four_digits(data, position + 2)
    if code < 0 or 0xDC00 <= code < 0xE000:
        return 0, 0
    if code < 0xD800 or code >= 0xE000:
        return code, 6
    if data[position + 6] != _BACKSLASH or data[position + 7] != 0x75:
        return 0, 0
    low = _four_digits(data, position + 8)
    if low < 0xDC00 or low >= 0xE000:
        return 0, 0
    return 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00)), 12


@numba.njit(cache=True, nogil=True)
def _four_digits(data: np.ndarray, position: int) -> int:
    """The value of four hexadecimal digits, or -1."""
    value = 0
    for i in range(4):
        byte = np.int64(data[position + i])
        if _ZERO <= byte <= _NINE:
            digit = byte - _ZERO
        elif 0x61 <= byte | 0x20 <= 0x66:
            digit = (byte | 0x20) - 0x61 + 10
        else:
            return -1
        value = value << 4 | digit
    return value


@numba.njit(cache=True, nogil=True)
def _write_character(text: np.ndarray, to: int, code: int) -> int:
    """Write a code point as UTF-8; the position after it."""
    if code < 0x80:
        text[to] = code
        return to + 1
    if code < 0x800:
        text[to] = 0xC0 | code >> 6
        text[to + 1] = 0x80 | (code & 0x3F)
        return to + 2
    if code < 0x10000:
        text[to] = 0xE0 | code >> 12
        text[to + 1] = 0x80 | (code >> 6 & 0x3F)
        text[to + 2] = 0x80 | (code & 0x3F)
        return to + 3
    text[to] = 0xF0 | code >> 18
    text[to + 1] = 0x80 | (code >> 12 & 0x3F)
    text[to + 2] = 0x80 | (code >> 6 & 0x3F)
    text[to + 3] = 0x80 | (code & 0x3F)
    return to + 4


@numba.njit(cache=True, nogil=True)
def _character_size(data: np.ndarray, position: int) -> int:
    """Bytes of the character beyond ASCII at `position`, or 0 where it is not UTF-8 (RFC 3629's table)."""
    lead, second = data[position], data[position + 1]
    low, high = 0x80, 0xBF
    if 0xC2 <= lead <= 0xDF:
        size = 2
    elif 0xE0 <= lead <= 0xEF:
        size = 3
        low = 0xA0 if lead == 0xE0 else low
        high = 0x9F if lead == 0xED else high  # no surrogates
    elif 0xF0 <= lead <= 0xF4:
        size = 4
        low = 0x90 if lead == 0xF0 else low
        high = 0x8F if lead == 0xF4 else high
    else:
        return 0
    if second < low or second > high:
        return 0
    for i in range(2, size):
        if data[position + i] & 0xC0 != 0x80:
            return 0
    return size


@numba.njit(cache=True, nogil=True)
def _key(data: np.ndarray, position: int, keys: np.ndarray, first: int, count: int) -> int:
    """The position of the value whose key stands at `position`, or -1; the key becomes keys[count].

    keys[first:count] are the others of its object, none of which it may equal.
    """
    if data[position] != _QUOTE or count == MAX_KEYS:
        return -1
    begin = position + 1
    position = begin
    while _IS_PLAIN[data[position]]:
        position += 1
    if data[position] != _QUOTE:
        return -1
    keys[count, 0], keys[count, 1] = begin, position
    for other in range(first, count):
        if _is_word(data, keys[count], data[keys[other, 0] : keys[other, 1]]):
            return -1
    position = _space(data, position + 1)
    return _space(data, position + 1) if data[position] == _COLON else -1


@numba.njit(cache=True, nogil=True)
def _pass_value(data: np.ndarray, position: int, keys: np.ndarray, count: int) -> int:
    """The position after any value, or -1. keys[count:] is free to use.

    Besides keys, it holds for each open object or list what the one around it is: (its kind, its first key).
    """
    kind = 0  # the bracket of the innermost open one
    first = count
    while True:
        byte = data[position]
        if byte in (_OPEN_OBJECT, _OPEN_LIST):
            if count == MAX_KEYS:
                return -1
            keys[count, 0], keys[count, 1] = kind, first
            count += 1
            kind, first = np.int64(byte), count
            position = _space(data, position + 1)
            # Brackets of ASCII: the closing one is the opening one plus two.
            if data[position] != kind + 2:
                if kind == _OPEN_OBJECT:
                    position = _key(data, position, keys, first, count)
                    count += 1
                if position < 0:
                    return -1
                continue
        else:
            position = _pass_scalar(data, position)
            if position < 0:
                return -1
        while kind:
            position = _space(data, position)
            byte = data[position]
            if byte == _COMMA:
                position = _space(data, position + 1)
                if kind == _OPEN_OBJECT:
                    position = _key(data, position, keys, first, count)
                    count += 1
                    if position < 0:
                        return -1
                break
            if byte != kind + 2:
                return -1
            count = first - 1
            kind, first = keys[count, 0], keys[count, 1]
            position += 1
        else:
            return position


@numba.njit(cache=True, nogil=True)
def _pass_scalar(data: np.ndarray, position: int) -> int:
    """The position after a string, a number, true, false or null; or -1."""
    byte = data[position]
    if byte == _QUOTE:
        return _pass_string(data, position + 1)
    if byte == _MINUS or _ZERO <= byte <= _NINE:
        return _pass_number(data, position)
    for word in (_TRUE, _FALSE, _NULL):
        if byte == word[0]:
            for i in range(len(word)):
                if data[position + i] != word[i]:
                    return -1
            return position + len(word)
    return -1


@numba.njit(cache=True, nogil=True)
def _pass_string(data: np.ndarray, position: int) -> int:
    while True:
        byte = data[position]
        if byte == _QUOTE:
            return position + 1
        if byte < 0x20:
            return -1
        if byte == _BACKSLASH:
            _, size = _escape(data, position)
        else:
            size = 1 if byte < 0x80 else _character_size(data, position)
        if size == 0:
            return -1
        position += size


@numba.njit(cache=True, nogil=True)
def _pass_number(data: np.ndarray, position: int) -> int:
    """Numbers without an exponent and of a bounded length, which are in any range."""
    begin = position
    if data[position] == _MINUS:
        position += 1
    whole = position
    position = _pass_digits(data, whole)
    if position == whole or (data[whole] == _ZERO and position > whole + 1):
        return -1
    if data[position] == _POINT:
        fraction = position + 1
        position = _pass_digits(data, fraction)
        if position == fraction:
            return -1
    # An exponent, or anything else that does not follow a value, is not taken here or by the caller.
    return position if position - begin <= _MAX_NUMBER_CHARACTERS else -1


@numba.njit(cache=True, nogil=True)
def _pass_digits(data: np.ndarray, position: int) -> int:
    while _ZERO <= data[position] <= _NINE:
        position += 1
    return position


@numba.njit(cache=True, nogil=True)
def _space(data: np.ndarray, position: int) -> int:
    """The position of the first byte that is no space within a line."""
    while data[position] == 0x20 or data[position] == 0x09 or data[position] == 0x0D:
        position += 1
    return position


@numba.njit(cache=True, nogil=True)
def _is_word(data: np.ndarray, place: np.ndarray, word: np.ndarray) -> bool:
    """Does `word` stand at data[place[0]:place[1]]?"""
    if place[1] - place[0] != len(word):
        return False
    for i in range(len(word)):  # noqa: SIM110  numba has no generator expressions
        if data[place[0] + i] != word[i]:
            return False
    return True
