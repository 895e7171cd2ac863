"""A finished shard folder, opened for reading: documents by number, and packing plans by row length.

    manifest.json  shard-00000.arrow ...  packing-SEQ.arrow  tokenizer.model or .json  rejected.jsonl
    [eval/]

How a folder is read goes by the size of its shards:

    memory     up to 500 MB: read into memory
    sharded    up to 10 GB: mapped, read from the page cache without a copy
    streaming  above, or on request: each shard is mapped when the first of its documents is asked for, and refused
               when it is no longer the file that was there at first

Opening checks that every shard is there with its size, and its rows and tokens where it is read or mapped at
once; streaming checks those at the first use. verify.py reads every byte. Nothing per document is kept in Python.
"""

from __future__ import annotations

import logging
import os
import uuid
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lumina_ds.data.packing import PackingPlan, pack
from lumina_ds.data.shards.arrow_columns import numpy_dtype
from lumina_ds.data.shards.manifest import (
    READING_WITH_LABELS,
    Manifest,
    read_with_digest,
)
from lumina_ds.data.shards.packing_file import packing_file, read_packing, write_packing
from lumina_ds.data.shards.plan_check import fault_of_rows
from lumina_ds.data.shards.shard import LONG_SEGMENT, REMEDY, Batch, Shard, check_inside
from lumina_ds.data.shards.writer import shard_schema
from lumina_ds.data.templates.find import NamedTemplate, template_of
from lumina_ds.data.tokenizer.tokenizer import Tokenizer, tokenizer_in
from lumina_ds.errors import DataError

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
        self._shards = [Shard(path / entry.file, entry, schema, mode == "memory") for entry in manifest.shards]
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
        """The tokenizer that the documents were made with: under a model's own template without our markers.

        Raises DataError where it is not the one that the manifest names.
        """
        tokenizer = Tokenizer.load(self.tokenizer_path)
        made_with = self.manifest.tokenizer
        if tokenizer.digest != made_with.digest:
            raise DataError(f"{self.tokenizer_path} is not the tokenizer that the shards were made with; {REMEDY}")
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
        if lengths.sum() >= LONG_SEGMENT * len(lengths):  # nothing at all, too
            columns = (documents, starts, lengths, places)
            for document, start, length, place in zip(*(column.tolist() for column in columns), strict=True):
                own_ids, own_mask = self.document(document)
                check_inside(self.path, start + length <= len(own_ids))
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
        number = bisect_right(self._first_documents, index) - 1
        return Origin(*self._shards[number].origin(index - self._first_documents[number]))

    def packing(self, seq_length: int) -> PackingPlan:
        """The plan for rows of `seq_length` tokens, in the mode the folder was made with.

        Read from the folder, or computed from the lengths and kept there where the folder is writable.
        """
        path = self.path / packing_file(seq_length)
        if os.path.lexists(path):
            return self._checked(read_packing(path), path, seq_length)
        plan = self.compute_packing(seq_length)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            write_packing(plan, temporary)
            os.replace(temporary, path)
        except OSError as error:
            log.debug("the packing plan is not kept: %s", error)
            return plan
        return read_packing(path)

    def _checked(self, plan: PackingPlan, path: Path, seq_length: int) -> PackingPlan:
        if fault := fault_of_rows(plan, seq_length, self.num_documents):
            raise DataError(f"{path} {fault}; delete it, and it is made again from the shards")
        return plan

    def compute_packing(self, seq_length: int) -> PackingPlan:
        """The plan for rows of `seq_length` tokens, from the lengths, and from the masks of what is cut."""
        settings = self.manifest.settings
        lengths = self.lengths
        first_trained = np.zeros(self.num_documents, np.int64)
        if settings.overlong == "truncate":
            overlong = np.flatnonzero(lengths > seq_length)
            first_trained[overlong] = [int(self.document(index)[1].argmax()) for index in overlong.tolist()]
        # A folder of an older version keeps the plan that it was made with.
        has_labels = self.has_labels if self.manifest.reading >= READING_WITH_LABELS else None
        return pack(lengths, first_trained, seq_length, settings.packing, settings.overlong, has_labels)

    def has_labels(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool [segments]: whether a token after the first of each segment is trained; the first has no predecessor."""
        found = np.zeros(len(documents), bool)
        shards = np.searchsorted(self._first_documents, documents, side="right") - 1
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            rows = documents[here] - self._first_documents[number]
            found[here] = self._shards[number].has_labels(rows, starts[here], lengths[here])
        return found

    def _locate(self, index: int) -> tuple[Batch, int]:
        number = bisect_right(self._first_documents, index) - 1
        return self._shards[number].locate(index - self._first_documents[number])


def reading_mode(size_bytes: int, force_streaming: bool = False) -> ReadingMode:
    """How shards of this size in all are read."""
    if force_streaming or size_bytes > SHARDED_LIMIT_BYTES:
        return "streaming"
    return "memory" if size_bytes <= MEMORY_LIMIT_BYTES else "sharded"
