"""One block of lines to an Arrow message: parse, split off held-out conversations, apply the template. Pure, so
that any process on any machine may do it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lumina_ds.data.conversation import RejectedLine, is_blank
from lumina_ds.data.shard_writer import shard_schema
from lumina_ds.data.tokenizer import Tokenizer
from preprocess.layout import Documents, lay_out, no_documents
from preprocess.parse import Turns, parse_line
from preprocess.sources import Block, Place

# Conversations tokenized in one call: enough to amortise it, few enough that their id lists stay small.
_BATCH = 4096


class Rejection(NamedTuple):
    """One refused line: where it stands and why."""

    source: str
    line: int
    byte_offset: int
    rule: str
    reason: str


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a shard as one Arrow IPC message, and what packing and the manifest need to know of them."""

    message: bytes  # empty where there are no rows
    lines: np.ndarray  # [rows] int64
    lengths: np.ndarray  # [rows] int32
    first_trained: np.ndarray  # [rows] int32
    num_trained_tokens: int

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def until(self, line: int, schema: pa.Schema) -> EncodedRows:
        """The rows up to and including `line` of the source."""
        count = int(self.lines.searchsorted(line, "right"))
        if count == self.num_rows:
            return self
        batch = pa.ipc.read_record_batch(pa.py_buffer(self.message), schema).slice(0, count)
        trained = int(batch.column("loss_mask").flatten().to_numpy().sum())
        message = batch.serialize().to_pybytes() if count else b""
        return EncodedRows(message, self.lines[:count], self.lengths[:count], self.first_trained[:count], trained)


@dataclass(frozen=True)
class EncodedBlock:
    place: Place
    train: EncodedRows
    held_out: EncodedRows
    rejections: list[Rejection]

    @property
    def num_conversations(self) -> int:
        return self.train.num_rows + self.held_out.num_rows

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.held_out.num_tokens

    def first(self, num_conversations: int, schema: pa.Schema) -> EncodedBlock:
        """The block as if it ended right after its first `num_conversations` conversations."""
        if self.num_conversations <= num_conversations:
            return self
        last = int(np.sort(np.concatenate([self.train.lines, self.held_out.lines]))[num_conversations - 1])
        rejections = [rejection for rejection in self.rejections if rejection.line <= last]
        train, held_out = (rows.until(last, schema) for rows in (self.train, self.held_out))
        return EncodedBlock(self.place, train, held_out, rejections)


def encode_block(
    block: Block, tokenizer: Tokenizer, eval_fraction: float = 0.0, max_conversations: int | None = None
) -> EncodedBlock:
    """Encode the block's lines; at most `max_conversations` of them, as no output can need more."""
    rejections: list[Rejection] = []
    accepted = list(islice(_accepted(block, rejections), max_conversations))
    is_held_out = [_is_held_out(turns, eval_fraction) for _, turns in accepted] if eval_fraction else []
    held_out = [row for row, held in zip(accepted, is_held_out, strict=False) if held]
    if held_out:
        accepted = [row for row, held in zip(accepted, is_held_out, strict=True) if not held]
    train_rows, held_out_rows = (_encode_rows(rows, block.source, tokenizer) for rows in (accepted, held_out))
    return EncodedBlock(block.place, train_rows, held_out_rows, rejections)


def _accepted(block: Block, rejections: list[Rejection]) -> Iterator[tuple[int, Turns]]:
    """(line, turns) of every good line; the others are added to `rejections` on the way."""
    source, line, offset, _ = block.place
    if block.fault is not None:
        rejections.append(Rejection(source, line, offset, *block.fault))
    if block.is_blank:
        return
    # b"\n" alone ends a line, as in split_lines(); its end is never part of it, nor is one b"\r" before it.
    for written in block.data.split(b"\n"):
        text = written[:-1] if written.endswith(b"\r") else written
        if not is_blank(text):
            try:
                turns = parse_line(text)
            except RejectedLine as fault:
                rejections.append(Rejection(source, line, offset, fault.rule, fault.reason))
            else:
                yield line, turns
        offset += len(written) + 1
        line += 1


def _is_held_out(turns: Turns, fraction: float) -> bool:
    """A hash of the content decides: the same for any order, and equal conversations stay on one side."""
    digest = hashlib.blake2b(digest_size=8)
    for role, text in turns:
        content = text.encode()
        digest.update(f"{role} {len(content)} ".encode())
        digest.update(content)
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def _encode_rows(rows: list[tuple[int, Turns]], source: str, tokenizer: Tokenizer) -> EncodedRows:
    schema = shard_schema(tokenizer.vocab_size)
    id_dtype = schema.field("input_ids").type.value_type.to_pandas_dtype()
    parts = [
        lay_out([turns for _, turns in rows[begin : begin + _BATCH]], tokenizer, id_dtype)
        for begin in range(0, len(rows), _BATCH)
    ]
    documents = Documents(*map(np.concatenate, zip(*parts, strict=True))) if parts else no_documents(id_dtype)
    lines = np.fromiter((line for line, _ in rows), np.int64, len(rows))
    message = _arrow_message(documents, lines, source, schema) if rows else b""
    return EncodedRows(message, lines, documents.lengths, documents.first_trained, int(documents.mask.sum()))


def _arrow_message(documents: Documents, lines: np.ndarray, source: str, schema: pa.Schema) -> bytes:
    offsets = pa.array(np.concatenate([[0], np.cumsum(documents.lengths)]), pa.int32())
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(documents.ids)),
        pa.ListArray.from_arrays(offsets, pa.array(documents.mask)),
        pa.array(documents.lengths),
        pa.array([source] * len(lines), pa.string()),
        pa.array(lines),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema).serialize().to_pybytes()
