"""A SentencePiece model for data/tokenizer/tokenizer.py: the library, and the chunk table in front of it for large batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumina_ds.data.tokenizer.chunks import ChunkEncoder
from lumina_ds.data.tokenizer.flat import Texts, flatten
from lumina_ds.data.tokenizer.sentencepiece_file import ModelFile, read_model_file
from lumina_ds.data.tokenizer.spans import Part, Spans, joined, split_special
from lumina_ds.errors import DataError, MachineError

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
        self._loses_nothing: bool | None = None  # not known yet
        self._lock = threading.Lock()
        self.num_ids = len(pieces)
        self.bos_id: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.unknown_id: int | None = processor.unk_id() if processor.unk_id() >= 0 else None
        kinds = processor.is_control(list(range(self.num_ids)))
        self.special_tokens = {pieces[i]: i for i in range(self.num_ids) if kinds[i]}
        self.added_tokens: dict[str, int] = {}

    @property
    def loses_nothing(self) -> bool:
        if self._loses_nothing is None:
            self._read_file()
        return bool(self._loses_nothing)

    def _read_file(self) -> ModelFile | None:
        """What stands in the file. A large vocabulary takes long to read and much memory, so it is read once and not kept:
        what is asked for later is taken from it here."""
        try:
            file = read_model_file(self._content)
        except (KeyError, IndexError, ValueError):  # SentencePiece has read it, so only its form is unusual
            self._loses_nothing = False
            return None
        self._loses_nothing = file.loses_nothing
        return file

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
        pieces = split_special(text, list(self.special_tokens))
        return [
            token
            for piece, is_special in pieces
            for token in ([self.special_tokens[piece]] if is_special else self.encode([piece])[0])
        ]

    def encode_parts(self, parts: Sequence[Part]) -> Spans:
        ids: list[int] = []
        spans: list[np.ndarray] = []
        begin = 0
        for run, is_special in _runs(parts, list(self.special_tokens)):
            if is_special:
                ids.append(self.special_tokens[run])
                spans.append(np.array([[begin, begin + len(run)]], np.int64))
            else:
                pieces = self._pieces(run)
                ids += [piece.id for piece in pieces]
                places = np.array([(piece.begin, piece.end) for piece in pieces], np.int64).reshape(-1, 2)
                spans.append(begin + _characters_of_bytes(run)[places])
            begin += len(run)
        return Spans(ids, np.concatenate([np.zeros((0, 2), np.int64), *spans]))

    def _pieces(self, text: str) -> Sequence[Any]:
        """id, begin and end of each piece, places in bytes."""
        try:
            return self._processor.encode(text, return_type="proto").pieces
        except ImportError as error:
            raise MachineError(
                f"the places of a SentencePiece model's tokens need the package protobuf ({error}); pip install protobuf"
            ) from None

    def is_compiled(self) -> bool:
        return self._chunks_for(CHUNKS_FROM_CHARACTERS) is not None

    def _chunks_for(self, num_characters: int) -> ChunkEncoder | None:
        """The chunk table, once there is enough to encode to make it; None before, and where there is none."""
        if not self._chunks_tried and num_characters >= CHUNKS_FROM_CHARACTERS:
            with self._lock:
                if not self._chunks_tried:
                    file = self._read_file()
                    self._chunks = (
                        None if file is None else ChunkEncoder.for_model(self._processor, self._content, file)
                    )
                    self._chunks_tried = True
        return self._chunks

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def decode_batch(self, rows: Sequence[list[int]]) -> list[str]:
        # Of no rows the library makes a text.
        return self._processor.decode(list(rows), num_threads=1) if rows else []

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def control_id(self, marker: str) -> int | None:
        piece_id = self._processor.piece_to_id(marker)
        is_own = self._processor.is_control(piece_id) and self._processor.id_to_piece(piece_id) == marker
        return piece_id if is_own else None

    def byte_id(self, byte: int) -> int | None:
        piece_id = self._processor.piece_to_id(f"<0x{byte:02X}>")
        return piece_id if self._processor.is_byte(piece_id) else None


def _runs(parts: Sequence[Part], names: Sequence[str]) -> Iterator[Part]:
    """(text, is a special token's name): ordinary text of template and contents is one run up to the next name."""
    run = ""
    for text, is_template in joined(parts):
        for piece, is_special in split_special(text, names if is_template else ()):
            if not is_special:
                run += piece
                continue
            if run:
                yield run, False
            yield piece, True
            run = ""
    if run:
        yield run, False


def _characters_of_bytes(text: str) -> np.ndarray:
    """For each byte of the UTF-8 text, and for its end, the character that it belongs to."""
    sizes = [len(character.encode()) for character in text]
    return np.append(np.repeat(np.arange(len(text)), sizes), len(text))
