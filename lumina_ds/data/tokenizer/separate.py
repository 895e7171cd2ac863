"""A copy of a tokenizer.json in which no text reaches a special token.

As it stands, such a file turns text that spells a special token (`<s>`, `<|im_end|>`) into that token: it looks for the
name in the text, and its vocabulary or a merge may spell the name too. In the copy every special token has another
name, which holds a guard; all ids stay as they are, and no merge makes or takes a special token. Padding, truncation
and the post-processor are dropped. Added tokens that are not special (runs of spaces, `<think>`) stay: the library
finds them in text with all their flags.

With `encode_special_tokens` the library does not look for the copy's special tokens at all, which is what a content
needs; without it the guarded names stand for special tokens, which is what a rendered template needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A code point that Unicode reserves from use in text; no pre-tokenizer makes it.
GUARD = "\ufdd0"


def guarded_name(name: str, guard: str = GUARD) -> str:
    """What the special token `name` is called in the copy."""
    return f"{guard}{name}{guard}"


def special_names(document: dict[str, Any]) -> list[str]:
    """Names of the special tokens, longest first: the order in which the library finds them in a text."""
    names = {token["content"] for token in document.get("added_tokens") or [] if token.get("special")}
    names.discard("")  # the library passes over a token without a name
    return sorted(names, key=lambda name: (-len(name), name))


def without_special_tokens(document: dict[str, Any], guard: str = GUARD) -> dict[str, Any]:
    """The copy. document: a tokenizer.json with a BPE model that the library has read."""
    renamed = {name: guarded_name(name, guard) for name in special_names(document)}
    model = dict(document["model"])
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    model["merges"] = [merge for merge in model.get("merges") or [] if not renamed.keys() & _pieces_of(merge)]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    added = [_renamed(token, renamed) for token in document.get("added_tokens") or []]
    dropped: dict[str, Any] = {"post_processor": None, "truncation": None, "padding": None}
    return {**document, **dropped, "added_tokens": added, "model": model}


def _renamed(token: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    name = token["content"]
    return {**token, "content": renamed.get(name, name)} if token.get("special") else token


def _pieces_of(merge: str | Sequence[str]) -> set[str]:
    """Both sides of a merge and what it makes; older files write it as one string with a space."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}
