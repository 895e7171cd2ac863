"""One block of lines to Arrow rows: parse, split off held-out conversations, apply the template. Pure, so that
any process may do it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import (
    LINE_TOO_LONG,
    MAX_LINE_BYTES,
    Conversation,
    RejectedLine,
    is_blank,
    parse_conversation,
    split_lines,
)
from lumina_ds.data.shard_writer import shard_schema
from lumina_ds.data.tokenizer import Tokenizer
from preprocess.sources import Block

# Conversations tokenized in one call: enough to amortise it, few enough that their id lists stay small.
_BATCH = 256


class Rejection(NamedTuple):
    """One refused line: where it stands and why."""

    source: str
    line: int
    byte_offset: int
    rule: str
    reason: str


@dataclass(frozen=True)
class EncodedRows:
    """Arrow rows, with the position of each one's first trained token (what packing needs beside the length)."""

    batch: pa.RecordBatch
    first_trained: np.ndarray
    num_trained_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.batch.column("input_ids").flatten())

    def until(self, line: int) -> EncodedRows:
        """The rows up to and including `line` of the source."""
        lines = self.batch.column("line").to_numpy()
        count = int(lines.searchsorted(line, "right"))
        if count == len(lines):
            return self
        batch = self.batch.slice(0, count)
        end = int(self.batch.column("loss_mask").offsets[count].as_py())
        trained = int(self.batch.column("loss_mask").values[:end].to_numpy().sum())
        return EncodedRows(batch, self.first_trained[:count], trained)


@dataclass(frozen=True)
class EncodedBlock:
    train: EncodedRows
    held_out: EncodedRows
    rejections: list[Rejection]

    @property
    def num_conversations(self) -> int:
        return self.train.batch.num_rows + self.held_out.batch.num_rows

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.held_out.num_tokens

    def first(self, num_conversations: int) -> EncodedBlock:
        """The block as if it ended right after its first `num_conversations` conversations."""
        if self.num_conversations <= num_conversations:
            return self
        lines = np.concatenate([rows.batch.column("line").to_numpy() for rows in (self.train, self.held_out)])
        last = int(np.sort(lines)[num_conversations - 1])
        rejections = [rejection for rejection in self.rejections if rejection.line <= last]
        return EncodedBlock(self.train.until(last), self.held_out.until(last), rejections)


def encode_block(
    block: Block, tokenizer: Tokenizer, eval_fraction: float = 0.0, max_conversations: int | None = None
) -> EncodedBlock:
    """Encode the block's lines; at most `max_conversations` of them, as no output can need more."""
    rejections: list[Rejection] = []
    accepted = list(islice(_accepted(block, rejections), max_conversations))
    is_held_out = [_is_held_out(conversation, eval_fraction) for _, conversation in accepted]
    train, held_out = (
        _encode_rows([row for row, held in zip(accepted, is_held_out, strict=True) if held is wanted], block, tokenizer)
        for wanted in (False, True)
    )
    return EncodedBlock(train, held_out, rejections)


def _accepted(block: Block, rejections: list[Rejection]) -> Iterator[tuple[int, Conversation]]:
    """(line, conversation) of every good line; the others are added to `rejections` on the way."""
    if block.is_oversized:
        reason = f"longer than {MAX_LINE_BYTES} bytes"
        rejections.append(Rejection(block.source, block.first_line, block.byte_offset, LINE_TOO_LONG, reason))
    for line, (offset, text) in enumerate(split_lines(block.data), block.first_line):
        if is_blank(text):
            continue
        try:
            conversation = parse_conversation(text)
        except RejectedLine as fault:
            rejections.append(Rejection(block.source, line, block.byte_offset + offset, fault.rule, fault.reason))
        else:
            yield line, conversation


def _is_held_out(conversation: Conversation, fraction: float) -> bool:
    """A hash of the content decides: the same for any order, and equal conversations stay on one side."""
    if not fraction:
        return False
    digest = hashlib.blake2b(digest_size=8)
    for turn in conversation.turns:
        content = turn.content.encode()
        digest.update(f"{turn.role} {len(content)} ".encode())
        digest.update(content)
    return int.from_bytes(digest.digest(), "big") < fraction * 2**64


def _encode_rows(rows: list[tuple[int, Conversation]], block: Block, tokenizer: Tokenizer) -> EncodedRows:
    schema = shard_schema(tokenizer.vocab_size)
    id_dtype = schema.field("input_ids").type.value_type.to_pandas_dtype()
    ids: list[np.ndarray] = [np.zeros(0, id_dtype)]
    masks: list[np.ndarray] = [np.zeros(0, np.uint8)]
    lengths: list[int] = []
    first_trained: list[int] = []
    for begin in range(0, len(rows), _BATCH):
        encoded = encode_conversations([conversation for _, conversation in rows[begin : begin + _BATCH]], tokenizer)
        ids.append(np.fromiter(chain.from_iterable(row for row, _ in encoded), id_dtype))
        masks.append(np.fromiter(chain.from_iterable(mask for _, mask in encoded), np.uint8))
        lengths += [len(row) for row, _ in encoded]
        first_trained += [mask.index(1) for _, mask in encoded]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = np.concatenate(masks)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids))),
        pa.ListArray.from_arrays(offsets, pa.array(mask)),
        pa.array(lengths, pa.int32()),
        pa.array([block.source] * len(rows), pa.string()),
        pa.array([line for line, _ in rows], pa.int64()),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    return EncodedRows(batch, np.array(first_trained, np.int64), int(mask.sum()))
