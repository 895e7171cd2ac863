"""A Hugging Face tokenizer.json for data/tokenizer/tokenizer.py, through the package `tokenizers` (extra `hf`).

Text is encoded with a copy that has no reachable special token (separate.py); else its ids are the library's own. The
file's BPE dropout is off: equal text has to give equal ids.

Only BPE that can spell every character (byte-level, or with byte fallback) is taken. Unigram, WordPiece and
WordLevel find a control token's name in their vocabulary, or lose characters.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lumina_ds.data.tokenizer.flat import Texts, flatten
from lumina_ds.data.tokenizer.separate import GUARD, guarded_name, special_names, without_special_tokens
from lumina_ds.data.tokenizer.spans import Part, Spans, guarded_text
from lumina_ds.errors import DataError, LuminaError, MachineError

log = logging.getLogger(__name__)

INSTALL = "pip install 'lumina-ds[hf]'"
# Ids beyond are damage: published vocabularies end below 2^19, and every id is a row of the embedding.
MAX_ID = (1 << 24) - 1


def parse_tokenizer_json(content: bytes) -> dict[str, Any] | None:
    """The document, or None where `content` is no tokenizer.json."""
    if content.lstrip()[:1] != b"{":
        return None
    try:
        document = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and isinstance(document.get("model"), dict) else None


def read_tokenizer_json(content: bytes, document: dict[str, Any], path: Path) -> TokenizerJson:
    """document: what parse_tokenizer_json made of `content`. Raises DataError for a damaged file, or a kind that cannot keep text apart from control tokens; MachineError
    without tokenizers."""
    try:
        import tokenizers
    except ImportError:
        raise MachineError(f"{path} is a tokenizer.json, which needs the package tokenizers; {INSTALL}") from None
    kind = document["model"].get("type") or ("BPE" if "merges" in document["model"] else "unknown")
    if kind != "BPE":
        remedy = "use the SentencePiece model it was made from" if kind == "Unigram" else "use a BPE one"
        raise DataError(f"{path} is a tokenizer.json of type {kind}, in which text can spell control tokens; {remedy}")
    # Read by the library at each call: parallelism is the offline stage's, by processes. A user's own setting wins.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with library_faults(path, "is a damaged tokenizer.json"):
        # A number beyond its type, a list for a table: the library knows its own format, so it reads first.
        whole = tokenizers.Tokenizer.from_str(content.decode())
        ids = whole.get_vocab(with_added_tokens=True)
        document = _without_dropout(document, path)
        _check_spelling(without_special_tokens(document), path, set(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        _check_ids(document, ids, path)
        return TokenizerJson(document, ids, path)


@contextmanager
def library_faults(path: Path, what: str) -> Iterator[None]:
    """Turn what the library raises into a DataError: plain Exception, or a panic of Rust, which is a BaseException."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, LuminaError) or not (is_panic or isinstance(error, Exception)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} {what}: {reason}; take it from its source again, or use another") from None


class TokenizerJson:
    """See tokenizer.Model."""

    file_name = "tokenizer.json"
    loses_nothing = False  # normalizers, pre-tokenizers and decoders may do anything

    def __init__(self, document: dict[str, Any], ids: dict[str, int], path: Path) -> None:
        self._document = document
        self._path = path
        self._names = {number: name for name, number in ids.items()}
        self.num_ids: int = max(ids.values()) + 1
        specials = special_names(document)
        self.special_tokens = {name: ids[name] for name in specials}
        added = [token["content"] for token in document.get("added_tokens") or [] if token["content"]]
        self.added_tokens = {name: ids[name] for name in added if name not in self.special_tokens}
        self._special_ids = np.array(sorted(self.special_tokens.values()), np.uint32)
        unknown = document["model"].get("unk_token")
        # A special one is reached by no text: all characters can be spelled.
        self.unknown_id: int | None = None if unknown in self.special_tokens else ids.get(unknown)
        self._plain = _library(without_special_tokens(document))
        self._plain.encode_special_tokens = True
        self._check_copy(ids)
        self.bos_id = self._leading_id()
        self._has_space_symbol = _reads_space_symbol_as_space(self._plain)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        with library_faults(self._path, "cannot encode a text"):
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = flatten(self.encode(texts))
        if np.isin(ids, self._special_ids).any():
            # No text can: the copy has no way to them. A file that finds one is not trusted with anything.
            raise DataError(f"{self._path} makes a special token of ordinary text; use another tokenizer")
        return ids, offsets

    def encode_utf8(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        return self.encode_flat(texts.split())

    def encode_template(self, text: str) -> list[int]:
        with library_faults(self._path, "cannot encode a text"):
            return self._whole().encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: Sequence[Part]) -> Spans:
        guard = GUARD
        while any(guard in text for text, _ in parts):
            guard += GUARD
        names = [name for name in self.special_tokens if name]
        text, positions = guarded_text(parts, names, lambda name: guarded_name(name, guard))
        with library_faults(self._path, "cannot encode a text"):
            encoding = self._framed(guard).encode(text, add_special_tokens=False)
        return Spans(encoding.ids, positions[np.array(encoding.offsets, np.int64).reshape(-1, 2)])

    def is_compiled(self) -> bool:
        return False

    def decode(self, ids: list[int]) -> str:
        with library_faults(self._path, "cannot decode ids"):
            return self._plain.decode(ids, skip_special_tokens=True)

    def decode_batch(self, rows: Sequence[list[int]]) -> list[str]:
        return [self.decode(ids) for ids in rows]

    def piece(self, token_id: int) -> str:
        return self._names.get(token_id) or f"<unused {token_id}>"

    def control_id(self, marker: str) -> int | None:
        return self.special_tokens.get(marker)

    def byte_id(self, byte: int) -> int | None:
        return self._plain.token_to_id(f"<0x{byte:02X}>") if self._has_space_symbol else None

    def _check_copy(self, ids: dict[str, int]) -> None:
        found = self._plain.get_vocab(with_added_tokens=True)
        for name, number in ids.items():
            called = guarded_name(name) if name in self.special_tokens else name
            if found.get(called) != number:
                raise DataError(f"{self._path} is a damaged tokenizer.json: {name!r} has no id of its own")

    @lru_cache(maxsize=2)  # noqa: B019 - a tokenizer lives as long as its process
    def _framed(self, guard: str) -> Any:
        return _library(without_special_tokens(self._document, guard))

    @lru_cache(maxsize=1)  # noqa: B019
    def _whole(self) -> Any:
        return _library({**self._document, "truncation": None, "padding": None})

    def _leading_id(self) -> int | None:
        """The id that the file's own post-processor puts before a text, if one."""
        whole = self._whole()
        bare = whole.encode("a", add_special_tokens=False).ids
        framed = whole.encode("a", add_special_tokens=True).ids
        return framed[0] if len(framed) > len(bare) and framed[1 : 1 + len(bare)] == bare else None


