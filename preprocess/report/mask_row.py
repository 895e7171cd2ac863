"""One packed row as training sees it, token by token: the content of the mask microscope (`lumina data inspect`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from preprocess.report.visible import visible

if TYPE_CHECKING:
    from lumina_ds.data.packing import PackingPlan, Segment
    from lumina_ds.data.shards import ShardFolder
    from lumina_ds.data.tokenizer import Tokenizer

# `marker` is a control id of the template: text that spells the same characters is `text`.
Kind = Literal["marker", "byte", "text"]
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_SYMBOL = "\u2581"
_LINE_END = b"\n"


class Token(NamedTuple):
    """One position of a row. `shown` is its piece made safe and readable; `turn` counts from 1, 0 before the first."""

    id: int
    piece: str
    shown: str
    kind: Kind
    is_trained: bool
    position: int  # in the packed row
    document_position: int
    role: str | None
    turn: int

    @property
    def ends_line(self) -> bool:
        """Whether a listing goes on in a new line after it."""
        return self.shown == visible("\n")

    @property
    def label(self) -> str:
        """What the position is to training, in words."""
        trained = "trained" if self.is_trained else "not trained"
        return f"{trained}, {self.role} turn {self.turn}" if self.role else trained


@dataclass(frozen=True)
class MaskSegment:
    """A whole conversation or, where `start` or `length` leave something out, a piece of one."""

    document: int
    start: int
    length: int
    source: str
    line: int
    document_length: int
    tokens: list[Token]

    @property
    def num_trained(self) -> int:
        return sum(token.is_trained for token in self.tokens)

    @property
    def cut(self) -> str | None:
        """Which part of the conversation this is; None for the whole."""
        if self.length == self.document_length:
            return None
        return f"tokens {self.start:,} to {self.start + self.length - 1:,} of {self.document_length:,}"


@dataclass(frozen=True)
class MaskRow:
    row: int
    seq_length: int
    segments: list[MaskSegment]

    @property
    def padding(self) -> int:
        return self.seq_length - sum(segment.length for segment in self.segments)

    @property
    def num_trained(self) -> int:
        return sum(segment.num_trained for segment in self.segments)

    def to_json(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "seq_length": self.seq_length,
            "padding": self.padding,
            "trained": self.num_trained,
            "segments": [_segment_json(segment) for segment in self.segments],
        }


def read_row(folder: ShardFolder, tokenizer: Tokenizer, plan: PackingPlan, row: int) -> MaskRow:
    """Read row `row` of `plan`; a token is trained where it is the target of its predecessor in the row."""
    segments = []
    position = 0
    for segment in plan.row(row):
        segments.append(_read_segment(folder, tokenizer, segment, position))
        position += segment.length
    return MaskRow(row, plan.seq_length, segments)


def _read_segment(folder: ShardFolder, tokenizer: Tokenizer, segment: Segment, position: int) -> MaskSegment:
    ids, mask = (column.tolist() for column in folder.document(segment.document))
    end = segment.start + segment.length
    roles = list(_roles(ids[:end], tokenizer))
    tokens = []
    for place in range(segment.start, end):
        piece = tokenizer.piece(ids[place])
        kind = _kind(ids[place], piece, tokenizer)
        # The first token of a piece has no predecessor in the row, so nothing predicts it.
        is_trained = bool(mask[place]) and place > segment.start
        row_position = position + place - segment.start
        tokens.append(Token(ids[place], piece, _shown(piece), kind, is_trained, row_position, place, *roles[place]))
    source, line = folder.origin(segment.document)
    tokens = list(_spelled_bytes(tokens))
    return MaskSegment(segment.document, segment.start, segment.length, source, line, len(ids), tokens)


def _roles(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[str | None, int]]:
    """(role, number of its turn) at every position, from the markers, which text can never become."""
    role_of = {marker: role for role, marker in tokenizer.role_ids.items()}
    role: str | None = None
    turn = 0
    for token_id in ids:
        if token_id in role_of:
            role, turn = role_of[token_id], turn + 1
        yield role, turn
        if token_id == tokenizer.end_id:
            role = None


def _kind(token_id: int, piece: str, tokenizer: Tokenizer) -> Kind:
    if token_id in (tokenizer.bos_id, tokenizer.end_id, *tokenizer.role_ids.values()):
        return "marker"
    # A text piece that is spelled like a byte decodes to its own spelling, a byte does not.
    if _BYTE_PIECE.fullmatch(piece) and tokenizer.decode([token_id]) != piece:
        return "byte"
    return "text"


def _shown(piece: str) -> str:
    return visible(piece.replace(_SPACE_SYMBOL, " "))


def _spelled_bytes(tokens: list[Token]) -> Iterator[Token]:
    """Bytes as two digits, the last byte of a character with the character behind it: E6 97 A5=日."""
    pending = b""
    for token in tokens:
        match = _BYTE_PIECE.fullmatch(token.piece) if token.kind == "byte" else None
        if match is None:
            pending = b""
            yield token
            continue
        byte = bytes.fromhex(match[1])
        # A byte below 0x80 or from 0xC0 on begins a character; in damaged text one may begin before the other ends.
        pending = pending + byte if 0x80 <= byte[0] < 0xC0 else byte
        try:
            character = visible(pending.decode("utf-8"))
        except UnicodeDecodeError:
            yield token._replace(shown=match[1])
        else:
            yield token._replace(shown=character if byte == _LINE_END else f"{match[1]}={character}")


def _segment_json(segment: MaskSegment) -> dict[str, Any]:
    return {
        "document": segment.document,
        "start": segment.start,
        "length": segment.length,
        "document_length": segment.document_length,
        "source": segment.source,
        "line": segment.line,
        "ids": [token.id for token in segment.tokens],
        "pieces": [token.piece for token in segment.tokens],
        "trained": [int(token.is_trained) for token in segment.tokens],
        "kinds": [token.kind for token in segment.tokens],
        "roles": [token.role for token in segment.tokens],
    }
