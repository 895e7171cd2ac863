"""From conversations to packed rows to ranks: by the tokenizer, the template, the packing and the order of training."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from canvas import CONTEXT, LABEL, LINE, MUTED, PADDING, SPECIAL, TEXT, WIDTH, Canvas, mono_width

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import parse_conversation
from lumina_ds.data.packing import pack
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess.train_tokenizer import train_tokenizer

SEQ_LENGTH = 40
NUM_RANKS = 2
CHATS = (
    (("user", "what is 3 plus 4?"), ("assistant", "3 plus 4 is 7.")),
    (("user", "and 4 plus 4?"), ("assistant", "4 plus 4 is 8.")),
    (("user", "hi"), ("assistant", "hi!")),
    (("user", "is 7 odd?"), ("assistant", "7 is odd.")),
    (("user", "is 8 odd?"), ("assistant", "no, 8 is even.")),
    (("user", "hello"), ("assistant", "hello, what is it?")),
    (("user", "is 3 plus 4 odd?"), ("assistant", "3 plus 4 is 7, and 7 is odd.")),
    (("user", "is 4 even?"), ("assistant", "it is.")),
)
MARGIN = 16


def draw() -> str:
    """The whole picture."""
    tokenizer, documents = _tokens()
    canvas = Canvas(
        "From a conversation to packed rows to ranks",
        "A conversation becomes tokens, of which the assistant's are label tokens; conversations share packed rows; "
        "the rows of a step are dealt out to the ranks.",
    )
    y = _draw_conversation(canvas, 26)
    y = _step(canvas, y, "template and tokenizer")
    y = _draw_tokens(canvas, y, tokenizer, documents[0])
    y = _draw_legend(canvas, y)
    y = _step(canvas, y + 4, f"packing: {len(CHATS)} conversations, rows of {SEQ_LENGTH} tokens, best fit")
    y, num_rows = _draw_rows(canvas, y, documents)
    y = _step(canvas, y, f"order of seed 42; a step takes one row on each of {NUM_RANKS} ranks")
    _draw_ranks(canvas, y, num_rows)
    return canvas.svg()


def _tokens() -> tuple[Tokenizer, list[tuple[list[int], list[int]]]]:
    """A tokenizer trained on the conversations, and (ids, mask) of each."""
    lines = [
        json.dumps({"messages": [{"role": role, "content": content} for role, content in chat]}).encode()
        for chat in CHATS
    ]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "chats.jsonl"
        source.write_bytes(b"\n".join(lines * 20) + b"\n")
        tokenizer = train_tokenizer((str(source),), 360, Path(folder) / "tokenizer.model")
        documents = encode_conversations([parse_conversation(line) for line in lines], tokenizer)
    return tokenizer, documents


def _step(canvas: Canvas, y: float, text: str) -> float:
    """An arrow with what happens beside it; returns where the next part begins."""
    canvas.arrow_down(MARGIN + 12, y + 2, y + 30)
    canvas.text(MARGIN + 30, y + 20, text, colour=MUTED)
    return y + 44


def _draw_conversation(canvas: Canvas, y: float) -> float:
    canvas.text(MARGIN, y, "one of the conversations", bold=True)
    for role, content in CHATS[0]:
        y += 12
        canvas.rect(MARGIN, y, WIDTH - 2 * MARGIN, 26, LABEL if role == "assistant" else CONTEXT)
        canvas.text(MARGIN + 8, y + 18, f"{role}: {content}", mono=True)
        y += 20
    return y + 8


def _draw_tokens(canvas: Canvas, y: float, tokenizer: Tokenizer, document: tuple[list[int], list[int]]) -> float:
    """Each token in a box of its kind, in as many lines as it takes."""
    canvas.text(MARGIN, y, "its tokens", bold=True)
    x, y = float(MARGIN), y + 12
    for token, trained in zip(*document, strict=True):
        piece = tokenizer.piece(token).replace("\u2581", "·")
        width = mono_width(piece) + 10
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + 32
        canvas.rect(x, y, width, 26, LABEL if trained else _context_kind(token, tokenizer))
        canvas.text(x + 5, y + 18, piece, mono=True)
        x += width + 3
    return y + 26


def _context_kind(token: int, tokenizer: Tokenizer) -> tuple[str, str]:
    special = {tokenizer.bos_id, tokenizer.end_id, *tokenizer.role_ids.values()}
    return SPECIAL if token in special else CONTEXT


def _draw_legend(canvas: Canvas, y: float) -> float:
    x, y = float(MARGIN), y + 12
    for colours, text, width in (
        (LABEL, "label token", 112),
        (CONTEXT, "context", 86),
        (SPECIAL, "special token, context", 178),
        (PADDING, "padding", 80),
    ):
        canvas.rect(x, y, 14, 14, colours)
        canvas.text(x + 19, y + 12, text, size=12.5)
        x += width
    return y + 18


def _draw_rows(canvas: Canvas, y: float, documents: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """The packing plan, a cell for each token, a gap before each conversation."""
    canvas.text(MARGIN, y, "packed rows; conversations in one row do not see each other", bold=True)
    plan = pack(
        np.array([len(ids) for ids, _ in documents]),
        np.array([mask.index(1) for _, mask in documents]),
        SEQ_LENGTH,
    )
    cell = (WIDTH - 2 * MARGIN - 56) / SEQ_LENGTH
    y += 12
    for row in range(plan.num_rows):
        canvas.text(MARGIN, y + 17, f"row {row}", size=12.5)
        x, used = MARGIN + 56, 0
        for segment in plan.row(row):
            mask = documents[segment.document][1][segment.start : segment.start + segment.length]
            for trained in mask:
                canvas.rect(x + used * cell, y + 2, cell - 2, 20, LABEL if trained else CONTEXT, 2)
                used += 1
            canvas.line(x + used * cell - 1, y - 1, x + used * cell - 1, y + 25, TEXT, 2)
        for place in range(used, SEQ_LENGTH):
            canvas.rect(x + place * cell, y + 2, cell - 2, 20, PADDING, 2)
        y += 30
    return y - 2, plan.num_rows


def _draw_ranks(canvas: Canvas, y: float, num_rows: int) -> None:
    order = TrainingOrder(num_rows, seed=42)
    width = (WIDTH - 2 * MARGIN - 12) / NUM_RANKS
    for rank in range(NUM_RANKS):
        x = MARGIN + rank * (width + 12)
        canvas.rect(x, y - 8, width, 62, ("#ffffff", LINE), 6)
        canvas.text(x + 12, y + 12, f"rank {rank}", bold=True)
        rows = [order.step_rows(step, 0, rank, NUM_RANKS, 1, 1)[0] for step in range(num_rows // NUM_RANKS)]
        words = "  ".join(f"step {step + 1}: row {row}" for step, row in enumerate(rows))
        canvas.text(x + 12, y + 36, words, size=12.5)
