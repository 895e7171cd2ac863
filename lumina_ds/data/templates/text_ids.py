"""Ids of a rendered text, as transformers makes them from the same tokenizer file, and which of them are control tokens.

A content that spells a special token comes with a guard inside the spelling; then it is encoded as ordinary text, and the
guard is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

from lumina_ds.data.tokenizer.spans import Part
from lumina_ds.data.tokenizer.tokenizer import Tokenizer

# Code points that Unicode keeps out of texts; one that a conversation does not hold guards its spellings.
GUARDS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Control(NamedTuple):
    """A control token of a text: its place among the ids, its id, and the character at which it begins."""

    place: int
    id: int
    begin: int


class TextIds(NamedTuple):
    ids: list[int]
    controls: list[Control]


@lru_cache(maxsize=4)
def text_encoder(tokenizer: Tokenizer) -> TextEncoder:
    """The one of a tokenizer."""
    return TextEncoder(tokenizer)


class TextEncoder:
    """See this module's docstring. control_names: special token -> id, of the tokenizer's file."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.control_names = {name: number for name, number in tokenizer.special_tokens.items() if name}
        self.control_ids = frozenset(self.control_names.values())
        self.spelling = any_of(self.control_names)
        self._names = {number: name for name, number in self.control_names.items()}

    def encode(self, text: str, guard: str = "") -> TextIds:
        """Ids, and the control tokens among them. Raises ValueError where a token stands for no text of its name."""
        if guard and guard in text:
            ids = self._tokenizer.encode_parts(list(self._parts(text, guard))).ids
        else:
            ids = self._tokenizer.encode_template(text)
        control_ids = self.control_ids
        places = [place for place, token_id in enumerate(ids) if token_id in control_ids]
        named = self.named(text).controls
        if [control.id for control in named] != [ids[place] for place in places]:
            raise ValueError(f"{len(named)} names of special tokens stand in the text, and {len(places)} became ids")
        return TextIds(ids, [control._replace(place=place) for place, control in zip(places, named, strict=True)])

    def named(self, text: str) -> TextIds:
        """The control tokens that encode() finds, by their names alone: without ids of the text, and places among them."""
        names = self.control_names
        return TextIds([], [Control(-1, names[found[0]], found.start()) for found in self.spelling.finditer(text)])

    def guarded(self, text: str, guard: str) -> str:
        """`text` with the guard after the first character of every special token that it spells."""
        # What is left of one may spell a shorter one; each pass breaks at least one up. One character cannot be broken up.
        while self._breakable.search(text):
            text = self._breakable.sub(lambda found: found[0][0] + guard + found[0][1:], text)
        return text

    def name_of(self, token_id: int) -> str | None:
        """Name of a control token."""
        return self._names.get(token_id)

    def _parts(self, text: str, guard: str) -> Iterable[Part]:
        """The names of special tokens, and what stands between them as text that no one may take for one."""
        end = 0
        for found in self.spelling.finditer(text):
            yield text[end : found.start()].replace(guard, ""), False
            yield found[0], True
            end = found.end()
        yield text[end:].replace(guard, ""), False

    @cached_property
    def _breakable(self) -> re.Pattern[str]:
        return any_of(name for name in self.control_names if len(name) > 1)


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest first."""
    longest_first = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
