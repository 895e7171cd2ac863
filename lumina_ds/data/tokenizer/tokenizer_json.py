"""A Hugging Face tokenizer.json for data/tokenizer/tokenizer.py, through the package `tokenizers` (extra `hf`).

As it stands, such a file turns text that spells an added token (`<s>`, `<|im_end|>`) into that token. So text is
encoded with a copy of it that has no added tokens at all, neither as matches in the text nor as entries of the
vocabulary, and no merge that ends in one: their ids exist, and no text reaches them. Padding, truncation and the
post-processor are dropped too.

Only BPE that can spell every character (byte-level, or with byte fallback) is taken. Unigram, WordPiece and
WordLevel find a control token's name in their vocabulary, or lose characters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lumina_ds.data.tokenizer.flat import Texts, flatten
from lumina_ds.errors import DataError, MachineError

INSTALL = "pip install 'lumina-ds[hf]'"


def parse_tokenizer_json(content: bytes) -> dict[str, Any] | None:
    """The document, or None where `content` is no tokenizer.json."""
    if content.lstrip()[:1] != b"{":
        return None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and isinstance(document.get("model"), dict) else None


def read_tokenizer_json(document: dict[str, Any], path: Path) -> TokenizerJson:
    """Raises DataError for a kind that cannot keep text apart from control tokens, MachineError without tokenizers."""
    try:
        import tokenizers
    except ImportError:
        raise MachineError(f"{path} is a tokenizer.json, which needs the package tokenizers; {INSTALL}") from None
    # Read by the library at each call: parallelism is the offline stage's, by processes. A user's own setting wins.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bare = _without_added_tokens(document)
    _check_kind(bare, path, set(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    try:
        whole = tokenizers.Tokenizer.from_str(json.dumps(document))
        plain = tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise DataError(f"{path} is a damaged tokenizer.json: {error}") from error
    special = {token["content"] for token in document.get("added_tokens") or [] if token.get("special")}
    return TokenizerJson(whole, plain, special, _reads_space_symbol_as_space(plain))


class TokenizerJson:
    """See tokenizer.Model. whole: the file as it is; plain: without added tokens."""

    file_name = "tokenizer.json"

    def __init__(self, whole: Any, plain: Any, special: set[str], has_space_symbol: bool) -> None:
        self._whole = whole
        self._plain = plain
        self._special = special
        self._has_space_symbol = has_space_symbol
        self.num_ids: int = max(whole.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = _leading_id(whole)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return flatten(self.encode(texts))

    def encode_utf8(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        return self.encode_flat(texts.split())

    def is_compiled(self) -> bool:
        return False

    def decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        return self._whole.id_to_token(token_id) or f"<unused {token_id}>"

    def control_id(self, marker: str) -> int | None:
        return self._whole.token_to_id(marker) if marker in self._special else None

    def byte_id(self, byte: int) -> int | None:
        return self._plain.token_to_id(f"<0x{byte:02X}>") if self._has_space_symbol else None


def _check_kind(document: dict[str, Any], path: Path, byte_level_alphabet: set[str]) -> None:
    model = document["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        remedy = "use the SentencePiece model it was made from" if kind == "Unigram" else "use a BPE one"
        raise DataError(f"{path} is a tokenizer.json of type {kind}, in which text can spell control tokens; {remedy}")
    vocabulary = model.get("vocab") or {}
    has_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    is_byte_level = _mentions(document.get("pre_tokenizer"), "ByteLevel") and byte_level_alphabet <= set(vocabulary)
    if not has_bytes and not is_byte_level:
        raise DataError(
            f"{path} would lose characters that its vocabulary lacks: it is neither byte-level nor has it byte "
            "fallback; use another tokenizer"
        )


def _mentions(component: Any, kind: str) -> bool:
    """Is there a pre-tokenizer, normalizer or decoder of that type in `component`, alone or in a sequence?"""
    if isinstance(component, list):
        return any(_mentions(part, kind) for part in component)
    if not isinstance(component, dict):
        return False
    return component.get("type") == kind or any(_mentions(part, kind) for part in component.values())


def _without_added_tokens(document: dict[str, Any]) -> dict[str, Any]:
    added = {token["content"] for token in document.get("added_tokens") or []}
    model = dict(document["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in added}
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not added & _pieces_of(merge)]
    if model.get("unk_token") in added:
        model["unk_token"] = None
    dropped: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return {**document, **dropped, "model": model}


def _pieces_of(merge: str | Sequence[str]) -> set[str]:
    """Both sides of a merge and what it makes; older files write it as one string with a space."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}


def _reads_space_symbol_as_space(plain: Any) -> bool:
    encodings = [plain.encode(text, add_special_tokens=False).ids for text in ("a\u2581b", "a b")]
    return encodings[0] == encodings[1]


def _leading_id(whole: Any) -> int | None:
    """The id that the file's own post-processor puts before a text, if one."""
    whole.no_padding()
    whole.no_truncation()
    bare = whole.encode("a", add_special_tokens=False).ids
    framed = whole.encode("a", add_special_tokens=True).ids
    return framed[0] if len(framed) > len(bare) and framed[1 : 1 + len(bare)] == bare else None
