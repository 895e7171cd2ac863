"""A SentencePiece model for data/tokenizer/tokenizer.py: the library, and the chunk table in front of it for large batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lumina_ds.data.tokenizer.chunks import ChunkEncoder
from lumina_ds.data.tokenizer.flat import Texts, flatten
from lumina_ds.data.tokenizer.sentencepiece_file import read_model_file
from lumina_ds.data.tokenizer.spans import Part, Spans, joined, split_special
from lumina_ds.errors import DataError

# Below this, setting up the chunk table costs more than it saves: a prompt, an inspection.
CHUNKS_FROM_CHARACTERS = 1 << 16


def read_sentencepiece(content: bytes, path: Path) -> SentencePieceModel | None:
    """The model, or None where `content` is something else. Raises DataError for a piece that is not UTF-8."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
        pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    except RuntimeError:
        return None
    except UnicodeDecodeError as error:  # of a piece, or of the library's own message about one
        raise DataError(
            f"{path} is a damaged SentencePiece model: a piece is not UTF-8 ({error.reason}); take it from its source "
            "again, or use another"
        ) from None
    return SentencePieceModel(processor, content, pieces) if pieces else None


class SentencePieceModel:
    """See tokenizer.Model."""

    file_name = "tokenizer.model"

    def __init__(self, processor: Any, content: bytes, pieces: Sequence[str]) -> None:
        self._processor = processor
        self._content = content
        self._chunks: ChunkEncoder | None = None
        self._chunks_tried = False
        self._lock = threading.Lock()
        self.num_ids = len(pieces)
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.unknown_id: int | None = processor.unk_id() if processor.unk_id() >= 0 else None
        kinds = processor.is_control(list(range(self.num_ids)))
        self.special_tokens = {pieces[i]: i for i in range(self.num_ids) if kinds[i]}
        self.added_tokens: dict[str, int] = {}

    @cached_property
    def loses_nothing(self) -> bool:
        try:
            return read_model_file(self._content).loses_nothing
        except (KeyError, IndexError, ValueError):  # SentencePiece has read it, so only its form is unusual
            return False

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: parallelism is the offline stage's, by processes, and --num-workers says how much of it.
        return self._processor.encode(list(texts), num_threads=1)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        chunks = self._chunks_for(sum(map(len, texts)))
        return flatten(self.encode(texts)) if chunks is None else chunks.encode(Texts.join(texts))

    def encode_utf8(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        chunks = self._chunks_for(len(texts.data))
        return flatten(self.encode(texts.split())) if chunks is None else chunks.encode(texts)

    def encode_template(self, text: str) -> list[int]:
        return self.encode_parts([(text, True)]).ids

    def encode_parts(self, parts: Sequence[Part]) -> Spans:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        run = ""

        def end_run() -> None:
            encoded = self._processor.encode(run, out_type="immutable_proto")
            ids.extend(piece.id for piece in encoded.pieces)
            first = begin - len(run)
            spans.extend((first + piece.begin, first + piece.end) for piece in encoded.pieces)

        for text, is_template in joined(parts):
            for piece, is_special in split_special(text, list(self.special_tokens) if is_template else ()):
                if is_special:
                    end_run()
                    run = ""
                    ids.append(self.special_tokens[piece])
                    spans.append((begin, begin + len(piece)))
                else:
                    run += piece
                begin += len(piece)
        end_run()
        return Spans(ids, np.array(spans, np.int64).reshape(-1, 2))

    def is_compiled(self) -> bool:
        return self._chunks_for(CHUNKS_FROM_CHARACTERS) is not None

    def _chunks_for(self, num_characters: int) -> ChunkEncoder | None:
        """The chunk table, once there is enough to encode to make it; None before, and where there is none."""
        if not self._chunks_tried and num_characters >= CHUNKS_FROM_CHARACTERS:
            with self._lock:
                if not self._chunks_tried:
                    self._chunks = ChunkEncoder.for_model(self._processor, self._content)
                    self._chunks_tried = True
        return self._chunks

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def control_id(self, marker: str) -> int | None:
        piece_id = self._processor.piece_to_id(marker)
        is_own = self._processor.is_control(piece_id) and self._processor.id_to_piece(piece_id) == marker
        return piece_id if is_own else None

    def byte_id(self, byte: int) -> int | None:
        piece_id = self._processor.piece_to_id(f"<0x{byte:02X}>")
        return piece_id if self._processor.is_byte(piece_id) else None
