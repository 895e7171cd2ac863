"""Compressed streams: gzip, zstd, bzip2 and xz, several one after the other, read piece by piece."""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any

# Text compresses to a tenth or so; nothing written by people or models comes near this factor over so long a stretch.
MAX_EXPANSION = 250
EXPANSION_FREE_BYTES = 256 << 20

_PIECE_BYTES = 1 << 16
# Magic numbers; a zstd file may begin with a skippable frame, as pzstd writes them (RFC 8878, 3.1.2).
_CODECS = {
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"): "zstd",
    re.compile(rb"BZh[1-9]"): "bz2",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
}


def decompressed(raw: Any, head: bytes) -> Any:
    """`raw` itself, or the stream of what is compressed in it; `head` is how it begins."""
    codec = next((name for magic, name in _CODECS.items() if magic.match(head)), None)
    return raw if codec is None else Decompressed(_decoder(codec, raw), raw)


class Decompressed:
    """A decompressing stream that ends early, with `is_bomb` set, when a little input turns into far too much."""

    def __init__(self, stream: Any, raw: Any) -> None:
        self._stream = stream
        self._raw = raw
        self._num_bytes = 0
        self.is_bomb = False

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises EOFError, OSError or LZMAError for damaged streams."""
        if self._num_bytes > max(EXPANSION_FREE_BYTES, MAX_EXPANSION * self._raw.num_bytes):
            self.is_bomb = True
            return b""
        data: bytes = self._stream.read(size)
        self._num_bytes += len(data)
        return data


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
    if codec == "gzip":
        return _Streams(_GzipMember, raw)
    return _Zstd(raw)


class _Zstd:
    """pyarrow's stream, which says how to read a frame that needs more memory than it gives one (2^27 bytes)."""

    def __init__(self, raw: Any) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except OSError as error:
            if "too much memory" not in str(error):
                raise
            raise EOFError(
                "its zstd window is above 128 MiB, which takes as much memory to read; "
                "give it as `zstd -dc --long=31 FILE | lumina ... -`, or compress it again without --long or --ultra"
            ) from error
        return data


class _GzipMember:
    """One member of a gzip file, with the attributes of bz2's and lzma's decoders."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    def decompress(self, data: bytes, size: int) -> bytes:
        try:
            return self._decoder.decompress(self._decoder.unconsumed_tail + data, size)
        except zlib.error as error:
            raise EOFError(f"damaged gzip data ({error})") from error


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
                raise EOFError("Truncated compressed stream")
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
