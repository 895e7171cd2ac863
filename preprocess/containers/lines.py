"""What an input of lines is packed in, found by its first bytes: compression, a byte order mark, an array, a table.

Whatever comes out is a stream of lines, read piece by piece, so memory stays bounded. Names are asked about CSV and TSV
alone: others may be wrong, and standard input has none.
"""

from __future__ import annotations

import re
import tempfile
from typing import Any

from lumina_ds.errors import DataError
from preprocess.containers.compression import Decompressed, decompressed, read_fully
from preprocess.containers.json_array import ArraySplitter
from preprocess.containers.rows import RowStream
from preprocess.containers.separated import find_separator, separated_lines

# What `lumina data formats` says of each.
CONTAINERS: dict[str, str] = {
    "jsonl": "one JSON object a line",
    "array": "one JSON array of objects, in any layout",
    "gzip, zstd, bzip2, xz": "any other container of this table, compressed",
    "parquet": "rows; a null stands for a key that the row does not have",
    "arrow": "an IPC file or stream; Feather too",
    "csv, tsv": "a header with the names of the keys; lists such as `messages` are JSON in their cell; an empty cell is none",
    "save_to_disk": "the folder that datasets.Dataset.save_to_disk wrote; of a DatasetDict, one split's folder",
}

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PIECE_BYTES = 1 << 16
_PARQUET = b"PAR1"
_ARROW = re.compile(
    rb"ARROW1\0\0|\xff\xff\xff\xff...\0", re.DOTALL
)  # a stream: its first message and that one's length
_FEATHER_1 = b"FEA1"
_NO_TABLES = {
    re.compile(
        rb"PK[\x03\x05\x07]"
    ): "a zip archive; unzip it and name the files in it (of a workbook, save a sheet as CSV)",
    re.compile(rb".{257}ustar", re.DOTALL): "a tar archive; unpack it (tar -xf) and name the files in it",
    re.compile(rb"7z\xbc\xaf"): "a 7z archive; unpack it and name the files in it",
    re.compile(rb"Rar!"): "a rar archive; unpack it and name the files in it",
    re.compile(rb"\x04\x22\x4d\x18"): "compressed by lz4; decompress it first (lz4 -d)",
    re.compile(rb"PARE"): "an encrypted Parquet file; write it without encryption",
    re.compile(rb"ORC"): "an ORC file; write it as Parquet",
    re.compile(rb"Obj\x01"): "an Avro file; write it as Parquet or JSONL",
    re.compile(rb"SQLite format 3\0"): "an SQLite database; write its rows as JSONL or CSV",
    re.compile(rb"\x89HDF"): "an HDF5 file; write it as Parquet or JSONL",
    re.compile(rb"\xff\xfe|\xfe\xff"): "UTF-16: it starts with the byte order mark of UTF-16; convert it to UTF-8 "
    "(iconv -f UTF-16 -t UTF-8)",
}
_HEAD_BYTES = 512
_HEADER_BYTES = 1 << 16
# So much white space may stand before the first element of an array.
_MOST_SPACE_BYTES = 1 << 20
_MAYBE_ARRAY = re.compile(rb"\s*(\[\s*)?")


def open_lines(raw: Any, shown: object, name: str = "") -> LineStream | RowStream:
    """The lines within `raw`, which counts what is read of it; `name` tells CSV and TSV. Raises DataError.

    An archive or a kind of table that is not read is named with what to do.
    """
    stream = decompressed(raw, raw.peek(_HEAD_BYTES))
    head = read_fully(stream, _HEAD_BYTES)
    if head.startswith((_PARQUET, _FEATHER_1)):
        from preprocess.containers.arrow_rows import feather_v1_lines, parquet_lines

        file = _seekable(stream, head, raw)
        return RowStream((parquet_lines if head.startswith(_PARQUET) else feather_v1_lines)(file), stream)
    if _ARROW.match(head):
        from preprocess.containers.arrow_rows import arrow_lines

        return RowStream(arrow_lines(_Again(stream, head)), stream)
    if fault := next((text for magic, text in _NO_TABLES.items() if magic.match(head)), None):
        raise DataError(f"{shown} is {fault}")
    head = head.removeprefix(_BYTE_ORDER_MARK)
    if not head.lstrip().startswith((b"{", b"[")):
        if b"\n" not in head:
            head += read_fully(stream, _HEADER_BYTES)
        if separator := find_separator(head, name):
            return RowStream(separated_lines(_Again(stream, head), separator, shown), stream)
    return LineStream(stream, head)


class LineStream:
    """Lines of a decompressed stream. Each element of a JSON array is a line.

    Line breaks within an element become spaces, so that element N stands in line N as it would in JSONL. What
    follows the array, such as further lines or arrays, is read too.
    """

    def __init__(self, stream: Any, head: bytes) -> None:
        """head: what was read of the stream already, without a byte order mark."""
        self._stream = stream
        self._head = head
        while _MAYBE_ARRAY.fullmatch(self._head) and len(self._head) < _MOST_SPACE_BYTES:
            if not (more := stream.read(_PIECE_BYTES)):
                break
            self._head += more
        self._array = ArraySplitter() if re.match(rb"\s*\[\s*\{", self._head) else None

    @property
    def is_bomb(self) -> bool:
        return isinstance(self._stream, Decompressed) and self._stream.is_bomb

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


class _Again:
    """A stream whose head, read already, comes first once more."""

    def __init__(self, stream: Any, head: bytes) -> None:
        self._stream = stream
        self._head = head

    def read(self, size: int, /) -> bytes:
        if self._head:
            begin, self._head = self._head[:size], self._head[size:]
            return begin
        data: bytes = self._stream.read(size)
        return data


def _seekable(stream: Any, head: bytes, raw: Any) -> Any:
    """A file of all of `stream` for what begins to be read at its end, after all of `raw` has passed by once.

    It is the input itself where that is such a file, else a copy on the disk, which goes with the process.
    """
    if stream is raw and raw.is_seekable:
        while stream.read(_PIECE_BYTES):
            pass
        return raw.rewound()
    file = tempfile.TemporaryFile()
    again = _Again(stream, head)
    while data := again.read(_PIECE_BYTES):
        file.write(data)
    file.seek(0)
    return file
