"""What stands in a SentencePiece model file, read without protobuf: its pieces and the settings of its specs.

Field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE_SYMBOL = "\u2581"


class Piece(NamedTuple):
    text: bytes  # UTF-8, with U+2581 for the space
    score: float
    kind: int


@dataclass(frozen=True)
class ModelFile:
    """Pieces by id, and the fields of trainer_spec and normalizer_spec by number."""

    pieces: list[Piece]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]

    @property
    def is_bpe(self) -> bool:
        return self.trainer.get(3, 1) == 2

    @property
    def has_byte_fallback(self) -> bool:
        return bool(self.trainer.get(35, 0))

    @property
    def has_space_suffix(self) -> bool:
        return bool(self.trainer.get(24, 0))

    @property
    def is_normalized(self) -> bool:
        """Is text changed before it is cut into pieces, but for spaces that become U+2581?"""
        charsmap, removes_spaces, escapes = (
            self.normalizer.get(field, value) for field, value in ((2, b""), (4, 1), (5, 1))
        )
        return bool(charsmap or removes_spaces or not escapes)

    @property
    def loses_nothing(self) -> bool:
        """Does every text come back? Each character is a piece or spelled in bytes, and nothing changes it before."""
        bytes_there = sum(piece.kind == BYTE for piece in self.pieces) == 256
        has_space = any(piece.kind == NORMAL and piece.text == SPACE_SYMBOL.encode() for piece in self.pieces)
        is_altered = self.is_normalized or self.has_space_suffix
        return self.has_byte_fallback and bytes_there and has_space and not is_altered

    @property
    def adds_dummy_prefix(self) -> bool:
        return bool(self.normalizer.get(3, 1))


def read_model_file(content: bytes) -> ModelFile:
    """Raises ValueError, IndexError or KeyError where `content` is no such file."""
    pieces: list[Piece] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(value))
        elif number in specs:
            specs[number].update(_fields(value))  # a message that comes twice is merged
    return ModelFile(pieces, specs[2], specs[3])


def _piece(message: bytes) -> Piece:
    end = 2 + message[1] if message else 0
    if len(message) == end + 5 and message[0] == 0x0A and message[1] < 0x80 and message[end] == 0x15:
        # What nearly all are: a text, then a score. Several times faster to read than field by field.
        return Piece(message[2:end], struct.unpack_from("<f", message, end + 1)[0], NORMAL)
    fields = dict(_fields(message))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return Piece(fields.get(1, b""), score, fields.get(3, NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int, or the bytes of anything else."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(message, position)
        else:
            length = {1: 8, 5: 4}[kind]
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = message[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    shift = 7
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
