"""A finished shard folder, opened for reading: documents by number, and packing plans by row length.

    manifest.json  shard-00000.arrow ...  packing-SEQ.arrow  tokenizer.model or .json  rejected.jsonl
    [eval/]

How a folder is read goes by the size of its shards:

    memory     up to 500 MB: read into memory
    sharded    up to 10 GB: mapped, read from the page cache without a copy
    streaming  above, or on request: each shard is mapped when the first of its documents is asked for, and refused
               when it is no longer the file that was there at first

Opening checks that every shard is there with its size, and its rows and tokens where it is read or mapped at
once; streaming checks those at the first use. verify() reads every byte. Nothing per document is kept in Python.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from lumina_ds.data.packing import PackingPlan, pack
from lumina_ds.data.shards.arrow_columns import numbers, numpy_dtype
from lumina_ds.data.shards.manifest import (
    MANIFEST_FILE,
    READING_WITH_LABELS,
    FileEntry,
    Manifest,
    ShardEntry,
    read_manifest,
    read_with_digest,
)
from lumina_ds.data.shards.packing_file import packing_file, read_packing, write_packing
from lumina_ds.data.shards.writer import shard_schema
from lumina_ds.data.templates.find import NamedTemplate, template_of
from lumina_ds.data.tokenizer.tokenizer import Tokenizer, tokenizer_in
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from lumina_ds.text import counted

log = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
REPORT_FILE = "report.html"  # a user may put one here; it has no digest and is made again at will
EVAL_FOLDER = "eval"
MEMORY_LIMIT_BYTES = 500 << 20
SHARDED_LIMIT_BYTES = 10 << 30

ReadingMode = Literal["memory", "sharded", "streaming"]


class Origin(NamedTuple):
    """Where a document came from: the input's name and its 1-based line."""

    source: str
    line: int


