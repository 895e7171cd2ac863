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
so their ids are kept in a table of fixed size. Those that are not there are encoded by the same merges in compiled
code (tokenizer_merges.py), or by SentencePiece where they are long or the model has more than plain pieces.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lumina_ds.data.sentencepiece_file import BYTE, CONTROL, SPACE_SYMBOL, UNKNOWN, ModelFile, read_model_file
from lumina_ds.data.tokenizer_flat import flatten
from lumina_ds.data.tokenizer_merges import make_merges

log = logging.getLogger(__name__)

# Rows of the table (32 bytes each), how many of them are used before it starts again empty, and windows of text.
TABLE_ROWS = 1 << 20
WINDOW_CHARACTERS = 4 << 20
# A chunk of a longer text could have more ids than a table row can count.
MAX_TEXT_CHARACTERS = 4 << 20
_MAX_VALUES = 8 << 20

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
    """Encodes with the ids of the SentencePiece model it was made from. Build it with for_model()."""

    def __init__(self, processor: Any, model: ModelFile, num_rows: int = TABLE_ROWS) -> None:
        from lumina_ds.data import tokenizer_kernel

        self._kernel = tokenizer_kernel
        self._processor = processor
        self._is_cut = _cuts(model)
        self._merges = make_merges(model)
        self._adds_prefix = model.adds_dummy_prefix
        self._table = np.zeros((num_rows, tokenizer_kernel.ROW_WORDS), np.uint64)
        self._max_rows = num_rows * 3 // 4
        self._num_rows = 0
        self._values = np.zeros(1 << 16, np.uint32)
        self._num_values = 0
        self._lock = threading.Lock()  # the table and the working memory are one for all callers
        self._chunks, self._pending = np.empty(0, np.uint64), np.empty((0, 3), np.int64)

    @classmethod
    def for_model(cls, processor: Any, content: bytes, num_rows: int = TABLE_ROWS) -> ChunkEncoder | None:
        """None where the cut rule is not proven for this kind of model, numba is missing, or a sample differs."""
        import sentencepiece

        try:
            model = read_model_file(content)
        except (KeyError, IndexError, ValueError):  # SentencePiece has read it, so only its form is unusual
            return None
        reason = _unproven(model)
        if reason:
            log.debug("SentencePiece encodes unaided: %s", reason)
            return None
        bare = sentencepiece.SentencePieceProcessor()
        bare.LoadFromSerializedProto(content + _WITHOUT_DUMMY_PREFIX)
        try:
            encoder = cls(bare, model, num_rows)
            ids, offsets = encoder.encode(SAMPLE)
        except (ImportError, RuntimeError, ValueError) as error:  # nowhere to keep the code; a piece not UTF-8
            log.info("tokenizing without the compiled chunk table, several times slower: %s", error)
            return None
        if [ids[begin:end].tolist() for begin, end in pairwise(offsets)] != processor.encode(list(SAMPLE)):
            log.warning("the chunk table differs from SentencePiece on a sample; tokenizing with SentencePiece alone")
            return None
        return encoder

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts, uint32 [tokens]; where each text's begin, int64 [texts + 1]). No text holds U+2581."""
        if max(map(len, texts), default=0) > MAX_TEXT_CHARACTERS:
            return flatten(self._processor.encode(self._prefixed(texts), num_threads=1))
        with self._lock:
            if sum(map(len, texts)) <= WINDOW_CHARACTERS:
                return self._encode_window(texts)
            parts = [self._encode_window(window) for window in _windows(texts)]
        starts = np.cumsum([0] + [len(ids) for ids, _ in parts])
        offsets = [offsets[1:] + start for start, (_, offsets) in zip(starts, parts, strict=False)]
        ids = np.concatenate([np.zeros(0, np.uint32), *(ids for ids, _ in parts)])
        return ids, np.concatenate([np.zeros(1, np.int64), *offsets])

    def _encode_window(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import pyarrow as pa

        column = pa.array(self._prefixed(texts), pa.large_string())
        _, offset_buffer, data_buffer = column.buffers()
        text_offsets = np.frombuffer(offset_buffer, np.int64, len(texts) + 1)
        data = np.frombuffer(data_buffer, np.uint8) if data_buffer else np.zeros(0, np.uint8)
        if self._num_rows >= self._max_rows or self._num_values > _MAX_VALUES:
            self._forget()
        chunks, pending = self._scratch(len(data))
        first_chunks = np.empty(len(texts) + 1, np.int64)
        free_rows = self._max_rows - self._num_rows
        try:
            num_pending = self._kernel.find_chunks(
                data, text_offsets, self._is_cut, self._table, free_rows, chunks, first_chunks, pending
            )
            pending_ids = self._learn(data, pending[:num_pending])
        except BaseException:
            self._forget()  # interrupted, it would hold rows whose ids nobody has filled in
            raise
        return self._kernel.copy_ids(chunks, first_chunks, pending_ids, self._values)

    def _prefixed(self, texts: Sequence[str]) -> Sequence[str]:
        """With the space that the model itself would put in front, which the bare processor leaves out."""
        return [" " + text if text else "" for text in texts] if self._adds_prefix else texts

    def _scratch(self, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        """Working memory for at most that many chunks, kept from call to call."""
        if num_bytes > len(self._chunks):
            self._chunks, self._pending = np.empty(num_bytes, np.uint64), np.empty((num_bytes, 3), np.int64)
        return self._chunks, self._pending

    def _forget(self) -> None:
        self._table[:] = 0
        self._values = np.zeros(1 << 16, np.uint32)
        self._num_rows = self._num_values = 0

    def _learn(self, data: np.ndarray, pending: np.ndarray) -> np.ndarray:
        """Encode the pending chunks; those with a row go into the table. Returns where each one's ids stand."""
        # Of one byte at most three ids: a model without U+2581 spells a space in the bytes of that.
        most = 3 * int((pending[:, 2] - pending[:, 1]).sum())
        if self._num_values + most > len(self._values):
            self._values = np.concatenate([self._values, np.zeros(len(self._values) + most, np.uint32)])
        where = np.zeros(len(pending), np.uint64)
        # What is not kept stands last and is overwritten next time.
        self._num_values = self._encode_pending(data, pending, True, self._num_values, where)
        self._encode_pending(data, pending, False, self._num_values, where)
        self._kernel.complete_rows(self._table, pending, where)
        self._num_rows += int((pending[:, 0] >= 0).sum())
        return where

    def _encode_pending(
        self, data: np.ndarray, pending: np.ndarray, with_rows: bool, num_values: int, where: np.ndarray
    ) -> int:
        """Write the ids of the chunks with a row, or without one, after `num_values`; the new number of values."""
        left = (pending[:, 0] >= 0) == with_rows
        if self._merges is not None:
            num_values = self._kernel.merge_chunks(
                data, pending, with_rows, *self._merges, self._values, num_values, where
            )
            left &= pending[:, 2] - pending[:, 1] > self._kernel.MAX_MERGED_BYTES
        chunks = [data[begin:end].tobytes().decode() for begin, end in pending[left, 1:].tolist()]
        if not chunks:
            return num_values
        ids, offsets = flatten(self._processor.encode(chunks, num_threads=1))
        self._values[num_values : num_values + len(ids)] = ids
        counts = np.diff(offsets)
        places = np.where(counts == 1, ids[np.minimum(offsets[:-1], len(ids) - 1)], num_values + offsets[:-1])
        where[left] = (places << 32 | counts << 8).astype(np.uint64)
        return num_values + len(ids)


def _windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs of texts of about WINDOW_CHARACTERS, so that working memory does not grow with the call."""
    begin = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= WINDOW_CHARACTERS:
            yield texts[begin : index + 1]
            begin, size = index + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def _cuts(model: ModelFile) -> np.ndarray:
    """bool [65536]: may a text be cut between these two bytes (first * 256 + second)?"""
    never_matched = (UNKNOWN, CONTROL, BYTE)
    # NUL keeps pieces apart; where a piece holds one itself, a few cuts less are made, which does no harm.
    spelled = b"\0".join(piece.text for piece in model.pieces if piece.kind not in never_matched)
    neighbours = np.frombuffer(spelled.replace(SPACE_SYMBOL.encode(), b" "), np.uint8)
    is_cut = np.ones((256, 256), bool)
    is_cut[neighbours[:-1], neighbours[1:]] = False
    is_cut[:, 0x80:0xC0] = False  # never inside a character
    return is_cut.reshape(-1)


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
