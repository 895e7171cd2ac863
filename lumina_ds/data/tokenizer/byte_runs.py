"""Text with a literal U+2581 for models that read it as a space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lumina_ds.data.tokenizer.sentencepiece_file import SPACE_SYMBOL


class ByteModel(Protocol):
    """What is needed of tokenizer.Model."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def byte_id(self, byte: int) -> int | None: ...


class ByteRuns:
    """Text with a literal U+2581, for models that read it as a space but can spell characters in bytes.

    Encodes a character that the model does not know in its place, then swaps that character's byte ids for those
    of U+2581. A model without byte pieces keeps its own reading.
    """

    def __init__(self, model: ByteModel) -> None:
        self._model = model

    def encode(self, text: str) -> list[int]:
        stand_in = self._unused_in(text)
        if stand_in is None:
            return self._model.encode([text])[0]
        (ids,) = self._model.encode([text.replace(SPACE_SYMBOL, stand_in)])
        old, new = self._byte_ids(stand_in), self._byte_ids(SPACE_SYMBOL)
        position = 0
        while position < len(ids):
            if ids[position : position + len(old)] == old:
                ids[position : position + len(old)] = new
                position += len(new)
            else:
                position += 1
        return ids

    def _unused_in(self, text: str) -> str | None:
        """The first private character that `text` lacks and the model spells as its bytes; None if none is."""
        if self._model.byte_id(0) is None:
            return None
        for code in range(0xE000, 0xF8FF):
            character = chr(code)
            if character not in text and self._is_spelled_in_bytes(character):
                return character
        return None

    def _is_spelled_in_bytes(self, character: str) -> bool:
        run = self._byte_ids(character)
        (ids,) = self._model.encode([f"a{character}a"])  # inside a word, where no dummy prefix stands
        return any(ids[start : start + len(run)] == run for start in range(len(ids)))

    def _byte_ids(self, character: str) -> list[int]:
        ids = [self._model.byte_id(byte) for byte in character.encode()]
        return [i for i in ids if i is not None]
