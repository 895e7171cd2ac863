"""How the pieces of a tokenizer read: bytes, byte-level alphabets and space symbols turned into visible text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lumina_ds.report.data.visible import visible

if TYPE_CHECKING:
    from lumina_ds.data.tokenizer.tokenizer import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_SYMBOL = "\u2581"
_LINE_END = b"\n"


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: printable Latin-1 for itself, others from U+0100 on
    (bytes_to_unicode of GPT-2)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenText:
    """Reads the pieces of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        [space] = tokenizer.encode_batch(["a b"])
        self._is_byte_level = any("\u0120" in tokenizer.piece(token_id) for token_id in space)

    def bytes_of(self, token_id: int, piece: str) -> bytes | None:
        """The bytes that a token stands for where they are no text of their own; None for a token that is text."""
        if self._is_byte_level:
            data = self._byte_level(piece)
            return data if data is not None and _text(data) is None else None
        match = _BYTE_PIECE.fullmatch(piece)
        # A text piece that is spelled like a byte decodes to its own spelling, a byte does not.
        is_byte = match is not None and self._tokenizer.decode([token_id]) != piece
        return bytes.fromhex(match[1]) if match and is_byte else None

    def text_of(self, piece: str) -> str:
        """The text of a piece, made visible."""
        data = self._byte_level(piece) if self._is_byte_level else None
        return visible(piece.replace(_SPACE_SYMBOL, " ") if data is None else _text(data) or piece)

    def _byte_level(self, piece: str) -> bytes | None:
        return bytes(_ALPHABET[c] for c in piece) if all(c in _ALPHABET for c in piece) else None


def spell_bytes(tokens: Iterable[bytes | None]) -> Iterator[str]:
    """Each token's bytes as hexadecimal digits, the last byte of a character with the character: E6, 97, A5=日.

    "" for None, a token that is text. A line end is its sign alone.
    """
    pending = b""
    for data in tokens:
        if not data:
            pending = b""
            yield ""
            continue
        # A byte that continues no character begins one; in damaged text that may be before another has ended.
        pending = pending + data if 0x80 <= data[0] < 0xC0 else data
        text = _text(pending)
        digits = data.hex().upper()
        if data == _LINE_END:
            yield visible("\n")
        else:
            yield digits if text is None else f"{digits}={visible(text)}"


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
