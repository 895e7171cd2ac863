"""One packed row as training sees it, token by token: the content of the mask microscope (`lumina data inspect`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lumina_ds.report.data.token_text import TokenText, spell_bytes
from lumina_ds.report.data.visible import visible

if TYPE_CHECKING:
    from lumina_ds.data.packing import PackingPlan, Segment
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.data.tokenizer.tokenizer import Tokenizer

# `marker` is a control id of the template: text that spells the same characters is `text`.
Kind = Literal["marker", "byte", "text"]


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
        return self.kind != "marker" and self.shown.endswith(visible("\n"))

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
    reader = _SegmentReader(folder, tokenizer)
    segments = []
    position = 0
    for segment in plan.row(row):
        segments.append(reader.read(segment, position))
        position += segment.length
    return MaskRow(row, plan.seq_length, segments)


class _SegmentReader:
    def __init__(self, folder: ShardFolder, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._text = TokenText(tokenizer)
        self._markers = {tokenizer.bos_id, tokenizer.end_id, *tokenizer.role_ids.values()}
        if not tokenizer.role_ids:  # a model's own template
            self._markers |= set(tokenizer.special_tokens.values())

    def read(self, segment: Segment, position: int) -> MaskSegment:
        """The segment whose first token stands at `position` of the row."""
        ids, mask = (column.tolist() for column in self._folder.document(segment.document))
        end = segment.start + segment.length
        roles = list(_roles(ids[:end], mask[:end], self._tokenizer))
        pieces = [self._tokenizer.piece(token_id) for token_id in ids[segment.start : end]]
        data = [self._bytes_of(*token) for token in zip(ids[segment.start : end], pieces, strict=True)]
        tokens = []
        for offset, (piece, spelled) in enumerate(zip(pieces, spell_bytes(data), strict=True)):
            place = segment.start + offset
            is_marker = ids[place] in self._markers
            kind: Kind = "marker" if is_marker else "byte" if spelled else "text"
            shown = visible(piece) if is_marker else spelled or self._text.text_of(piece)
            # The first token of a piece has no predecessor in the row, so nothing predicts it.
            is_trained = bool(mask[place]) and offset > 0
            tokens.append(Token(ids[place], piece, shown, kind, is_trained, position + offset, place, *roles[place]))
        source, line = self._folder.origin(segment.document)
        return MaskSegment(segment.document, segment.start, segment.length, source, line, len(ids), tokens)

    def _bytes_of(self, token_id: int, piece: str) -> bytes | None:
        return None if token_id in self._markers else self._text.bytes_of(token_id, piece)


def _roles(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> Iterator[tuple[str | None, int]]:
    """(role, number of its turn) at every position, from the markers, which text can never become.

    A model's own template has none of them: there the labels tell the assistant's turns, which alone are numbered.
    """
    if not tokenizer.role_ids:
        yield from _replies(mask)
        return
    role_of = {marker: role for role, marker in tokenizer.role_ids.items()}
    role: str | None = None
    turn = 0
    previous = -1
    for token_id in ids:
        if token_id in role_of:
            # Two role tokens one after the other are the header of what the system gives: tools, and their results.
            is_second = previous == tokenizer.role_ids["system"]
            role, turn = role_of[token_id], turn + (not is_second)
            if is_second:
                role = "tools" if role == "system" else "tool"
        yield role, turn
        previous = token_id
        if token_id == tokenizer.end_id:
            role = None


def _replies(mask: list[int]) -> Iterator[tuple[str | None, int]]:
    turn = 0
    for before, is_label in pairwise([0, *mask]):
        turn += is_label > before
        yield ("assistant" if is_label else None), turn


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
