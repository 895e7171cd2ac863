"""A rendered chat as parts, of which only the template's own may hold special tokens, and tokens with their places."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# (text, written by the template): in the template's own text the names of special tokens are those tokens; in a content
# they are ordinary text.
Part = tuple[str, bool]


class Spans(NamedTuple):
    """ids of a text, and for each token its first character and the one after its last: int64 [tokens, 2]."""

    ids: list[int]
    spans: np.ndarray


def split_special(text: str, names: Sequence[str]) -> Iterator[Part]:
    """(piece, is a special token's name), the longest name first; empty pieces are left out."""
    if not names:
        yield text, False
        return
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    for number, piece in enumerate(re.split(f"({'|'.join(map(re.escape, longest_first))})", text)):
        if piece:
            yield piece, number % 2 == 1


def joined(parts: Sequence[Part]) -> list[Part]:
    """The same text, neighbours of one kind as one part: a special token may be written in two strokes."""
    merged: list[Part] = []
    for text, is_template in parts:
        if merged and merged[-1][1] == is_template:
            text = merged.pop()[0] + text
        merged.append((text, is_template))
    return merged


def guarded_text(parts: Sequence[Part], names: Sequence[str], guarded: Callable[[str], str]) -> tuple[str, np.ndarray]:
    """(all text with the template's special tokens under guarded names, for each of its places, int64 [characters + 1],
    the place in the original text)."""
    pieces: list[str] = []
    positions: list[np.ndarray] = []
    begin = 0
    for text, is_template in joined(parts):
        for piece, is_special in split_special(text, names if is_template else ()):
            shown = guarded(piece) if is_special else piece
            pieces.append(shown)
            places = np.arange(begin, begin + len(piece))
            # Of a longer name only the ends are ever asked for.
            positions.append(np.full(len(shown), begin) if is_special else places)
            begin += len(piece)
    return "".join(pieces), np.concatenate([*positions, [begin]]).astype(np.int64)
