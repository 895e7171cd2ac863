"""A block's lines to the turns of its good ones, in a few flat arrays: what tokenizing and the layout work on.

The compiled scanner of scan_kernel.py reads nearly all lines. Each one that it does not take, and every line where
numba is missing, goes through the strict parser of lumina_ds.data.conversation, which accepts the same lines with the same
turns and has the reasons.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lumina_ds.data.conversation import is_blank, parse_conversation
from lumina_ds.data.rendering import RENDERED_ROLES, is_plain, render
from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.data.tokenizer.tokenizer import ROLES
from lumina_ds.data.turns import Conversation, TrainReasoning, TrainTurns, Turn
from preprocess.sources import Block

log = logging.getLogger("lumina_ds.preprocess")

SPACE_SYMBOL = "\u2581".encode()
# Stands for a turn of a line that the compiled scanner has read: such a line holds no flag.
_AS_ROLES_SAY = 2
# The shortest message of a list of turns has more bytes, and so has the shortest line with one.
_MESSAGE_BYTES = 24
_LINE_BYTES = 32


class Rejection(NamedTuple):
    """One refused line: where it stands and why."""

    source: str
    line: int
    byte_offset: int
    rule: str
    reason: str


class Conversations(NamedTuple):
    """Turns of many conversations: conversation i has turns first_turns[i] .. first_turns[i + 1] - 1.

    A turn is here what rendering.py makes of one, with its tools and reasoning in its text.
    """

    texts: Texts  # of the turns
    roles: np.ndarray  # [turns] uint8, places in RENDERED_ROLES
    trained: np.ndarray  # [turns] uint8, 1 where the turn is a label
    first_turns: np.ndarray  # [conversations + 1] int64
    lines: np.ndarray  # [conversations] int64
    has_space_symbol: bool  # a literal U+2581 in some text
    other_keys: Counter[str]  # places of keys that mean nothing here
    num_with_other_keys: int  # conversations that hold such keys
    context_bytes: dict[int, int]  # turn: its first bytes, without the space before it, that are no labels
    rendered: dict[int, Conversation]  # those whose turns are not what stands here
    notes: Counter[str]  # what is to be said of conversations, and how often it is true

    @property
    def num_conversations(self) -> int:
        return len(self.lines)

    def whole(self) -> Iterator[Conversation]:
        """Every conversation as it was read, but for its other keys and notes where it is a plain one."""
        texts, roles, trained = self.texts.split(), self.roles.tolist(), self.trained.tolist()
        for number, (begin, end) in enumerate(pairwise(self.first_turns.tolist())):
            if number in self.rendered:
                yield self.rendered[number]
                continue
            turns = tuple(Turn(ROLES[roles[turn]], texts[turn]) for turn in range(begin, end))
            yield Conversation(turns, tuple(map(bool, trained[begin:end])))

    def first(self, count: int) -> Conversations:
        """The first `count`; their other keys and notes are not counted apart from those of the rest."""
        num_turns = self.first_turns[count]
        texts = Texts(self.texts.data, self.texts.offsets[: num_turns + 1])
        return self._replace(
            texts=texts, roles=self.roles[:num_turns], trained=self.trained[:num_turns],
            context_bytes={turn: size for turn, size in self.context_bytes.items() if turn < num_turns},
            first_turns=self.first_turns[: count + 1], lines=self.lines[:count],
        )  # fmt: skip


def read_conversations(
    block: Block,
    rejections: list[Rejection],
    max_conversations: int | None = None,
    train_turns: TrainTurns = "all",
    train_reasoning: TrainReasoning = "yes",
    format_name: str | None = None,
) -> Conversations:
    """The good lines of a block, at most `max_conversations`; the others before the last of these go to `rejections`."""
    if block.fault is not None:
        rejections.append(Rejection(block.source, block.first_line, block.byte_offset, *block.fault))
    data = b"" if block.is_blank else block.data
    if data and not data.endswith(b"\n"):
        data += b"\n"
    scan = _Scan(data, block.first_line, train_turns, train_reasoning, format_name)
    while not scan.go_on():
        begin, line = scan.position, scan.line
        end = data.find(b"\n", begin)
        # b"\n" alone ends a line, as in split_lines(); its end is never part of it, nor is one b"\r" before it.
        text = data[begin : end - 1 if end > begin and data[end - 1] == 0x0D else end]
        if not is_blank(text):
            try:
                scan.add(parse_conversation(text, train_turns, train_reasoning, format_name))
            except RejectedLine as fault:
                rejections.append(Rejection(block.source, line, block.byte_offset + begin, fault.rule, fault.reason))
        scan.pass_line(end + 1)
    found = scan.conversations()
    if max_conversations is None or found.num_conversations <= max_conversations:
        return found
    found = found.first(max_conversations)
    rejections[:] = [rejection for rejection in rejections if rejection.line <= found.lines[-1]]
    return found


def can_scan() -> bool:
    """Is the compiled scanner there?"""
    return _kernel() is not None


class _Scan:
    """The arrays that are filled while a block is read, and how far it is read."""

    def __init__(
        self,
        data: bytes,
        first_line: int,
        train_turns: TrainTurns,
        train_reasoning: TrainReasoning,
        format_name: str | None,
    ) -> None:
        # Only flags mark turns, and lines with flags are for the strict parser anyway.
        can_scan = train_turns != "marked" and format_name is None
        self._kernel = _kernel() if can_scan else None
        self._words = self._kernel.known_words() if self._kernel else None
        self._train_turns = train_turns
        self._train_reasoning = train_reasoning
        self._bytes = data
        self._data = np.frombuffer(data, np.uint8)
        # Room for all that the compiled scanner may find; a text never grows.
        self._text = np.empty(len(data), np.uint8)
        self._offsets = np.zeros(len(data) // _MESSAGE_BYTES + 1, np.int64)
        self._roles = np.empty(len(data) // _MESSAGE_BYTES, np.uint8)
        self._trained = np.full(len(self._roles), _AS_ROLES_SAY, np.uint8)
        self._first_turns = np.zeros(len(data) // _LINE_BYTES + 1, np.int64)
        self._lines = np.empty(len(data) // _LINE_BYTES, np.int64)
        self._progress = np.array([0, first_line, 0, 0, 0, 0, 0, 0])
        self._keys = np.empty((64, 2), np.int64)
        self._scanned_keys = np.zeros((32, 4), np.int64)
        self._other_keys: Counter[str] = Counter()
        self._context_bytes: dict[int, int] = {}
        self._rendered: dict[int, Conversation] = {}
        self._notes: Counter[str] = Counter()

    @property
    def position(self) -> int:
        return int(self._progress[0])

    @property
    def line(self) -> int:
        return int(self._progress[1])

    def go_on(self) -> bool:
        """Read on; False before a line that is not taken."""
        if self._kernel is None:
            return self.position == len(self._data)
        return self._kernel.scan_lines(
            self._words, self._data, self._progress, self._text, self._offsets, self._roles, self._first_turns, self._lines,
            self._keys, self._scanned_keys,
        )  # fmt: skip

    def pass_line(self, position: int) -> None:
        self._progress[:2] = position, self.line + 1

    def add(self, conversation: Conversation) -> None:
        """Append the conversation that stands in the current line."""
        pieces = render(conversation, self._train_reasoning)
        _, line, num_bytes, num_turns, num_rows, num_symbols, _, num_lines = self._progress.tolist()
        contents = [b" " + piece.text.encode() for piece in pieces]
        self._reserve(num_bytes + sum(map(len, contents)), num_turns + len(contents), num_rows + 1)
        for piece, encoded in zip(pieces, contents, strict=True):
            num_symbols += SPACE_SYMBOL in encoded
            self._text[num_bytes : num_bytes + len(encoded)] = np.frombuffer(encoded, np.uint8)
            self._roles[num_turns], self._trained[num_turns] = RENDERED_ROLES.index(piece.role), piece.is_trained
            if piece.context_bytes:
                self._context_bytes[num_turns] = piece.context_bytes
            num_bytes, num_turns = num_bytes + len(encoded), num_turns + 1
            self._offsets[num_turns] = num_bytes
        self._lines[num_rows] = line
        self._first_turns[num_rows + 1] = num_turns
        self._progress[2:6] = num_bytes, num_turns, num_rows + 1, num_symbols
        if not is_plain(conversation):
            self._rendered[num_rows] = conversation
        self._notes.update(dict(conversation.notes))
        self._other_keys.update(conversation.other_keys)
        self._progress[7] = num_lines + bool(conversation.other_keys)

    def _reserve(self, num_bytes: int, num_turns: int, num_rows: int) -> None:
        """Make room for so much, and for what the scanner may find in the rest: lines of other formats may be shorter."""
        left = len(self._data) - self.position
        num_turns, num_rows = num_turns + left // _MESSAGE_BYTES, num_rows + left // _LINE_BYTES
        self._text = _with_room(self._text, num_bytes + left)
        self._offsets = _with_room(self._offsets, num_turns + 1)
        self._roles = _with_room(self._roles, num_turns)
        self._trained = _with_room(self._trained, num_turns, _AS_ROLES_SAY)
        self._first_turns = _with_room(self._first_turns, num_rows + 1)
        self._lines = _with_room(self._lines, num_rows)

    def conversations(self) -> Conversations:
        _, _, num_bytes, num_turns, num_rows, num_symbols, num_keys, num_lines = self._progress.tolist()
        texts = Texts(self._text[:num_bytes], self._offsets[: num_turns + 1])
        first_turns, lines = self._first_turns[: num_rows + 1], self._lines[:num_rows]
        roles, trained = self._roles[:num_turns], self._trained[:num_turns]
        np.copyto(trained, _trained(roles, first_turns, self._train_turns), where=trained == _AS_ROLES_SAY)
        for begin, end, count, _ in self._scanned_keys[:num_keys].tolist():
            self._other_keys[self._bytes[begin:end].decode()] += count
        return Conversations(
            texts, roles, trained, first_turns, lines, num_symbols > 0, self._other_keys, num_lines,
            self._context_bytes, self._rendered, self._notes,
        )  # fmt: skip


def _with_room(array: np.ndarray, needed: int, filler: int = 0) -> np.ndarray:
    """`array`, or a longer copy of it that has room for `needed` and half as much again."""
    if needed <= len(array):
        return array
    longer = np.full(needed + needed // 2, filler, array.dtype)
    longer[: len(array)] = array
    return longer


def _trained(roles: np.ndarray, first_turns: np.ndarray, train_turns: TrainTurns) -> np.ndarray:
    """uint8 [turns]: the labels of conversations without flags, each with an assistant turn."""
    is_assistant = roles == ROLES.index("assistant")
    if train_turns == "last" and len(roles):
        places = np.where(is_assistant, np.arange(len(roles)), -1)
        is_assistant = np.zeros(len(roles), bool)
        is_assistant[np.maximum.reduceat(places, first_turns[:-1])] = True
    return is_assistant.astype(np.uint8)


@cache
def _kernel() -> Any:
    """The compiled scanner; None where numba is missing or has nowhere to keep its code."""
    try:
        from preprocess import scan_kernel
    except (ImportError, RuntimeError) as error:
        log.info("reading lines without the compiled scanner, several times slower: %s", error)
        return None
    return scan_kernel
