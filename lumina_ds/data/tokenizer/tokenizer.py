"""A tokenizer file behind the few things the flow needs: ids of text, ids of the markers, and text of ids.

The file is a SentencePiece model or a Hugging Face tokenizer.json; its content tells which. Text can never become
a control token: the markers are control symbols that the model does not produce from text, or ids appended after
its vocabulary. A literal U+2581, which SentencePiece itself reads as the space, is kept apart through its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from lumina_ds.config.chat_templates import END_MARKER, ROLE_MARKERS
from lumina_ds.data.tokenizer.byte_runs import ByteRuns
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.data.tokenizer.model_folder import FolderTemplate, read_chat_template, read_token_names
from lumina_ds.data.tokenizer.sentencepiece_file import SPACE_SYMBOL
from lumina_ds.data.tokenizer.spans import Part, Spans
from lumina_ds.data.tokenizer.tokenizer_json import parse_tokenizer_json, read_tokenizer_json
from lumina_ds.data.tokenizer.trial import try_elsewhere
from lumina_ds.errors import ConfigError, DataError

ROLES = tuple(ROLE_MARKERS)  # where roles are numbers, these are their meanings
MARKERS = (*ROLE_MARKERS.values(), END_MARKER)

# What a copied tokenizer is called, by kind.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


class Model(Protocol):
    """What a kind of tokenizer file has to offer; tokenizer_sentencepiece.py and tokenizer_json.py have one each."""

    file_name: str  # one of TOKENIZER_FILES
    num_ids: int
    bos_id: int | None
    unknown_id: int | None  # what stands for a character that the model lacks; None where it lacks none
    special_tokens: dict[str, int]  # by name: no text becomes one
    added_tokens: dict[str, int]  # not special, found in text by their name

    @property
    def loses_nothing(self) -> bool:
        """Is it proven that every text comes back?"""

    def encode_template(self, text: str) -> list[int]: ...

    def encode_parts(self, parts: Sequence[Part]) -> Spans: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...

    def encode_utf8(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]: ...

    def is_compiled(self) -> bool: ...

    def decode(self, ids: list[int]) -> str: ...

    def decode_batch(self, rows: Sequence[list[int]]) -> list[str]:
        """decode() of each row; all are ids of the model's own."""

    def piece(self, token_id: int) -> str: ...

    def control_id(self, marker: str) -> int | None:
        """The id of a control symbol of that name, which no text produces."""

    def byte_id(self, byte: int) -> int | None:
        """The id that spells one byte of an unknown character; None in a model that reads U+2581 as itself."""


