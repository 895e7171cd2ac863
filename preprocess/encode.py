"""One block of lines to an Arrow message: parse, split off held-out conversations, apply the template. Pure, so
that any process on any machine may do it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate
from lumina_ds.data.rendering import RENDERED_ROLES
from lumina_ds.data.shards.arrow_columns import column, list_column, numpy_dtype, repeated_text
from lumina_ds.data.shards.writer import shard_schema
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import TrainReasoning, TrainTurns
from preprocess.layout import Documents, lay_out
from preprocess.scan import Conversations, Rejection, read_conversations
from preprocess.sources import Block, Place
from preprocess.text_check import BlockTextCheck, EncodedTexts, check_texts

if TYPE_CHECKING:
    from lumina_ds.data.templates.jinja_template import JinjaTemplate


@dataclass(frozen=True)
class EncodeOptions:
    """What the encoding of a block depends on beside the tokenizer."""

    eval_fraction: float = 0.0
    max_conversations: int | None = None
    train_turns: TrainTurns = "all"
    train_reasoning: TrainReasoning = "yes"
    format_name: str | None = None
    # Not its name: another process may not know an added one.
    template: ChatTemplate | JinjaTemplate = TEMPLATES[DEFAULT_TEMPLATE]


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a shard as one Arrow IPC message, and what packing and the manifest need to know of them."""

    message: pa.Buffer  # empty where there are no rows
    lines: np.ndarray  # [rows] int64
    lengths: np.ndarray  # [rows] int32
    first_trained: np.ndarray  # [rows] int32
    num_trained_tokens: int

    @classmethod
    def none(cls) -> EncodedRows:
        return cls(pa.py_buffer(b""), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), 0)

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
        if not count:
            return self.none()
        batch = pa.ipc.read_record_batch(self.message, schema).slice(0, count)
        trained = int(batch.column("loss_mask").flatten().to_numpy().sum())
        return EncodedRows(
            batch.serialize(), self.lines[:count], self.lengths[:count], self.first_trained[:count], trained
        )


@dataclass(frozen=True)
class EncodedBlock:
    place: Place
    train: EncodedRows
    held_out: EncodedRows
    rejections: list[Rejection]
    other_keys: Counter[str]  # places of keys that mean nothing here
    notes: Counter[str]  # what is to be said of conversations, and how often it is true
    text_check: BlockTextCheck

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
        return EncodedBlock(
            self.place, train, held_out, rejections, self.other_keys, self.notes, self.text_check.until(last)
        )


def encode_block(block: Block, tokenizer: Tokenizer, options: EncodeOptions = EncodeOptions()) -> EncodedBlock:
    """Encode the block's lines; at most `max_conversations` of them, as no output can need more."""
    rejections: list[Rejection] = []
    schema = shard_schema(tokenizer.vocab_size)
    id_dtype, fraction = numpy_dtype(schema.field("input_ids").type.value_type), options.eval_fraction
    is_own = not isinstance(options.template, ChatTemplate)
    conversations = read_conversations(
        block, rejections, None if is_own else options.max_conversations, options.train_turns,
        options.train_reasoning, options.format_name,
    )  # fmt: skip
    is_held_out = _are_held_out(conversations, fraction) if fraction else np.zeros(len(conversations.lines), bool)
    if not isinstance(options.template, ChatTemplate):
        from preprocess.rendered import render_rows  # with what it imports it takes long to load

        rows = render_rows(
            block, conversations, rejections, tokenizer, options.template, id_dtype, options.train_reasoning
        )
        documents, is_held_out = rows.documents, is_held_out[rows.kept]
        lines = conversations.lines[rows.kept]
        turns = EncodedTexts(rows.texts, rows.first_turns, lines, *documents[:3])
        notes = conversations.notes + rows.notes
    else:
        documents, lines = lay_out(conversations, tokenizer, id_dtype, options.template), conversations.lines
        turns = EncodedTexts(conversations.texts, conversations.first_turns, lines, *documents[:3])
        notes = conversations.notes
    found = conversations.other_keys, notes, check_texts(block.source, turns, tokenizer)
    if not fraction:
        train = _encoded_rows(documents, lines, block.source, schema)
        return EncodedBlock(block.place, train, EncodedRows.none(), rejections, *found)
    train, held_out = (
        _encoded_rows(documents.where(chosen), lines[chosen], block.source, schema)
        for chosen in (~is_held_out, is_held_out)
    )
    return EncodedBlock(block.place, train, held_out, rejections, *found)


def _are_held_out(conversations: Conversations, fraction: float) -> np.ndarray:
    """bool [conversations]. A hash of the content decides: the same for any order, and equal conversations stay on
    one side."""
    contents = iter(zip(conversations.roles.tolist(), conversations.texts.slices(), strict=True))
    held_out = []
    for num_turns in np.diff(conversations.first_turns).tolist():
        digest = hashlib.blake2b(digest_size=8)
        for role, content in islice(contents, num_turns):
            digest.update(f"{RENDERED_ROLES[role]} {len(content)} ".encode())
            digest.update(content)
        held_out.append(int.from_bytes(digest.digest(), "big") < fraction * 2**64)
    return np.array(held_out, bool)


def _encoded_rows(documents: Documents, lines: np.ndarray, source: str, schema: pa.Schema) -> EncodedRows:
    if not len(lines):
        return EncodedRows.none()
    message = _arrow_message(documents, lines, source, schema)
    # Copies: the lines are a view of a whole block's working memory.
    return EncodedRows(message, lines.copy(), documents.lengths, documents.first_trained, int(documents.mask.sum()))


def _arrow_message(documents: Documents, lines: np.ndarray, source: str, schema: pa.Schema) -> pa.Buffer:
    offsets = np.concatenate([[0], np.cumsum(documents.lengths)])
    columns = [
        list_column(offsets, documents.ids),
        list_column(offsets, documents.mask),
        column(documents.lengths),
        repeated_text(source, len(lines)),
        column(lines),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema).serialize()
