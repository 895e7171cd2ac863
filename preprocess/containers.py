"""What a file of lines is packed in, found by its first bytes: compression, a byte order mark, a JSON array.

Whatever comes out is a stream of lines, read piece by piece, so memory stays bounded. Names are not asked: they may be
wrong, and standard input has none.
"""

from __future__ import annotations

import bz2
import lzma
import re
from collections.abc import Callable
from typing import Any

from lumina_ds.errors import DataError
from preprocess.json_array import ArraySplitter

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
# So much white space may stand before the first element of an array.
_MOST_SPACE_BYTES = 1 << 20
_MAYBE_ARRAY = re.compile(rb"\s*(\[\s*)?")


def open_lines(raw: Any, shown: object) -> LineStream:
    """The lines within `raw`, which counts what is read of it. Raises DataError for an archive or a table."""
    head = raw.peek(_HEAD_BYTES)
    codec = next((name for magic, name in _CODECS.items() if magic.match(head)), None)
    stream = raw if codec is None else _Decompressed(_decoder(codec, raw), raw)
    return LineStream(stream, shown)


class LineStream:
    """Lines of a decompressed stream, whose byte order mark is read over. Each element of a JSON array is a line.

    Line breaks within an element become spaces, so that element N stands in line N as it would in JSONL. What
    follows the array, such as further lines or arrays, is read too.
    """

    def __init__(self, stream: Any, shown: object) -> None:
        self._stream = stream
        self._head = read_fully(stream, _HEAD_BYTES)
        if fault := next((text for magic, text in _ARCHIVES.items() if magic.match(self._head)), None):
            raise DataError(f"{shown} is {fault}")
        self._head = self._head.removeprefix(_BYTE_ORDER_MARK)
        while _MAYBE_ARRAY.fullmatch(self._head) and len(self._head) < _MOST_SPACE_BYTES:
            if not (more := stream.read(_PIECE_BYTES)):
                break
            self._head += more
        self._array = ArraySplitter() if re.match(rb"\s*\[\s*\{", self._head) else None

    @property
    def is_bomb(self) -> bool:
        return isinstance(self._stream, _Decompressed) and self._stream.is_bomb

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end alone. Raises EOFError where an array is damaged."""
        data = self._read(size)
        if self._array is None or self.is_bomb:
            return data
        return self._array.split(data)

    def _read(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._stream.read(size)


def read_fully(stream: Any, size: int) -> bytes:
    """read() may return less than asked for; what is found must not depend on that."""
    pieces: list[bytes] = []
    missing = size
    while missing and (piece := stream.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _decoder(codec: str, raw: Any) -> Any:
    if codec == "xz":
        return _Streams(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), raw, padding_unit=4)
    if codec == "bz2":
        return _Streams(bz2.BZ2Decompressor, raw)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)


class _Streams:
    """The text of compressed streams that follow one another, with zeros between and after them.

    Anything else there is an error: lzma.LZMAFile takes it for the end of the file and says nothing.
    """

    def __init__(self, new_decoder: Callable[[], Any], raw: Any, padding_unit: int = 1) -> None:
        self._new_decoder = new_decoder
        self._raw = raw
        self._padding_unit = padding_unit
        self._decoder = new_decoder()
        self._pending = b""
        self._at_end = False

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises EOFError, LZMAError or OSError for damaged streams."""
        while not self._at_end:
            if self._decoder.eof:
                self._begin_next()
                continue
            data, self._pending = self._pending, b""
            if not data and self._decoder.needs_input and not (data := self._raw.read(_PIECE_BYTES)):
                raise EOFError("the compressed file ends too early")
            if text := self._decoder.decompress(data, size):
                return text
        return b""

    def _begin_next(self) -> None:
        data, num_zeros = self._decoder.unused_data, 0
        while not self._at_end and not data.strip(b"\0"):
            num_zeros += len(data)
            data = self._raw.read(_PIECE_BYTES)
            self._at_end = not data
        self._pending = data.lstrip(b"\0")
        num_zeros += len(data) - len(self._pending)
        if num_zeros % self._padding_unit:
            raise EOFError(f"{num_zeros} zeros after a compressed stream, which is no multiple of {self._padding_unit}")
        self._decoder = self._new_decoder()


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
