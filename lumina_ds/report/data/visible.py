"""Any text made safe to show: what is invisible, or would move the cursor or the writing direction, is spelled out."""

from __future__ import annotations

import re
import unicodedata

_SPELLED = {"\n": "\u23ce", "\t": "\u21e5", "\x7f": "\u2421"}
_NOT_ASCII_TEXT = re.compile(r"[^ -~]")
_EXCERPT_CHARACTERS = 72


def visible(text: str) -> str:
    """Control characters as their pictures (U+2400 and up), other invisible or unassigned ones as `\\u{200B}`."""
    return _NOT_ASCII_TEXT.sub(lambda match: _spell(match[0]), text)


def excerpt(text: str, around: int = 0, length: int = _EXCERPT_CHARACTERS) -> str:
    """At most `length` characters of `text` from shortly before position `around` on, made visible; an ellipsis stands for the rest."""
    begin = max(0, around - length // 3)
    end = begin + length
    return ("…" if begin else "") + visible(text[begin:end]) + ("…" if end < len(text) else "")


def _spell(character: str) -> str:
    if character in _SPELLED:
        return _SPELLED[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    # Format characters (bidi overrides, zero-width), separators, surrogates, private and unassigned ones.
    category = unicodedata.category(character)
    if category[0] == "C" or category in ("Zl", "Zp"):
        return f"\\u{{{ord(character):04X}}}"
    return character
