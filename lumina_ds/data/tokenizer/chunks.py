"""SentencePiece BPE several times faster, with exactly its ids: cut texts where no merge can reach, and remember.

Why a cut is exact. BPE starts from single characters (or user-defined symbols, which it takes as they are) and
joins two neighbours only where the joined text is a piece. If two neighbouring characters stand next to each other
inside no piece, no symbol and no merge ever spans the place between them; merges left and right of it do not touch
each other, and among themselves they keep their order (score, then position). So the ids of the text are the ids
of its two sides, one after the other. Characters that are no piece are spelled in bytes one by one, and unused
pieces are split again within themselves; neither looks across the place. Here the test is made on bytes: a place
counts as a cut when the last byte before it and the first byte after it, which must begin a character, are
neighbours in no piece. That is stricter, hence still exact, and needs one table of 65,536 entries.

A word with its space in front is the usual chunk, but "don't", "x=1" and "foo.bar" are cut as well. Chunks repeat,
so their ids are kept in a table of fixed size (tokenizer_table.py). Those that are not there are encoded by the same merges in compiled
code (tokenizer_merges.py), or by SentencePiece where they are long or the model has more than plain pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from lumina_ds.data.tokenizer.flat import Texts, flatten
from lumina_ds.data.tokenizer.merges import make_merges
from lumina_ds.data.tokenizer.sentencepiece_file import BYTE, CONTROL, SPACE_SYMBOL, UNKNOWN, ModelFile
from lumina_ds.data.tokenizer.table import ChunkSource, ChunkTable

log = logging.getLogger(__name__)

# Rows of a table (32 bytes each), and windows of text.
TABLE_ROWS = 1 << 20
WINDOW_BYTES = 8 << 20
# A chunk of a longer text could have more ids than a table row can count.
MAX_TEXT_BYTES = 4 << 20

# An embedded message that occurs twice is merged field by field: this sets normalizer_spec.add_dummy_prefix to false.
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

SAMPLE = (
    "", " ", "   ", "a", " a", "a ", "Hello, world!  It's 12:30 on 2024-01-31.\n\n\tdef f(x):\r\n        return x\n",
    "l'été à Noël, où déjà; Straße, größer; ¿qué? niño; zażółć gęślą jaźń; Καλημέρα κόσμε; Привет, мир!",
    "日本語のテキスト、中文文本。한국어 텍스트 ภาษาไทย हिन्दी עברית العربية", "🙂👩‍👩‍👧‍👦 e\u0301 \ufeff\u200b\x00\x7f",
    "<s></s><unk><pad><0x41>[INST] [/INST] <|user|> https://example.org/a?b=c&d=%20#e foo_bar fooBar x**2==y",
    "antidisestablishmentarianism" * 8, "0123456789" * 10, "-" * 70 + "\n" + "=" * 70,
)  # fmt: skip


class ChunkEncoder:
    """Encodes with the ids of the SentencePiece model it was made from. Build it with for_model().

    Any number of threads may call it: each call takes a table of its own, which it leaves to the next.
    """

    def __init__(self, processor: Any, model: ModelFile, num_rows: int = TABLE_ROWS) -> None:
        self._source = ChunkSource(processor, _cuts(model), make_merges(model), model.adds_dummy_prefix)
        self._num_rows = num_rows
        self._idle_tables: list[ChunkTable] = []

    @classmethod
    def for_model(
        cls, processor: Any, content: bytes, model: ModelFile, num_rows: int = TABLE_ROWS
    ) -> ChunkEncoder | None:
        """None where the cut rule is not proven for this kind of model, numba is missing, or a sample differs.

        model: what read_model_file() finds in `content`.
        """
        import sentencepiece

        reason = _unproven(model)
        if reason:
            log.debug("SentencePiece encodes unaided: %s", reason)
            return None
        bare = sentencepiece.SentencePieceProcessor()
        bare.LoadFromSerializedProto(content + _WITHOUT_DUMMY_PREFIX)
        try:
            encoder = cls(bare, model, num_rows)
            ids, offsets = encoder.encode(Texts.join(SAMPLE))
        except (ImportError, RuntimeError, ValueError) as error:  # nowhere to keep the code; a piece not UTF-8
            log.info("tokenizing without the compiled chunk table, several times slower: %s", error)
            return None
        if [ids[begin:end].tolist() for begin, end in pairwise(offsets)] != processor.encode(list(SAMPLE)):
            log.warning("the chunk table differs from SentencePiece on a sample; tokenizing with SentencePiece alone")
            return None
        return encoder

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts, uint32 [tokens]; where each text's begin, int64 [texts + 1]). No text holds U+2581."""
        if np.diff(texts.offsets).max(initial=0) > MAX_TEXT_BYTES:
            return flatten(self._source.encode_whole(texts))
        table = self._idle_tables.pop() if self._idle_tables else ChunkTable(self._source, self._num_rows)
        # A table that an exception leaves half filled in is not given back.
        parts = [table.encode(window) for window in _windows(texts)]
        self._idle_tables.append(table)
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0] + [len(ids) for ids, _ in parts])
        offsets = [offsets[1:] + start for start, (_, offsets) in zip(starts, parts, strict=False)]
        ids = np.concatenate([np.zeros(0, np.uint32), *(ids for ids, _ in parts)])
        return ids, np.concatenate([np.zeros(1, np.int64), *offsets])


def _windows(texts: Texts) -> Iterator[Texts]:
    """Runs of texts of about WINDOW_BYTES, so that working memory does not grow with the call."""
    begin, count = 0, len(texts.offsets) - 1
    while begin < count:
        end = int(texts.offsets.searchsorted(texts.offsets[begin] + WINDOW_BYTES))
        end = min(max(end, begin + 1), count)
        yield Texts(texts.data, texts.offsets[begin : end + 1])
        begin = end


def _cuts(model: ModelFile) -> np.ndarray:
    """uint8 [65536]: may a text be cut between these two bytes (first * 256 + second)?"""
    never_matched = (UNKNOWN, CONTROL, BYTE)
    # NUL keeps pieces apart; where a piece holds one itself, a few cuts less are made, which does no harm.
    spelled = b"\0".join(piece.text for piece in model.pieces if piece.kind not in never_matched)
    neighbours = np.frombuffer(spelled.replace(SPACE_SYMBOL.encode(), b" "), np.uint8)
    is_cut = np.ones((256, 256), bool)
    is_cut[neighbours[:-1], neighbours[1:]] = False
    is_cut[:, 0x80:0xC0] = False  # never inside a character
    return is_cut.reshape(-1).view(np.uint8)


def _unproven(model: ModelFile) -> str | None:
    """Why the cut rule does not hold for this model, or is not proven; None where it is."""
    if not model.is_bpe:
        return "not a BPE model"  # Unigram weighs whole texts: its best path is a sum over both sides of a cut
    if not model.has_byte_fallback:
        return "no byte fallback"  # neighbouring unknown characters become one id, across any cut
    if model.has_space_suffix:
        return "white space is a suffix"
    if model.is_normalized:
        return "text is normalized"
    if any(b" " in piece.text for piece in model.pieces):
        return "a piece holds a plain space"  # it would match the space that stands in for the dummy prefix
    return None
