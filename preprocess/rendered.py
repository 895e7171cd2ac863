"""A block's lines under a model's own template: parsed one by one, rendered, and laid out with a proven mask.

Lines that the template refuses, or whose mask cannot be proven, go to the rejections like those that are no conversation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import is_blank, parse_conversation, split_lines
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.jinja_template import JinjaTemplate
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import Conversation, TrainTurns
from preprocess.layout import Documents
from preprocess.scan import Rejection
from preprocess.sources import Block


class RenderedBlock(NamedTuple):
    """Rows of the good lines. shares: of each, a number from 0 to 1 by which it may be held out."""

    documents: Documents
    texts: Texts  # contents of the turns
    first_turns: np.ndarray  # [rows + 1] int64
    lines: np.ndarray  # [rows] int64
    shares: np.ndarray  # [rows] float64
    other_keys: Counter[str]


def render_block(
    block: Block,
    rejections: list[Rejection],
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    id_dtype: np.dtype,
    train_turns: TrainTurns = "all",
) -> RenderedBlock:
    """Read and lay out the lines of a block; refused ones are added to `rejections`."""
    if block.fault is not None:
        rejections.append(Rejection(block.source, block.first_line, block.byte_offset, *block.fault))
    rows, conversations, lines = [], [], []
    for line, begin, text in _lines(block):
        try:
            conversation = parse_conversation(text, train_turns)
            rows += encode_conversations([conversation], tokenizer, template)
        except RejectedLine as fault:
            rejections.append(Rejection(block.source, line, block.byte_offset + begin, fault.rule, fault.reason))
            continue
        conversations.append(conversation)
        lines.append(line)
    return RenderedBlock(
        _documents(rows, id_dtype),
        Texts.join([turn.content for conversation in conversations for turn in conversation.turns]),
        np.cumsum([0, *(len(conversation.turns) for conversation in conversations)], dtype=np.int64),
        np.array(lines, np.int64),
        np.array([_share(conversation) for conversation in conversations], np.float64),
        Counter(key for conversation in conversations for key in conversation.other_keys),
    )


def _lines(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """(line, byte offset in the block, its text) of every line that is not blank."""
    if block.is_blank:
        return
    for line, (begin, text) in enumerate(split_lines(block.data), block.first_line):
        if not is_blank(text):
            yield line, begin, text


def _documents(rows: Sequence[tuple[list[int], list[int]]], id_dtype: np.dtype) -> Documents:
    return Documents(
        np.array([token for ids, _ in rows for token in ids], id_dtype),
        np.array([is_label for _, mask in rows for is_label in mask], np.uint8),
        np.array([len(ids) for ids, _ in rows], np.int32),
        np.array([mask.index(1) for _, mask in rows], np.int32),
    )


def _share(conversation: Conversation) -> float:
    """A hash of the content: the same in any order, and equal conversations stay on one side."""
    content = repr((conversation.turns, conversation.tools)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
