"""A block's conversations under a model's own template: rendered one by one, and laid out with a proven mask.

Lines that the template refuses, or whose mask cannot be proven, go to the rejections like those that are no conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import split_lines
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.jinja_template import JinjaTemplate, WithoutEnd
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import TrainReasoning
from lumina_ds.errors import DataError
from preprocess.layout import Documents
from preprocess.scan import Conversations, Rejection
from preprocess.sources import Block

REWRITTEN = "replies are no labels, since the chat template rewrites them when later turns follow"


class RenderedRows(NamedTuple):
    """kept, left_out: numbers of the conversations that have rows, and of the others. texts: contents of the turns of
    the former; conversation i has first_turns[i] .. first_turns[i + 1] - 1."""

    documents: Documents
    kept: np.ndarray  # [rows] int64
    left_out: list[int]
    texts: Texts
    first_turns: np.ndarray  # [rows + 1] int64
    notes: Counter[str]  # what is to be said of the rows, and how often it is true


def render_rows(
    block: Block,
    conversations: Conversations,
    rejections: list[Rejection],
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    id_dtype: np.dtype,
    train_reasoning: TrainReasoning = "yes",
) -> RenderedRows:
    """Lay out the block's conversations; refused ones are added to `rejections`, in the order of the lines.

    Raises DataError where the template computes or writes without end.
    """
    rows, kept, taken, left_out, contents, counts = [], [], [], [], [], [0]
    refused: dict[int, RejectedLine] = {}
    for number, conversation in enumerate(conversations.whole()):
        try:
            rows += encode_conversations([conversation], tokenizer, template, train_reasoning)
        except WithoutEnd as fault:
            raise DataError(f"{block.source}, line {conversations.lines[number]}: {fault.reason}") from None
        except RejectedLine as fault:
            refused[int(conversations.lines[number])] = fault
            left_out.append(number)
            continue
        kept.append(number)
        taken.append(conversation)
        contents += [turn.content for turn in conversation.turns]
        counts.append(len(conversation.turns))
    num_asked = sum(sum(conversation.trained) for conversation in taken)
    num_trained = sum(_num_replies(mask) for _, mask in rows)
    notes = Counter({REWRITTEN: num_asked - num_trained} if num_asked > num_trained else {})
    if refused:
        rejections += _rejected(block, refused)
        rejections.sort(key=lambda rejection: rejection.line)
    return RenderedRows(
        _documents(rows, id_dtype), np.array(kept, np.int64), left_out, Texts.join(contents),
        np.cumsum(counts, dtype=np.int64), notes,
    )  # fmt: skip


def _num_replies(mask: Sequence[int]) -> int:
    return sum(is_label > before for before, is_label in pairwise([0, *mask]))


def _rejected(block: Block, refused: dict[int, RejectedLine]) -> list[Rejection]:
    return [
        Rejection(block.source, line, block.byte_offset + begin, refused[line].rule, refused[line].reason)
        for line, (begin, _) in enumerate(split_lines(block.data), block.first_line)
        if line in refused
    ]


def _documents(rows: Sequence[tuple[list[int], list[int]]], id_dtype: np.dtype) -> Documents:
    return Documents(
        np.array([token for ids, _ in rows for token in ids], id_dtype),
        np.array([is_label for _, mask in rows for is_label in mask], np.uint8),
        np.array([len(ids) for ids, _ in rows], np.int32),
        np.array([mask.index(1) for _, mask in rows], np.int32),
    )
