"""What a file of lines is packed in, found by its first bytes: compression, a byte order mark, a JSON array.

Whatever comes out is a stream of lines, read piece by piece, so memory stays bounded. Names are not asked: they may be
wrong, and standard input has none.
"""

from __future__ import annotations

import logging
import lzma
import re
from collections.abc import Callable
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from lumina_ds.errors import DataError

log = logging.getLogger("lumina_ds.preprocess")

# Text compresses to a tenth or so; nothing written by people or models comes near this factor over so long a stretch.
MAX_EXPANSION = 250
EXPANSION_FREE_BYTES = 256 << 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PIECE_BYTES = 1 << 16

# Magic numbers; a zstd file may begin with a skippable frame, as pzstd writes them (RFC 8878, 3.1.2).
_CODECS = {
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"): "zstd",
    re.compile(rb"BZh[1-9]"): "bz2",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
}
_ARCHIVES = {
    re.compile(rb"PK\x03\x04"): "a zip archive; unzip it and name the files in it",
    re.compile(rb".{257}ustar", re.DOTALL): "a tar archive; unpack it (tar -xf) and name the files in it",
    re.compile(rb"7z\xbc\xaf"): "a 7z archive; unpack it and name the files in it",
    re.compile(rb"PAR1"): "a Parquet file; write it as JSONL: "
    "python -c \"import sys, pandas; pandas.read_parquet(sys.argv[1]).to_json('out.jsonl', orient='records', lines=True)\"",
    re.compile(rb"ARROW1|\xff\xff\xff\xff"): "an Arrow file; write it as JSONL, for instance with "
    "datasets.Dataset.from_file(...).to_json('out.jsonl')",
}
_HEAD_BYTES = 512


def open_lines(file: BinaryIO, raw: Any, shown: object) -> LineStream:
    """The lines within `raw`, which counts what is read of `file`. Raises DataError for an archive or a table."""
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]  # type: ignore[attr-defined]
    codec = next((name for magic, name in _CODECS.items() if magic.match(head)), None)
    stream = raw if codec is None else _Decompressed(_decoder(codec, raw), raw)
    return LineStream(stream, shown)


class LineStream:
    """Lines of a decompressed stream, whose byte order mark is read over. Each element of a JSON array is a line.

    Line breaks within an element become spaces, so that element N stands in line N as it would in JSONL.
    """

    def __init__(self, stream: Any, shown: object) -> None:
        self._stream = stream
        # Enough to see a container; more of it than the beginning of a JSON array need not be white space.
        self._head = _read_fully(stream, _HEAD_BYTES)
        if fault := next((text for magic, text in _ARCHIVES.items() if magic.match(self._head)), None):
            raise DataError(f"{shown} is {fault}")
        self._head = self._head.removeprefix(_BYTE_ORDER_MARK)
        self._array = _ArraySplitter() if re.match(rb"\s*\[\s*\{", self._head) else None

    @property
    def is_bomb(self) -> bool:
        return isinstance(self._stream, _Decompressed) and self._stream.is_bomb

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end alone."""
        while data := self._read(size):
            if self._array is None or (data := self._array.split(data)):
                return data
        return b""

    def _read(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._stream.read(size)


class _ArraySplitter:
    """Turns the text of a JSON array into lines, piece by piece. state: depth, within a string, after a backslash."""

    def __init__(self) -> None:
        self._state = np.zeros(3, np.int64)

    def split(self, data: bytes) -> bytes:
        out = np.empty(len(data), np.uint8)
        return out[: _splitter()(np.frombuffer(data, np.uint8), out, self._state)].tobytes()


@cache
def _splitter() -> Callable[..., int]:
    try:
        import numba

        return numba.njit(cache=True, nogil=True)(_split)
    except (ImportError, RuntimeError) as error:  # not there, or nowhere to keep its code
        log.info("reading JSON arrays without compiled code, many times slower: %s", error)
        return _split


def _split(data: np.ndarray, out: np.ndarray, state: np.ndarray) -> int:
    """Write the elements of the array as lines; the number of bytes written. What follows the array stays as it is."""
    depth, in_string, is_escaped = state[0], state[1], state[2]
    to = 0
    for i in range(len(data)):
        byte = np.int64(data[i])
        written = byte
        if in_string == 1:
            if is_escaped == 1:
                is_escaped = 0
            elif byte == 0x5C:
                is_escaped = 1
            elif byte == 0x22:
                in_string = 0
        elif byte == 0x22:
            in_string = 1
        elif byte == 0x5B or byte == 0x7B:  # [ {
            depth += 1
            if depth == 1 and byte == 0x5B:
                continue
        elif byte == 0x5D or byte == 0x7D:  # ] }
            depth -= 1
            if depth == 0 and byte == 0x5D:
                written = 0x0A
        elif byte == 0x2C and depth == 1:  # the comma between two elements
            written = 0x0A
        elif (byte == 0x0A or byte == 0x0D) and depth > 0:
            written = 0x20
        out[to] = written
        to += 1
    state[0], state[1], state[2] = depth, in_string, is_escaped
    return to


def _read_fully(stream: Any, size: int) -> bytes:
    pieces: list[bytes] = []
    missing = size
    while missing and (piece := stream.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _decoder(codec: str, raw: Any) -> Any:
    if codec == "xz":
        return lzma.LZMAFile(raw)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)


class _Decompressed:
    """A decompressing stream that ends early, with `is_bomb` set, when a little input turns into far too much."""

    def __init__(self, stream: Any, raw: Any) -> None:
        self._stream = stream
        self._raw = raw
        self._num_bytes = 0
        self.is_bomb = False

    def read(self, size: int) -> bytes:
        if self._num_bytes > max(EXPANSION_FREE_BYTES, MAX_EXPANSION * self._raw.num_bytes):
            self.is_bomb = True
            return b""
        data: bytes = self._stream.read(size)
        self._num_bytes += len(data)
        return data