class ShardFolder:
    """Documents of one shard folder. Build it with open()."""

    def __init__(self, path: Path, manifest: Manifest, mode: ReadingMode, digest: str) -> None:
        """`digest` is the SHA-256 of the manifest's file as it was read: what the folder is, whatever becomes of it."""
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self.mode = mode
        schema = shard_schema(manifest.tokenizer.vocab_size)
        self.ids_dtype: np.dtype = numpy_dtype(schema.field("input_ids").type.value_type)
        self._shards = [_Shard(path / entry.file, entry, schema, mode == "memory") for entry in manifest.shards]
        self._first_documents = list(accumulate((entry.rows for entry in manifest.shards), initial=0))
        self._firsts = np.array(self._first_documents)

    @classmethod
    def open(cls, path: str | Path, force_streaming: bool = False) -> ShardFolder:
        """Open a folder in the mode that its size or `force_streaming` asks for.

        Raises DataError that names the file when the folder is unfinished, incomplete or damaged.
        """
        path = Path(path)
        manifest, digest = read_with_digest(path)
        size_bytes = sum(shard.size_bytes for shard in manifest.shards)
        folder = cls(path, manifest, reading_mode(size_bytes, force_streaming), digest)
        for shard in folder._shards:
            shard.check_size()
            if folder.mode != "streaming":
                shard.load()
        return folder

    @property
    def num_documents(self) -> int:
        return self._first_documents[-1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64, gathered at every use: who plans rows needs them, who reads them does not."""
        lengths = [np.diff(batch.offsets) for shard in self._shards for batch in shard.load()]
        return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)

    @property
    def tokenizer_path(self) -> Path:
        return tokenizer_in(self.path)

    @property
    def template(self) -> NamedTemplate | None:
        """The chat template that the documents were made with; None where it is unknown here. Raises DataError."""
        return template_of(self.path, self.manifest.template.digest)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the documents were made with: under a model's own template without our markers."""
        tokenizer = Tokenizer.load(self.tokenizer_path)
        return tokenizer.without_markers() if self.manifest.template.certificate else tokenizer

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, loss mask) of one document: read-only views of uint16 or uint32, and of uint8."""
        batch, row = self._locate(index)
        begin, end = batch.offsets[row], batch.offsets[row + 1]
        return batch.ids[begin:end], batch.mask[begin:end]

    def gather(
        self,
        documents: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        places: np.ndarray,
        ids: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """Copy segment after segment (tokens start .. start+length-1 of a document) into flat `ids` and `mask`,
        each to its place.

        Short segments of a shard are copied all at once, by the index of every token; long ones one by one.
        """
        if lengths.sum() >= _LONG_SEGMENT * len(lengths):  # nothing at all, too
            columns = (documents, starts, lengths, places)
            for document, start, length, place in zip(*(column.tolist() for column in columns), strict=True):
                own_ids, own_mask = self.document(document)
                ids[place : place + length] = own_ids[start : start + length]
                mask[place : place + length] = own_mask[start : start + length]
            return
        shards = np.searchsorted(self._firsts, documents, side="right") - 1
        # A run: neighbours of one shard, without a gap between their places. Rows rarely need more than one.
        is_last = (shards[1:] != shards[:-1]) | (places[1:] != places[:-1] + lengths[:-1])
        ends = np.append(np.flatnonzero(is_last) + 1, len(shards))
        begin = 0
        for end in ends.tolist():
            run, number = slice(begin, end), int(shards[begin])
            rows = documents[run] - self._first_documents[number]
            self._shards[number].gather(rows, starts[run], lengths[run], places[run], ids, mask)
            begin = end

    def origin(self, index: int) -> Origin:
        batch, row = self._locate(index)
        return Origin(batch.table.column("source")[row].as_py(), batch.table.column("line")[row].as_py())

    def packing(self, seq_length: int) -> PackingPlan:
        """The plan for rows of `seq_length` tokens, in the mode the folder was made with.

        Read from the folder, or computed from the lengths and kept there where the folder is writable.
        """
        path = self.path / packing_file(seq_length)
        if path.exists():
            return read_packing(path)
        plan = self.compute_packing(seq_length)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            write_packing(plan, temporary)
            os.replace(temporary, path)
        except OSError as error:
            log.debug("the packing plan is not kept: %s", error)
            return plan
        return read_packing(path)

    def compute_packing(self, seq_length: int) -> PackingPlan:
        """The plan for rows of `seq_length` tokens, from the lengths, and from the masks of what is cut."""
        settings = self.manifest.settings
        lengths = self.lengths
        overlong = np.flatnonzero(lengths > seq_length)
        first_trained = np.zeros(self.num_documents, np.int64)
        first_trained[overlong] = [int(self.document(index)[1].argmax()) for index in overlong.tolist()]
        # A folder of an older version keeps the plan that it was made with.
        has_labels = self.has_labels if self.manifest.reading >= READING_WITH_LABELS else None
        return pack(lengths, first_trained, seq_length, settings.packing, settings.overlong, has_labels)

    def has_labels(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool [segments]: whether a token after the first of each segment is trained; the first has no predecessor."""
        found = np.zeros(len(documents), bool)
        columns = (documents.tolist(), starts.tolist(), lengths.tolist())
        for number, (document, start, length) in enumerate(zip(*columns, strict=True)):
            found[number] = self.document(document)[1][start + 1 : start + length].any()
        return found

    def verify(self) -> None:
        """Read every byte; raises DataError that names each damaged, missing or foreign file."""
        faults = folder_faults(self.path)
        if faults:
            raise DataError(f"{self.path} is damaged: {'; '.join(faults)}; {_REMEDY}")

    def _locate(self, index: int) -> tuple[_Batch, int]:
        number = bisect_right(self._first_documents, index) - 1
        return self._shards[number].locate(index - self._first_documents[number])


def reading_mode(size_bytes: int, force_streaming: bool = False) -> ReadingMode:
    """How shards of this size in all are read."""
    if force_streaming or size_bytes > SHARDED_LIMIT_BYTES:
        return "streaming"
    return "memory" if size_bytes <= MEMORY_LIMIT_BYTES else "sharded"


