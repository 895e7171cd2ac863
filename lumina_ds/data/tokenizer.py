"""SentencePiece behind the few things the flow needs: ids of text, ids of the markers, and text of ids.

Text can never become a control token: the markers are CONTROL symbols, which SentencePiece does not
produce from text, or ids appended after a foreign model's vocabulary. A literal U+2581, which
SentencePiece itself uses for the space, is kept apart from the space through its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lumina_ds.errors import ConfigError, DataError

ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_MARKER = "<|end|>"
MARKERS = (*ROLE_MARKERS.values(), END_MARKER)

_SPACE_SYMBOL = "\u2581"


class Tokenizer:
    """A SentencePiece model plus the chat template's markers.

    vocab_size: ids in use, appended markers included. bos_id: None where the model has none.
    role_ids: marker id of "system", "user" and "assistant". end_id: end of turn.
    digest: SHA-256 of the model file.
    """

    def __init__(self, processor: Any, path: Path, digest: str) -> None:
        self._processor = processor
        self._num_pieces: int = processor.get_piece_size()
        self.path = path
        self.digest = digest
        bos_id = processor.bos_id()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        marker_ids, self.vocab_size = _place_markers(processor)
        self.role_ids: dict[str, int] = {role: marker_ids[marker] for role, marker in ROLE_MARKERS.items()}
        self.end_id: int = marker_ids[END_MARKER]
        self._placeholders = _ByteRuns(processor)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a SentencePiece model file. Raises DataError when it is missing or something else."""
        import sentencepiece

        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
            num_pieces = processor.get_piece_size()
        except RuntimeError:
            num_pieces = 0
        if not num_pieces:
            raise DataError(f"{path} is not a SentencePiece model; `lumina tokenizer train` makes one")
        return cls(processor, path, hashlib.sha256(model).hexdigest())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, exactly SentencePiece's, without markers and without stripping."""
        # One thread: parallelism is the offline stage's, by processes, and --workers says how much of it.
        ids = self._processor.encode(texts, num_threads=1)
        for position, text in enumerate(texts):
            if _SPACE_SYMBOL in text:
                ids[position] = self._encode_space_symbol(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; markers, BOS and ids beyond the model's pieces are skipped."""
        return self._processor.decode([i for i in map(int, ids) if 0 <= i < self._num_pieces])

    def piece(self, token_id: int) -> str:
        """How one id reads in a listing: its piece, or the marker's name, or `<unused N>`."""
        for marker, marker_id in zip(MARKERS, (*self.role_ids.values(), self.end_id), strict=True):
            if token_id == marker_id:
                return marker
        return self._processor.id_to_piece(token_id) if 0 <= token_id < self._num_pieces else f"<unused {token_id}>"

    def _encode_space_symbol(self, text: str) -> list[int]:
        """SentencePiece reads U+2581 as a space. Encode a character that it does not know in its place, then
        swap that character's byte ids for U+2581's. A model without byte pieces keeps its own reading."""
        stand_in = self._placeholders.unused_in(text)
        if stand_in is None:
            return self._processor.encode(text)
        ids = self._processor.encode(text.replace(_SPACE_SYMBOL, stand_in))
        old, new = self._placeholders.byte_ids(stand_in), self._placeholders.byte_ids(_SPACE_SYMBOL)
        position = 0
        while position < len(ids):
            if ids[position : position + len(old)] == old:
                ids[position : position + len(old)] = new
                position += len(new)
            else:
                position += 1
        return ids


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError when the model's embedding has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.vocab_size {vocab_size}; "
            f"set --model.vocab_size {tokenizer.vocab_size}"
        )


class _ByteRuns:
    """Characters that a byte-fallback model spells as bytes: candidates from the private use area."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._has_bytes = processor.is_byte(processor.piece_to_id("<0x00>"))

    def byte_ids(self, character: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]

    def unused_in(self, text: str) -> str | None:
        """The first private character that `text` lacks and the model spells as its bytes; None if none is."""
        if not self._has_bytes:
            return None
        for code in range(0xE000, 0xF8FF):
            character = chr(code)
            if character not in text and self._is_spelled_in_bytes(character):
                return character
        return None

    def _is_spelled_in_bytes(self, character: str) -> bool:
        run = self.byte_ids(character)
        ids = self._processor.encode(f"a{character}a")  # inside a word, where no dummy prefix stands
        return any(ids[start : start + len(run)] == run for start in range(len(ids)))


def _place_markers(processor: Any) -> tuple[dict[str, int], int]:
    """Id of every marker, and the vocabulary's size with the markers that had to be appended.

    A marker counts as the model's own only as a CONTROL symbol: a user-defined or ordinary piece of that
    name is produced by text that spells it.
    """
    next_id = processor.get_piece_size()
    ids: dict[str, int] = {}
    for marker in MARKERS:
        piece_id = processor.piece_to_id(marker)
        if processor.is_control(piece_id) and processor.id_to_piece(piece_id) == marker:
            ids[marker] = piece_id
        else:
            ids[marker] = next_id
            next_id += 1
    return ids, next_id
