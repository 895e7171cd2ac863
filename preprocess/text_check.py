"""What a tokenizer loses of the data's own texts: ids for unknown characters, and texts that do not come back.

Unknown ids are counted among all ids. Whether a text comes back, decode(encode(text)) == text, is tried on the turns of
an input's first lines and of every so-manieth line, fewer where the tokenizer is proven to lose nothing. So it is the
same for any number of workers and any size of blocks, and small files are tried whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lumina_ds.data.shards.text_loss import TextLoss, listed
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.text import counted

# (first lines of an input, then every so-manieth), by whether the tokenizer is proven to lose nothing.
SAMPLE = {True: (16, 256), False: (128, 128)}
MOST_PLACES = 3
_MOST_CHARACTERS = 100
_OTHERS = "others"
_NAMES = {"\n": "newline", "\t": "tab", " ": "space", "\r": "carriage return", "\xa0": "no-break space", "\0": "NUL"}


class UnknownIds(NamedTuple):
    """Of one conversation. example: the characters, in the first few conversations only."""

    line: int
    num_ids: int
    num_trained: int
    example: str


class ChangedText(NamedTuple):
    """One turn that decodes to another text, and the characters that are missing then, by name."""

    line: int
    lost: dict[str, int]
    reason: str


@dataclass(frozen=True)
class BlockTextCheck:
    """What was found in one block. tried_lines: int64, a line for each turn that was tried."""

    source: str = ""
    tried_lines: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    changed: list[ChangedText] = field(default_factory=list)
    unknown: list[UnknownIds] = field(default_factory=list)

    def until(self, line: int) -> BlockTextCheck:
        """Of the lines up to and including `line`."""
        return BlockTextCheck(
            self.source,
            self.tried_lines[self.tried_lines <= line],
            [entry for entry in self.changed if entry.line <= line],
            [entry for entry in self.unknown if entry.line <= line],
        )


class EncodedTexts(NamedTuple):
    """Turns and what became of them: turns of conversation i are first_turns[i] to first_turns[i + 1], its ids follow
    each other with lengths[i]."""

    texts: Texts
    first_turns: np.ndarray
    lines: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray


def check_texts(source: str, encoded: EncodedTexts, tokenizer: Tokenizer) -> BlockTextCheck:
    """Try the block's texts on the tokenizer."""
    first_lines, every = SAMPLE[tokenizer.loses_nothing]
    chosen = np.flatnonzero((encoded.lines <= first_lines) | (encoded.lines % every == 0)).tolist()
    bounds = [encoded.first_turns[number : number + 2].tolist() for number in chosen]
    turns = [turn for begin, end in bounds for turn in range(begin, end)]
    lines = np.repeat(encoded.lines[chosen], [end - begin for begin, end in bounds]) if chosen else encoded.lines[:0]
    texts = [_text(encoded.texts, turn) for turn in turns]
    changed = [
        ChangedText(line, *describe_change(text, back))
        for line, text, back in zip(lines.tolist(), texts, tokenizer.round_trip(texts), strict=True)
        if back != text
    ]
    return BlockTextCheck(source, lines, changed, list(_unknown_ids(encoded, tokenizer)))


def describe_change(text: str, back: str) -> tuple[dict[str, int], str]:
    """(characters of `text` that `back` lacks by name, what happened in words)."""
    lost = Counter(text)
    lost.subtract(back)
    missing = {_name(character): count for character, count in lost.most_common() if count > 0}
    added = {_name(character): -count for character, count in lost.items() if count < 0}
    if not missing and not added:
        return {}, "characters change their order"
    parts = [f"{word} {listed(names)}" for word, names in (("loses", missing), ("gains", added)) if names]
    return missing, ", ".join(parts)


class TextCheck:
    """What was found so far, in the order of the input."""

    def __init__(self, found: TextLoss | None = None) -> None:
        self._found = (found or TextLoss()).model_dump()

    def add(self, block: BlockTextCheck) -> None:
        found = self._found
        found["tried_texts"] += len(block.tried_lines)
        found["changed_texts"] += len(block.changed)
        for changed in block.changed:
            _add_names(found["lost_characters"], changed.lost)
            if len(found["first_changed"]) < MOST_PLACES:
                found["first_changed"].append(f"{block.source} line {changed.line}: {changed.reason}")
        for unknown in block.unknown:
            found["unknown_ids"] += unknown.num_ids
            found["trained_unknown_ids"] += unknown.num_trained
            place = f"{block.source} line {unknown.line}: {unknown.example}"
            if len(found["first_unknown"]) < MOST_PLACES:
                found["first_unknown"].append(place)
            if unknown.num_trained and not found["first_trained_unknown"]:
                found["first_trained_unknown"] = place

    def loss(self) -> TextLoss:
        return TextLoss.model_validate(self._found)


def check_unknown(loss: TextLoss | None, allow_unknown: bool, num_lines: int, tokenizer: str) -> None:
    """Raises DataError where the model would be trained to say ids that stand for no text."""
    if loss is None or allow_unknown or not loss.trained_unknown_ids:
        return
    raise DataError(
        f"{counted(loss.unknown_ids, 'unknown id')} in the first {counted(num_lines, 'line')}, "
        f"{loss.trained_unknown_ids:,} of them trained: the tokenizer {tokenizer} cannot spell the text (first trained: "
        f"{loss.first_trained_unknown}); use one with byte fallback, such as `lumina tokenizer train` makes, or train on "
        "them with --allow-unknown"
    )


def _text(texts: Texts, turn: int) -> str:
    return texts.data[texts.offsets[turn] + 1 : texts.offsets[turn + 1]].tobytes().decode()


def _unknown_ids(encoded: EncodedTexts, tokenizer: Tokenizer) -> Iterator[UnknownIds]:
    if tokenizer.unknown_id is None or not len(encoded.ids):
        return
    is_unknown = encoded.ids == tokenizer.unknown_id
    if not is_unknown.any():
        return
    starts = np.cumsum(encoded.lengths, dtype=np.int64) - encoded.lengths
    counts = np.add.reduceat(is_unknown, starts, dtype=np.int64)
    trained = np.add.reduceat(is_unknown & (encoded.mask != 0), starts, dtype=np.int64)
    found = np.flatnonzero(counts).tolist()
    # The first few, and the first that is trained: which of them are the first of all inputs shows only later.
    shown = {*found[:MOST_PLACES], *np.flatnonzero(trained)[:1].tolist()}
    for number in found:
        example = _unknown_characters(encoded, number, tokenizer) if number in shown else ""
        yield UnknownIds(int(encoded.lines[number]), int(counts[number]), int(trained[number]), example)


def _unknown_characters(encoded: EncodedTexts, number: int, tokenizer: Tokenizer) -> str:
    first, last = encoded.first_turns[number : number + 2].tolist()
    characters = sorted({c for turn in range(first, last) for c in _text(encoded.texts, turn)})
    ids = tokenizer.encode_batch(characters)
    unknown = [c for c, found in zip(characters, ids, strict=True) if tokenizer.unknown_id in found]
    return listed({_name(c): 1 for c in unknown}) if unknown else "a sequence of characters"


def _add_names(counts: dict[str, int], found: Mapping[str, int]) -> None:
    for name, count in found.items():
        kept = name if name in counts or len(counts) < _MOST_CHARACTERS else _OTHERS
        counts[kept] = counts.get(kept, 0) + count


def _name(character: str) -> str:
    if name := _NAMES.get(character):
        return name
    if " " < character <= "~":
        return repr(character)
    code = f"U+{ord(character):04X}"
    return f"{character} ({code})" if character.isprintable() else code
