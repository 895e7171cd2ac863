"""JSON arrays as lines: each element becomes a line, byte for byte in its place, in bounded memory.

Elements are told apart by brackets, strings and commas alone; whether each of them is JSON, its reader finds out.
An array in which they cannot be told apart is refused as a whole: it would lose elements without a count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np

log = logging.getLogger("lumina_ds.preprocess")

# Where in the text the splitter is; below zero: why it cannot go on.
_LINE_START, _IN_LINE, _IN_ARRAY, _AFTER_ARRAY = range(4)
_UNBALANCED, _COMMA_MISSING = -1, -2
_FAULTS = {
    _UNBALANCED: "the JSON array does not end, or its brackets do not match",
    _COMMA_MISSING: "a comma is missing between two elements of the JSON array",
}


class ArraySplitter:
    """Turns the text of a JSON array into lines, piece by piece."""

    def __init__(self) -> None:
        self._state = np.zeros(5, np.int64)

    def split(self, data: bytes) -> bytes:
        """As many bytes, with line ends between elements; `data` is empty at the end. Raises EOFError."""
        out = np.empty(len(data), np.uint8)
        _splitter()(np.frombuffer(data, np.uint8), out, self._state)
        place = int(self._state[0]) if data or self._state[0] != _IN_ARRAY else _UNBALANCED
        if place in _FAULTS:
            raise EOFError(_FAULTS[place])
        return out.tobytes()


@cache
def _splitter() -> Callable[..., None]:
    try:
        import numba

        return numba.njit(cache=True, nogil=True)(_split)
    except (ImportError, RuntimeError) as error:  # not there, or nowhere to keep its code
        log.info("reading JSON arrays without compiled code, many times slower: %s", error)
        return _split


def _split(data: np.ndarray, out: np.ndarray, state: np.ndarray) -> None:
    """Write the elements of arrays as lines and other lines as they are; every byte keeps its place.

    state: place, open brackets of the element, within a string, after a backslash, after a whole element.
    A bracket without a counterpart ends the work: what follows can no longer be told apart.
    """
    place, depth, in_string, is_escaped, is_complete = state[0], state[1], state[2], state[3], state[4]
    for i in range(len(data)):
        byte = np.int64(data[i])
        is_space = byte == 0x20 or byte == 0x0A or byte == 0x0D or byte == 0x09
        out[i] = byte
        if place < 0:
            break
        if place != _IN_ARRAY:
            if byte == 0x5B and place != _IN_LINE:  # [
                place, depth, is_complete, out[i] = _IN_ARRAY, 0, 0, 0x20
            elif place == _AFTER_ARRAY:
                out[i] = 0x20  # the bracket before it has become the end of this line
                place = _UNBALANCED if not is_space else _LINE_START if byte == 0x0A else place
            elif not is_space or byte == 0x0A:
                place = _LINE_START if byte == 0x0A else _IN_LINE
        elif in_string == 1:
            if is_escaped == 1:
                is_escaped = 0
            elif byte == 0x5C:
                is_escaped = 1
            elif byte == 0x22:
                in_string = 0
        elif byte == 0x22:
            in_string = 1
        elif byte == 0x5C:  # stands in strings alone, so a quote is missing before
            place = _UNBALANCED
        elif byte == 0x5B or byte == 0x7B:  # [ {
            if depth == 0 and is_complete == 1:
                place = _COMMA_MISSING
            depth += 1
        elif byte == 0x5D or byte == 0x7D:  # ] }
            depth -= 1
            is_complete = 1
            if depth < 0:
                place, out[i] = _AFTER_ARRAY if byte == 0x5D else _UNBALANCED, 0x0A
        elif byte == 0x2C and depth == 0:  # the comma between two elements
            is_complete, out[i] = 0, 0x0A
        elif is_space:
            out[i] = 0x20
    state[0], state[1], state[2], state[3], state[4] = place, depth, in_string, is_escaped, is_complete
