"""Write a shard folder: Arrow files hashed while they are written, and a rename that publishes all at once.

Shards are uncompressed Arrow IPC streams, the form that `datasets.Dataset.from_file` opens and that maps
into memory without a copy. Arrow does not notice damage, so sizes, row counts and digests go to the manifest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from lumina_ds.data.manifest import FileEntry, ShardEntry
from lumina_ds.files import sync_folder


def shard_schema(vocab_size: int) -> pa.Schema:
    """Columns of a shard; ids take two bytes where the vocabulary lets them."""
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    return pa.schema(
        [
            pa.field("input_ids", pa.list_(ids), nullable=False),
            pa.field("loss_mask", pa.list_(pa.uint8()), nullable=False),
            pa.field("num_tokens", pa.int32(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("line", pa.int64(), nullable=False),
        ]
    )


class ShardWriter:
    """Appends record batches; a new file begins once the current one has reached `shard_bytes` (None: never)."""

    def __init__(self, folder: Path, schema: pa.Schema, shard_bytes: int | None) -> None:
        self._folder = folder
        self._schema = schema
        self._shard_bytes = shard_bytes
        self._open: _OpenShard | None = None
        self.shards: list[ShardEntry] = []

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows == 0:
            return
        if self._open is None:
            self._open = _OpenShard(self._folder / f"shard-{len(self.shards):05d}.arrow", self._schema)
        self._open.write(batch)
        if self._shard_bytes is not None and self._open.sink.size_bytes >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Seal the file being written, if any."""
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None


class HashingFile:
    """A binary file that knows the size and SHA-256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.path = path
        self.size_bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._hash.update(data)
        written = self._file.write(data)
        self.size_bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.closed = True

    def entry(self) -> FileEntry:
        return FileEntry(file=self.path.name, size_bytes=self.size_bytes, sha256=self._hash.hexdigest())


def write_table(table: pa.Table, path: Path) -> FileEntry:
    """Write one table as an Arrow IPC stream."""
    sink = HashingFile(path)
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        writer.write_table(table)
    sink.close()
    return sink.entry()


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into; removed again unless publish() has renamed it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f"{out.name}.tmp-{uuid.uuid4().hex[:12]}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, out: Path) -> None:
    """Rename the finished folder to `out`, replacing what stands there."""
    sync_folder(staging)
    replaced = out.parent / f"{staging.name}-replaced"
    if out.exists():
        os.rename(out, replaced)
    os.rename(staging, out)
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class _OpenShard:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.sink = HashingFile(path)
        self._writer = pa.ipc.new_stream(pa.PythonFile(self.sink, mode="w"), schema)
        self._rows = 0
        self._tokens = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self._rows += batch.num_rows
        self._tokens += int(batch.column("num_tokens").to_numpy().sum())

    def close(self) -> ShardEntry:
        self._writer.close()
        self.sink.close()
        return ShardEntry(**self.sink.entry().model_dump(), rows=self._rows, tokens=self._tokens)
