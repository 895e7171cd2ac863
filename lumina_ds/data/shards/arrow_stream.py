"""An Arrow IPC stream as record batches that are views of its bytes: nothing in it is expanded, whatever it says.

Arrow reads more than we write: compressed bodies, of which 100 kB expand to gigabytes; dictionaries; other columns than
were expected; and what follows the end mark it does not look at. All of that is refused here, before a body is touched.
Buffers longer than the stream are refused by validate(), since a read beyond a mapping's end kills the process.

    message        length, flatbuffer, body            https://arrow.apache.org/docs/format/Columnar.html (IPC)
    flatbuffer     table: offset back to its vtable    https://flatbuffers.dev/internals
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lumina_ds.foreign_files import open_plain

# A continuation mark and a length of zero.
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
# Fields of Message and of RecordBatch, by their place in Message.fbs.
_HEADER = 2
_COMPRESSION = 3


def file_buffer(path: Path, in_memory: bool = False) -> pa.Buffer:
    """A regular file, mapped, or read as a whole. Raises OSError or ForeignFileError.

    The mapping outlives its file object: every view keeps the buffer alive.
    """
    with open_plain(path, follow_links=False) as file:
        size = os.fstat(file.fileno()).st_size
        if not in_memory and size:
            return pa.py_buffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        content = bytearray(size)
        room, done = memoryview(content), 0
        while done < size and (count := file.readinto(room[done:])):
            done += count
        return pa.py_buffer(content).slice(0, done)


def record_batches(stream: pa.Buffer, schema: pa.Schema) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The stream's own schema, which has the fields of `schema` and may have metadata, and its batches.

    Raises pa.ArrowException or ValueError, whose text is a phrase, for anything that was not written here.
    """
    source = pa.BufferReader(stream)
    messages = _messages(source)
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise ValueError("it does not begin with a schema")
    own = pa.ipc.read_schema(first)
    if not own.equals(schema):
        raise ValueError("its columns are not those of a shard folder")
    batches = [_batch(message, own) for message in messages]
    end = source.tell()
    if end != len(stream) or stream[end - len(END_OF_STREAM) : end].to_pybytes() != END_OF_STREAM:
        raise ValueError("it does not end with its end mark")
    return own, batches


def _messages(source: pa.BufferReader) -> Iterator[Any]:
    reader = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _batch(message: Any, schema: pa.Schema) -> pa.RecordBatch:
    if message.type != "record batch":
        raise ValueError(f"it holds a message of type {message.type}")
    if _is_compressed(message.metadata.to_pybytes()):
        raise ValueError("its columns are compressed, which shards never are")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate()
    if any(column.null_count for column in batch.columns):
        raise ValueError("values are missing")
    return batch


def _is_compressed(message: bytes) -> bool:
    """Whether a RecordBatch's field `compression` is there. Arrow has verified the flatbuffer; an error of ours is damage."""
    try:
        (root,) = struct.unpack_from("<I", message)
        place = _field(message, root, _HEADER)
        assert place is not None, "a message without a header has no type either"
        (distance,) = struct.unpack_from("<I", message, place)
        return _field(message, place + distance, _COMPRESSION) is not None
    except struct.error as error:
        raise ValueError(f"a message is damaged ({error})") from None


def _field(message: bytes, table: int, number: int) -> int | None:
    """Where a table's field stands; None where it has none."""
    (back,) = struct.unpack_from("<i", message, table)
    (size,) = struct.unpack_from("<H", message, table - back)
    entry = 4 + 2 * number
    if entry >= size:
        return None
    (offset,) = struct.unpack_from("<H", message, table - back + entry)
    return table + offset if offset else None
