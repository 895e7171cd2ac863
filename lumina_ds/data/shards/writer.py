"""Write a shard folder: Arrow files hashed while they are written, and a rename that publishes all at once.

Shards are uncompressed Arrow IPC streams, the form that `datasets.Dataset.from_file` opens and that maps
into memory without a copy. Arrow does not notice damage, so sizes, row counts and digests go to the manifest.

A writer can tell its position, and a later process can go on from there: a stream is the schema's message, one
message per record batch, and an end mark, so whatever follows a position can be cut off and written again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from lumina_ds.data.shards.arrow_stream import END_OF_STREAM
from lumina_ds.data.shards.manifest import FileEntry, ShardEntry
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.files import replace_folder


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


class FilePosition(NamedTuple):
    """How far a file is written, and the SHA-256 of that much of it."""

    size_bytes: int
    sha256: str


class OpenShard(NamedTuple):
    """Position in the shard that is being written."""

    position: FilePosition
    rows: int
    tokens: int


class ShardWriter:
    """Appends record batches; a new file begins once the current one has reached `shard_bytes` (None: never)."""

    def __init__(self, folder: Path, schema: pa.Schema, shard_bytes: int | None) -> None:
        self._folder = folder
        self._schema = schema
        self._shard_bytes = shard_bytes
        self._open: _ShardFile | None = None
        self.shards: list[ShardEntry] = []

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self.write_message(batch.serialize(), batch.num_rows, int(batch.column("num_tokens").to_numpy().sum()))

    def write_message(self, message: Any, rows: int, tokens: int) -> None:
        """Append a record batch that serialize() has turned into an Arrow IPC message."""
        if self._open is None:
            self._open = _ShardFile.create(self._path(len(self.shards)), self._schema)
        self._open.write(message, rows, tokens)
        if self._shard_bytes is not None and self._open.file.size_bytes >= self._shard_bytes:
            self.close()

    def position(self) -> OpenShard | None:
        """Where the shard being written stands; None between two shards."""
        return None if self._open is None else self._open.position()

    def resume(self, shards: list[ShardEntry], open_shard: OpenShard | None) -> None:
        """Go on in a folder that holds `shards`, and one more up to `open_shard`; what follows is cut off or removed.

        Raises ValueError, which names the file, when the folder holds something else.
        """
        for entry in shards:
            HashingFile.reopen(self._path(len(self.shards)), FilePosition(entry.size_bytes, entry.sha256)).close()
            self.shards.append(entry)
        if open_shard is not None:
            self._open = _ShardFile.reopen(self._path(len(self.shards)), open_shard)
        number = len(self.shards) + (self._open is not None)
        while self._path(number).exists():
            self._path(number).unlink()
            number += 1

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        if self._open is not None:
            self._open.file.sync()

    def close(self) -> None:
        """Seal the file being written, if any."""
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.arrow"


class HashingFile:
    """A binary file that knows the size and SHA-256 of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self.path = path
        self.size_bytes = 0
        self.closed = False

    @classmethod
    def reopen(cls, path: Path, position: FilePosition) -> HashingFile:
        """Cut the file off at `position` and go on from there. Raises ValueError when it is not what was written."""
        file = cls.__new__(cls)
        try:
            file._file = path.open("r+b")
        except FileNotFoundError:
            raise ValueError(f"{path.name} is missing") from None
        file._hash = hashlib.sha256()
        file.path, file.size_bytes, file.closed = path, 0, False
        while piece := file._file.read(min(1 << 20, position.size_bytes - file.size_bytes)):
            file._hash.update(piece)
            file.size_bytes += len(piece)
        if file.position() != position:
            file._file.close()
            raise ValueError(f"{path.name} is not what was written")
        file._file.seek(position.size_bytes)
        file._file.truncate()
        return file

    def position(self) -> FilePosition:
        return FilePosition(self.size_bytes, self._hash.copy().hexdigest())

    def write(self, data: Any) -> int:
        self._hash.update(data)
        written = self._file.write(data)
        self.size_bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk."""
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self.closed:
            self.sync()
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


def partial_folder(out: Path) -> Path:
    """Where an unfinished `out` is written."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def staging_folder(out: Path, keep_for: type[Exception] = MachineError) -> Iterator[Path]:
    """partial_folder(out), to write into; held by one process at a time.

    A process that is killed or interrupted, or that the machine or an error of kind `keep_for` ends, leaves it to the
    next one, which finds there what was written. It is removed after success, and after any other error. Raises ConfigError when another
    process is at work in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = partial_folder(out)
    with _exclusive(staging.with_name(f"{staging.name}.lock"), out):
        staging.mkdir(exist_ok=True)
        try:
            yield staging
        except (KeyboardInterrupt, MachineError, OSError, keep_for):
            raise
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _exclusive(lock: Path, out: Path) -> Iterator[None]:
    """Hold the lock file `lock`, and remove it at the end. The kernel frees it however the process ends."""
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another run is writing {out}; wait for it, or choose another --out") from None
            # Whoever held it before may have removed the file between our opening and locking it.
            if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def publish(staging: Path, out: Path) -> None:
    """Rename the finished folder to `out`, replacing what stands there."""
    replace_folder(staging, out, staging.with_name(f"{staging.name}-replaced"))


class _ShardFile:
    """One shard while it is written."""

    def __init__(self, file: HashingFile, rows: int, tokens: int) -> None:
        self.file = file
        self._rows = rows
        self._tokens = tokens

    @classmethod
    def create(cls, path: Path, schema: pa.Schema) -> _ShardFile:
        shard = cls(HashingFile(path), 0, 0)
        shard.file.write(schema.serialize())
        return shard

    @classmethod
    def reopen(cls, path: Path, at: OpenShard) -> _ShardFile:
        return cls(HashingFile.reopen(path, at.position), at.rows, at.tokens)

    def write(self, message: Any, rows: int, tokens: int) -> None:
        self.file.write(message)
        self._rows += rows
        self._tokens += tokens

    def position(self) -> OpenShard:
        return OpenShard(self.file.position(), self._rows, self._tokens)

    def close(self) -> ShardEntry:
        self.file.write(END_OF_STREAM)
        self.file.close()
        return ShardEntry(**self.file.entry().model_dump(), rows=self._rows, tokens=self._tokens)
