"""tokenizer.json with the chat template's markers, from a SentencePiece model or from another tokenizer.json.

A SentencePiece BPE model becomes a list of merges by falling score, a unigram one keeps its scores. What
that cannot express is found by export/tokenizer.py, which compares ids.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from lumina_ds.data.tokenizer.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_SYMBOL,
    UNKNOWN,
    USER_DEFINED,
    ModelFile,
    read_model_file,
)
from lumina_ds.data.tokenizer.tokenizer import MARKERS, Tokenizer
from lumina_ds.data.tokenizer.tokenizer_json import parse_tokenizer_json
from lumina_ds.errors import DataError
from lumina_ds.export.chat_template import GUARD

# Below every sum of real scores: text that spells a byte or control piece must not be cut into it.
UNREACHABLE_SCORE = -1000.0


def fast_tokenizer_document(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Raises DataError for a model that it cannot express."""
    content = tokenizer.path.read_bytes()
    document = parse_tokenizer_json(content)
    if document is None:
        document = _from_sentencepiece(read_model_file(content), str(tokenizer.path))
    else:
        document = _guarded({**document, "added_tokens": document.get("added_tokens") or []})
    present = {token["content"] for token in document["added_tokens"]}
    ids = marker_ids(tokenizer)
    document["added_tokens"] += [_added(marker, ids[marker]) for marker in ids if marker not in present]
    document["added_tokens"].sort(key=lambda token: token["id"])
    if tokenizer.bos_id is not None:
        document["post_processor"] = _leading(tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id)
    else:
        document["post_processor"] = None
    return {**document, "truncation": None, "padding": None}


def marker_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Id of every marker of the chat template; none for a tokenizer without markers."""
    if not tokenizer.role_ids:
        return {}
    return dict(zip(MARKERS, (*tokenizer.role_ids.values(), tokenizer.end_id), strict=True))


def _guarded(document: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json in which only a whole special token in the raw text is that token."""
    added = [{**token, "normalized": False} if token["special"] else token for token in document["added_tokens"]]
    names = {token["content"] for token in added if token["special"]}
    model = {**document["model"], "dropout": None}
    if model.get("merges"):
        # A merge into a special token would reach it from text that the guard has split.
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not names & {*pair, "".join(pair)}]
    own = document.get("normalizer")
    steps = [own] if own and own.get("type") != "Sequence" else (own or {}).get("normalizers", [])
    steps = [step for step in steps if step != _drop_guard()]
    normalizer = {"type": "Sequence", "normalizers": [_drop_guard(), *steps]}
    return {**document, "model": model, "added_tokens": added, "normalizer": normalizer}


def _from_sentencepiece(model: ModelFile, path: str) -> dict[str, Any]:
    texts = [piece.text.decode() for piece in model.pieces]
    if len(set(texts)) != len(texts):
        raise DataError(f"{path} has two pieces of one name, which tokenizer.json cannot hold; use another tokenizer")
    if model.has_space_suffix or not model.normalizer.get(5, 1):
        raise DataError(f"{path} marks spaces in a way that tokenizer.json cannot express; use another tokenizer")
    kinds = {i: piece.kind for i, piece in enumerate(model.pieces)}
    added = [
        _added(texts[i], i, special=kind != USER_DEFINED)
        for i, kind in kinds.items()
        # A user-defined piece with a plain space is never found: the text has U+2581 there.
        if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and " " not in texts[i])
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(model))},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": list(_decoders(model))},
        "model": _bpe(model, texts) if model.is_bpe else _unigram(model, texts),
    }


def _bpe(model: ModelFile, texts: list[str]) -> dict[str, Any]:
    ordinary = {text: i for i, text in enumerate(texts) if model.pieces[i].kind == NORMAL}
    merges = []
    for text, i in ordinary.items():
        for middle in range(1, len(text)):
            left, right = text[:middle], text[middle:]
            if left in ordinary and right in ordinary:
                # Splits of one piece have one score; SentencePiece then takes the leftmost in the text.
                merges.append((-model.pieces[i].score, i, -middle, [left, right]))
    merges.sort(key=lambda merge: merge[:3])
    return {
        "type": "BPE",
        "unk_token": _unknown(model, texts),
        "fuse_unk": True,
        "byte_fallback": model.has_byte_fallback,
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": [merge[3] for merge in merges],
    }


def _unigram(model: ModelFile, texts: list[str]) -> dict[str, Any]:
    unknown = _unknown(model, texts)
    scores = [piece.score if piece.kind in (NORMAL, USER_DEFINED) else UNREACHABLE_SCORE for piece in model.pieces]
    return {
        "type": "Unigram",
        "unk_id": None if unknown is None else texts.index(unknown),
        "vocab": [list(pair) for pair in zip(texts, scores, strict=True)],
        "byte_fallback": model.has_byte_fallback and any(piece.kind == BYTE for piece in model.pieces),
    }


def _unknown(model: ModelFile, texts: list[str]) -> str | None:
    return next((texts[i] for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)


def _normalizers(model: ModelFile) -> Iterator[dict[str, Any]]:
    yield _drop_guard()
    if charsmap := model.normalizer.get(2):
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    if model.normalizer.get(4, 1):  # remove_extra_whitespaces
        yield {"type": "Strip", "strip_left": True, "strip_right": True}
        yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    if model.adds_dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE_SYMBOL}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}


def _decoders(model: ModelFile) -> Iterator[dict[str, Any]]:
    yield {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}
    if model.has_byte_fallback:
        yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if model.adds_dummy_prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _drop_guard() -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}


def _added(content: str, token_id: int, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": content, **flags}


def _leading(name: str, token_id: int) -> dict[str, Any]:
    """Puts BOS before a text that is encoded by itself; the chat template has its own."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }


def as_text(document: dict[str, Any]) -> str:
    """The document as it is written."""
    return json.dumps(document, ensure_ascii=False, indent=1)