def folder_faults(path: Path) -> list[str]:
    """Read every byte of a shard folder and return one line per fault, each beginning with its file's name.

    An intact folder gives none. Raises DataError only where no manifest says what ought to be there.
    """
    manifest = read_manifest(path)
    entries: list[FileEntry] = [*manifest.shards, *manifest.files]
    faults = file_faults(path, entries)
    known = {entry.file for entry in entries} | {MANIFEST_FILE, EVAL_FOLDER, REPORT_FILE}
    has_sound_shards = not faults
    for file in sorted(path.iterdir()):
        if file.name in known or file.name.startswith("."):
            continue
        if not re.fullmatch(r"packing-\d+\.arrow", file.name):
            faults.append(f"{file.name}: not part of this folder")
        elif not _is_own_packing(path, file) if has_sound_shards else _is_damaged(file):
            faults.append(f"{file.name}: damaged, or made from other shards")
    return faults


def _is_own_packing(folder: Path, path: Path) -> bool:
    """A plan added later is in no manifest, but the shards tell every byte that it must hold."""
    shards = ShardFolder.open(folder, force_streaming=True)
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / path.name
        write_packing(shards.compute_packing(int(path.stem.removeprefix("packing-"))), expected)
        return file_digest(path) == file_digest(expected)


def _is_damaged(path: Path) -> bool:
    """What a plan's own digest tells, where damaged shards cannot vouch for it."""
    try:
        read_packing(path)
    except DataError:
        return True
    return False


def file_faults(folder: Path, entries: Sequence[FileEntry]) -> list[str]:
    """One line per file of `entries` that is missing, or whose size or SHA-256 is not the recorded one."""
    faults = []
    for entry in entries:
        path = folder / entry.file
        try:
            size = path.stat().st_size
            if size != entry.size_bytes:
                faults.append(f"{entry.file}: {size} bytes, not {entry.size_bytes}")
            elif file_digest(path) != entry.sha256:
                faults.append(f"{entry.file}: the content does not match its digest")
        except OSError as error:
            faults.append(f"{entry.file}: {error.strerror}")
    return faults


class _Batch(NamedTuple):
    offsets: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    table: pa.RecordBatch


class _Flat(NamedTuple):
    """A whole shard file as arrays of each of its types, and where in them the columns of each batch begin."""

    offsets: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    first_rows: np.ndarray
    starts_of: np.ndarray  # [batches, 3]: elements of `offsets`, `ids`, `mask`