class Tokenizer:
    """A tokenizer's model plus the chat template's markers. Build it with load().

    vocab_size: ids in use, appended markers included. bos_id: None where the model has none.
    role_ids: marker id of "system", "user" and "assistant". end_id: end of turn.
    digest: SHA-256 of the file.
    """

    def __init__(self, model: Model, path: Path, digest: str, with_markers: bool = True) -> None:
        self._model = model
        self.path = path
        self.digest = digest
        self.bos_id = model.bos_id
        markers, self.vocab_size = _place_markers(model) if with_markers else ({}, model.num_ids)
        self.role_ids: dict[str, int] = {role: markers[name] for role, name in ROLE_MARKERS.items() if name in markers}
        self.end_id: int = markers.get(END_MARKER, -1)
        self._marker_ids = markers
        self._named_ids = {**model.added_tokens, **model.special_tokens, **markers}
        self._byte_runs = ByteRuns(model)

    @classmethod
    def load(cls, path: str | Path, is_tried: bool = False) -> Tokenizer:
        """Load a SentencePiece model or a tokenizer.json, whatever its name, or the one in a model's folder.

        is_tried: the file passed trial.py in this run already, so no process is started to try it.
        Raises DataError when the file is missing, damaged or something else, MachineError when a tokenizer.json needs the
        package tokenizers and it is not installed.
        """
        path = Path(path)
        if path.is_dir():
            return _load_from_folder(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path}: {error.strerror}; give a tokenizer.model or tokenizer.json, or its folder"
            ) from error
        digest = hashlib.sha256(content).hexdigest()
        return cls(_read_model(content, path, None if is_tried else digest), path, digest)

    @property
    def file_name(self) -> str:
        """The usual name of this kind of file: tokenizer.model or tokenizer.json."""
        return self._model.file_name

    def ids_of(self, markers: Sequence[str]) -> list[int]:
        """Ids of special tokens by name: MARKERS, and the file's own."""
        return [self._named_ids[marker] for marker in markers]

    @property
    def num_own_ids(self) -> int:
        """Ids of the file itself, without markers that had to be appended."""
        return self._model.num_ids

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what the model cannot spell, or None."""
        return self._model.unknown_id

    @property
    def loses_nothing(self) -> bool:
        """Is it proven that every text comes back, decode(encode(text)) == text?"""
        return self._model.loses_nothing

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the file's own special tokens (control pieces) by name: no text becomes one, whatever it spells."""
        return self._model.special_tokens

    @property
    def added_tokens(self) -> dict[str, int]:
        """Ids of added tokens that are not special (user-defined pieces) by name: text that spells one becomes it."""
        return self._model.added_tokens

    @cached_property
    def chat_template(self) -> FolderTemplate | None:
        """The Jinja template that lies beside the file, or None. Raises DataError where it cannot be read."""
        return read_chat_template(self.path.parent)

    @cached_property
    def token_names(self) -> dict[str, str]:
        """bos_token, eos_token, ... to special tokens, as the files beside say. Raises DataError as chat_template."""
        return read_token_names(self.path.parent)

    def without_markers(self) -> Tokenizer:
        """The same tokenizer for a chat template of its own: only its own ids, none of MARKERS appended.

        Its role_ids are empty and end_id is -1; ids_of() takes names of special_tokens and added_tokens.
        """
        return Tokenizer(self._model, self.path, self.digest, with_markers=False)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of one text, in which no name is a special token."""
        return self.encode_batch([text])[0]

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered chat as the library reads it: every special token's name in `text` is that token.

        Only for text that is trusted as a whole; encode_parts() keeps what users wrote apart.
        """
        return self._model.encode_template(text)

    def encode_parts(self, parts: Sequence[Part]) -> Spans:
        """Ids of a rendered chat given as (text, written by the template) parts, and each token's place in all of it.

        The ids are those of encode_template() of the joined text wherever no content spells a special token; a
        special token's name in a content stays text.
        """
        return self._model.encode_parts(parts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, exactly the library's own, without markers and without stripping."""
        ids, offsets = self.encode_flat(texts)
        as_list, bounds = ids.tolist(), offsets.tolist()
        return [as_list[begin:end] for begin, end in pairwise(bounds)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As encode_batch, without a Python object per token: (ids of all texts, where each text's begin).

        The arrays are uint32 [tokens] and int64 [texts + 1]; text i has ids[offsets[i]:offsets[i + 1]].
        """
        with_symbol = [index for index, text in enumerate(texts) if SPACE_SYMBOL in text]
        if not with_symbol:
            return self._model.encode_flat(texts)
        plain = list(texts)
        for index in with_symbol:
            plain[index] = ""
        ids, offsets = self._model.encode_flat(plain)
        runs = [ids[begin:end] for begin, end in pairwise(offsets)]
        for index in with_symbol:
            runs[index] = np.array(self._byte_runs.encode(texts[index]), np.uint32)
        return np.concatenate(runs), np.concatenate([[0], np.cumsum([len(run) for run in runs])])

    def encode_utf8(self, texts: Texts, has_space_symbol: bool) -> tuple[np.ndarray, np.ndarray]:
        """As encode_flat, of texts that are UTF-8 already; `has_space_symbol`: one of them holds a literal U+2581."""
        return self.encode_flat(texts.split()) if has_space_symbol else self._model.encode_utf8(texts)

    def is_compiled(self) -> bool:
        """Is the work of encode_utf8 compiled code that other threads can run beside? Gets it ready."""
        return self._model.is_compiled()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; markers, BOS and ids beyond the model's own are skipped."""
        return self._model.decode([i for i in map(int, ids) if 0 <= i < self._model.num_ids])

    def round_trip(self, texts: Sequence[str]) -> list[str]:
        """decode(encode_plain(text)) of each text."""
        return self._model.decode_batch(self.encode_batch(texts))

    def piece(self, token_id: int) -> str:
        """How one id reads in a listing: its piece, or the marker's name, or `<unused N>`."""
        for marker, marker_id in self._marker_ids.items():
            if token_id == marker_id:
                return marker
        return self._model.piece(token_id) if 0 <= token_id < self._model.num_ids else f"<unused {token_id}>"


def tokenizer_in(folder: Path) -> Path:
    """The tokenizer of a shard, step or imported folder, whether or not it is there.

    Where both kinds lie, tokenizer.model counts; folders of earlier versions call a tokenizer.json so too.
    """
    model, document = (folder / name for name in TOKENIZER_FILES)
    return document if document.is_file() and not model.exists() else model


def _load_from_folder(folder: Path) -> Tokenizer:
    """The folder's SentencePiece model, or its tokenizer.json where that has tokens of its own."""
    model, fast = (folder / name for name in TOKENIZER_FILES)
    if not model.is_file():
        if not fast.is_file():
            raise DataError(f"{folder} holds neither tokenizer.model nor tokenizer.json; name a tokenizer's file")
        return Tokenizer.load(fast)
    tokenizer = Tokenizer.load(model)
    document = parse_tokenizer_json(fast.read_bytes()) if fast.is_file() else None
    # Chat models often add tokens to a SentencePiece vocabulary; our markers must not take their ids.
    others = [token for token in (document or {}).get("added_tokens") or [] if token.get("content") not in MARKERS]
    has_own = any(token.get("id", 0) >= tokenizer.num_own_ids for token in others)
    return Tokenizer.load(fast) if has_own else tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError when the model's embedding has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.vocab_size {vocab_size}; "
            f"set --model.vocab_size {tokenizer.vocab_size}"
        )


def _read_model(content: bytes, path: Path, untried: str | None) -> Model:
    """untried: the digest of a file that is to be tried first."""
    from lumina_ds.data.tokenizer.sentencepiece import read_sentencepiece

    document = parse_tokenizer_json(content)
    if document and untried:
        try_elsewhere(path, untried, len(content))
    model = read_tokenizer_json(content, document, path) if document else read_sentencepiece(content, path)
    if model is None:
        raise DataError(
            f"{path} is not a SentencePiece model nor a tokenizer.json; `lumina tokenizer train` makes a model"
        )
    return model


def _place_markers(model: Model) -> tuple[dict[str, int], int]:
    """Id of every marker, and the vocabulary's size with the markers that had to be appended.

    A marker counts as the model's own only as a control symbol: a user-defined or ordinary piece of that
    name is produced by text that spells it.
    """
    next_id = model.num_ids
    ids: dict[str, int] = {}
    for marker in MARKERS:
        own_id = model.control_id(marker)
        if own_id is None:
            ids[marker] = next_id
            next_id += 1
        else:
            ids[marker] = own_id
    return ids, next_id