def _library(document: dict[str, Any]) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(document))


def _without_dropout(document: dict[str, Any], path: Path) -> dict[str, Any]:
    dropout = document["model"].get("dropout")
    if not dropout:
        return document
    log.warning("%s sets a BPE dropout of %s; it is off here, so that equal texts have equal ids", path, dropout)
    return {**document, "model": {**document["model"], "dropout": None}}


def _check_spelling(copy: dict[str, Any], path: Path, alphabet: set[str]) -> None:
    """Can every character be spelled? copy: the document without special tokens."""
    model = copy["model"]
    vocabulary = model["vocab"].keys()
    has_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    is_byte_level = mentions(copy.get("pre_tokenizer"), "ByteLevel") and _spellings(model, alphabet) <= vocabulary
    if not has_bytes and not is_byte_level:
        raise DataError(
            f"{path} would lose characters that its vocabulary lacks: it is neither byte-level nor has it byte "
            "fallback; use another tokenizer"
        )
    if model.get("ignore_merges") and not is_byte_level:
        raise DataError(
            f"{path} looks up whole words (ignore_merges) but is not byte-level, so text can spell control tokens; "
            "use another tokenizer"
        )


def _spellings(model: dict[str, Any], alphabet: set[str]) -> set[str]:
    """How a BPE model looks up single characters, by their place in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    affixes = {("", ""), (prefix, ""), ("", suffix), (prefix, suffix)}
    return {before + character + after for character in alphabet for before, after in affixes}


def mentions(component: Any, kind: str) -> bool:
    """Is there a pre-tokenizer, normalizer or decoder of that type in `component`, alone or in a sequence?"""
    if isinstance(component, list):
        return any(mentions(part, kind) for part in component)
    if not isinstance(component, dict):
        return False
    return component.get("type") == kind or any(mentions(part, kind) for part in component.values())


def _check_ids(document: dict[str, Any], ids: dict[str, int], path: Path) -> None:
    """Refuse ids out of range or given twice. Where the file names another id than the library reads, say so."""
    if not ids:
        raise DataError(f"{path} is a tokenizer.json without any token; use another tokenizer")
    name, highest = max(ids.items(), key=lambda item: item[1])
    if highest > MAX_ID:
        raise DataError(f"{path} gives {name[:40]!r} the id {highest}, beyond {MAX_ID}; use another tokenizer")
    counts = Counter(ids.values())
    twice, count = counts.most_common(1)[0]
    if count > 1:
        names = ", ".join(sorted(repr(name[:40]) for name, number in ids.items() if number == twice)[:3])
        raise DataError(f"{path} gives the id {twice} to several tokens ({names}); use another tokenizer")
    added = document.get("added_tokens") or []
    kinds: dict[str, bool] = {}
    for token in added:
        if kinds.setdefault(token["content"], bool(token.get("special"))) != bool(token.get("special")):
            raise DataError(
                f"{path} has {token['content'][:40]!r} both as special and as ordinary; use another tokenizer"
            )
    moved = [
        (token["content"], token["id"]) for token in added if ids.get(token["content"], token["id"]) != token["id"]
    ]
    if moved:
        name, number = moved[0]
        log.warning(
            "%s names id %d for %r, but the tokenizers library reads it as %d (%d such tokens); the library's ids are used",
            path, number, name, ids[name], len(moved),
        )  # fmt: skip


def _reads_space_symbol_as_space(plain: Any) -> bool:
    encodings = [plain.encode(text, add_special_tokens=False).ids for text in ("a\u2581b", "a b")]
    return encodings[0] == encodings[1]