class _Shard:
    """One shard file, read or mapped at its first use."""

    def __init__(self, path: Path, entry: ShardEntry, schema: pa.Schema, in_memory: bool) -> None:
        self._path = path
        self._entry = entry
        self._schema = schema
        self._in_memory = in_memory
        self._batches: list[_Batch] | None = None
        self._first_rows: list[int] = []
        self._flat: _Flat | None = None
        self._changed_at: int | None = None

    def check_size(self) -> None:
        """Raises DataError where the file is missing, has another size than the manifest says, or was rewritten since
        the last call with other content."""
        try:
            found = self._path.stat()
            is_another = (
                self._changed_at not in (None, found.st_mtime_ns) and file_digest(self._path) != self._entry.sha256
            )
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror}; {_REMEDY}") from error
        if found.st_size != self._entry.size_bytes:
            raise DataError(f"{self._path} is damaged: {found.st_size} bytes, not {self._entry.size_bytes}; {_REMEDY}")
        if is_another:
            raise DataError(f"{self._path} was replaced by another file since the folder was opened; {_REMEDY}")
        self._changed_at = found.st_mtime_ns

    def load(self) -> list[_Batch]:
        """The shard's record batches. Two threads may come here at once: both make the same."""
        if self._batches is None:
            self.check_size()  # again, for a streamed shard: reading beyond the end of a mapping kills the process
            batches, file = _read_shard(self._path, self._entry, self._schema, self._in_memory)
            self._first_rows = list(accumulate((len(batch.offsets) - 1 for batch in batches), initial=0))
            self._flat = _flat_view(batches, file, self._first_rows)
            self._batches = batches
        return self._batches

    def locate(self, row: int) -> tuple[_Batch, int]:
        batches = self._batches or self.load()
        number = bisect_right(self._first_rows, row) - 1
        return batches[number], row - self._first_rows[number]

    def gather(
        self,
        rows: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        places: np.ndarray,
        ids: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """As ShardFolder.gather, for rows of this shard."""
        self.load()
        flat = self._flat
        if flat is None or len(rows) < _MIN_TOGETHER:
            for row, start, length, place in zip(*(x.tolist() for x in (rows, starts, lengths, places)), strict=True):
                batch, own = self.locate(row)
                begin = batch.offsets[own] + start
                ids[place : place + length] = batch.ids[begin : begin + length]
                mask[place : place + length] = batch.mask[begin : begin + length]
            return
        batches = np.searchsorted(flat.first_rows, rows, side="right") - 1
        offsets_at, ids_at, mask_at = flat.starts_of[batches].T
        begins = flat.offsets[offsets_at + rows - flat.first_rows[batches]] + starts
        first, total = int(places[0]), int(lengths.sum())
        # Source of every token: its own number in the run, plus what its segment is away from the run's start.
        away = begins - (places - first)
        counter = np.arange(total)
        ids[first : first + total] = flat.ids[np.repeat(away + ids_at, lengths) + counter]
        mask[first : first + total] = flat.mask[np.repeat(away + mask_at, lengths) + counter]


# Fewer, or on average longer, segments are copied one by one.
_MIN_TOGETHER = 8
_LONG_SEGMENT = 256
_REMEDY = "restore it, or delete the folder and preprocess again"


def _flat_view(batches: list[_Batch], file: pa.Buffer, first_rows: list[int]) -> _Flat | None:
    """None where Arrow has put a column elsewhere, as it does with columns that the file does not align."""
    whole = np.frombuffer(file, np.uint8)
    base = whole.ctypes.data
    columns = [(batch.offsets, batch.ids, batch.mask) for batch in batches if len(batch.ids)]
    if len(columns) != len(batches):
        return None
    bytes_at = np.array([[column.ctypes.data - base for column in each] for each in columns], np.int64)
    sizes = np.array([column.itemsize for column in columns[0]]) if columns else np.ones(3, np.int64)
    if not columns or bytes_at.min() < 0 or bytes_at.max() >= len(whole) or (bytes_at % sizes).any():
        return None
    offsets, ids, mask = (whole[: len(whole) // c.itemsize * c.itemsize].view(c.dtype) for c in columns[0])
    return _Flat(offsets, ids, mask, np.array(first_rows), bytes_at // sizes)


def _read_shard(path: Path, entry: ShardEntry, schema: pa.Schema, in_memory: bool) -> tuple[list[_Batch], pa.Buffer]:
    try:
        # The mapping outlives its file object: every view keeps the buffer alive.
        source = pa.py_buffer(path.read_bytes()) if in_memory else pa.memory_map(str(path)).read_buffer()
        reader = pa.ipc.open_stream(source)
        if not reader.schema.equals(schema):
            raise ValueError("its columns are not those of a shard")
        tables = list(reader)
        batches = [_views(table) for table in tables]
    except pa.ArrowException as error:
        raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}; {_REMEDY}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {_REMEDY}") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; {_REMEDY}") from error
    rows, tokens = sum(table.num_rows for table in tables), sum(len(batch.ids) for batch in batches)
    if (rows, tokens) != (entry.rows, entry.tokens):
        raise DataError(
            f"{path} is damaged: {counted(rows, 'row')} of {counted(tokens, 'token')}, not {entry.rows} of {entry.tokens}; {_REMEDY}"
        )
    return batches, source


def _views(table: pa.RecordBatch) -> _Batch:
    table.validate()  # buffers as long as the lengths say: a read beyond a mapping's end kills the process
    ids, mask = table.column("input_ids"), table.column("loss_mask")
    offsets = numbers(ids.offsets)
    lengths = numbers(table.column("num_tokens"))
    # Arrow checks none of this: a flipped bit in an offset would silently read another document's tokens.
    if not np.array_equal(offsets, numbers(mask.offsets)) or not np.array_equal(np.diff(offsets), lengths):
        raise ValueError("the lengths of its columns disagree")
    if len(lengths) and (lengths.min() < 0 or offsets[0] != 0 or offsets[-1] != len(ids.values)):
        raise ValueError("a document lies outside its column")
    return _Batch(offsets, numbers(ids.values), numbers(mask.values), table)
