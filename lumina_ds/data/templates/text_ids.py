"""Ids of a rendered text, as transformers makes them from the same tokenizer file, and which of them are control tokens.

A special token that stands in the text becomes its id; the text between is encoded by the model. A content that
spells a special token comes with GUARD inside the spelling: it is not found then, and GUARD is dropped before the
text reaches the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from lumina_ds.data.tokenizer.sentencepiece_file import CONTROL, read_model_file
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.tokenizer.tokenizer_json import parse_tokenizer_json

# A code point that Unicode keeps out of texts.
GUARD = "\ufdd0"


class Control(NamedTuple):
    """A control token of a text: its place among the ids, its id, and the character at which it begins."""

    place: int
    id: int
    begin: int


class TextIds(NamedTuple):
    ids: list[int]
    controls: list[Control]


def text_encoder(tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> TextEncoder:
    """special_tokens: names by role, as in tokenizer_config.json; transformers makes each of them a special token."""
    return _encoder(tokenizer, tuple(sorted({name for name in special_tokens.values() if isinstance(name, str)})))


@lru_cache(maxsize=4)
def _encoder(tokenizer: Tokenizer, names: tuple[str, ...]) -> TextEncoder:
    document = parse_tokenizer_json(tokenizer.path.read_bytes())
    return _Fast(document, names) if document is not None else _SentencePiece(tokenizer)


class TextEncoder:
    """See this module's docstring. control_names: special token -> id."""

    control_names: dict[str, int]

    def encode(self, text: str) -> TextIds:
        raise NotImplementedError

    @cached_property
    def spelling(self) -> re.Pattern[str]:
        """Finds the spelling of a special token."""
        return any_of(self.control_names)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self.control_names.values())

    def guard(self, text: str) -> str:
        """`text` with GUARD after the first character of every special token that it spells."""
        guarded = text
        # What is left may spell a shorter one; each pass breaks at least one up.
        while self.spelling.search(guarded):
            guarded = self.spelling.sub(lambda found: found[0][0] + GUARD + found[0][1:], guarded)
        return guarded

    def name_of(self, token_id: int) -> str | None:
        """Name of a control token."""
        return self._names.get(token_id)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self.control_names.items()}


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest first."""
    longest_first = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class _Fast(TextEncoder):
    """A tokenizer.json, by the library that transformers uses."""

    def __init__(self, document: dict[str, Any], names: tuple[str, ...]) -> None:
        self._document = {**document, "truncation": None, "padding": None, "model": {**document["model"], "dropout": None}}
        self._names_of_roles = names
        self._whole = self._load(self._document)
        added = self._whole.get_added_tokens_decoder()
        self.control_names = {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str) -> TextIds:
        found = (self._guarded if GUARD in text else self._whole).encode(text, add_special_tokens=False)
        ids = found.ids
        control_ids, places = self.control_ids, []
        for place, token_id in enumerate(ids):
            if token_id in control_ids:
                places.append(place)
        offsets = found.offsets if places else []
        return TextIds(ids, [Control(place, ids[place], offsets[place][0]) for place in places])

    @cached_property
    def _guarded(self) -> Any:
        """The same tokenizer, which drops GUARD after it has looked for special tokens, and merges to none of them."""
        document = self._document
        special = set(self.control_names)
        added = [
            {**token, "normalized": False} if token["content"] in special else token
            for token in document.get("added_tokens") or []
        ]
        model = dict(document["model"])
        if model.get("merges"):
            pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [list(pair) for pair in pairs if not special & {*pair, "".join(pair)}]
        drop = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
        own = document.get("normalizer")
        normalizer = {"type": "Sequence", "normalizers": [drop, own] if own else [drop]}
        return self._load({**document, "added_tokens": added, "model": model, "normalizer": normalizer})

    def _load(self, document: dict[str, Any]) -> Any:
        import tokenizers

        loaded = tokenizers.Tokenizer.from_str(json.dumps(document))
        known = [name for name in self._names_of_roles if loaded.token_to_id(name) is not None]
        loaded.add_special_tokens(known)
        return loaded


@dataclass(frozen=True)
class _Piece:
    text: str
    control_id: int | None
    begin: int


class _SentencePiece(TextEncoder):
    """A SentencePiece model: its control pieces are found in the text, and what stands between is encoded by itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces = read_model_file(tokenizer.path.read_bytes()).pieces
        self.control_names = {
            piece.text.decode(errors="replace"): number for number, piece in enumerate(pieces) if piece.kind == CONTROL
        }

    def encode(self, text: str) -> TextIds:
        pieces = list(self._pieces(text))
        texts = iter(self._tokenizer.encode_batch([p.text.replace(GUARD, "") for p in pieces if p.control_id is None]))
        ids: list[int] = []
        controls = []
        for piece in pieces:
            if piece.control_id is None:
                ids += next(texts)
            else:
                controls.append(Control(len(ids), piece.control_id, piece.begin))
                ids.append(piece.control_id)
        return TextIds(ids, controls)

    def _pieces(self, text: str) -> Iterable[_Piece]:
        end = 0
        for found in self.spelling.finditer(text):
            if found.start() > end:
                yield _Piece(text[end : found.start()], None, end)
            yield _Piece(found[0], self.control_names[found[0]], found.start())
            end = found.end()
        if end < len(text):
            yield _Piece(text[end:], None, end)
