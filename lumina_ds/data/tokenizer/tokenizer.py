"""A tokenizer file behind the few things the flow needs: ids of text, ids of the markers, and text of ids.

The file is a SentencePiece model or a Hugging Face tokenizer.json; its content tells which. Text can never become
a control token: the markers are control symbols that the model does not produce from text, or ids appended after
its vocabulary. A literal U+2581, which SentencePiece itself reads as the space, is kept apart through its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from lumina_ds.config.chat_templates import END_MARKER, ROLE_MARKERS
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.errors import ConfigError, DataError

ROLES = tuple(ROLE_MARKERS)  # where roles are numbers, these are their meanings
MARKERS = (*ROLE_MARKERS.values(), END_MARKER)

_SPACE_SYMBOL = "\u2581"
# What a copied tokenizer is called, by kind.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


class Model(Protocol):
    """What a kind of tokenizer file has to offer; tokenizer_sentencepiece.py and tokenizer_json.py have one each."""

    file_name: str  # one of TOKENIZER_FILES
    num_ids: int
    bos_id: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...

    def encode_utf8(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]: ...

    def is_compiled(self) -> bool: ...

    def decode(self, ids: list[int]) -> str: ...

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

    def __init__(self, model: Model, path: Path, digest: str) -> None:
        self._model = model
        self.path = path
        self.digest = digest
        self.bos_id = model.bos_id
        marker_ids, self.vocab_size = _place_markers(model)
        self.role_ids: dict[str, int] = {role: marker_ids[marker] for role, marker in ROLE_MARKERS.items()}
        self.end_id: int = marker_ids[END_MARKER]
        self._marker_ids = marker_ids
        self._byte_runs = _ByteRuns(model)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a SentencePiece model or a tokenizer.json, whatever its name.

        Raises DataError when the file is missing or something else, MachineError when a tokenizer.json needs the
        package tokenizers and it is not installed.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        return cls(_read_model(content, path), path, hashlib.sha256(content).hexdigest())

    @property
    def file_name(self) -> str:
        """The usual name of this kind of file: tokenizer.model or tokenizer.json."""
        return self._model.file_name

    def ids_of(self, markers: Sequence[str]) -> list[int]:
        """Ids of special tokens, by the names of MARKERS."""
        return [self._marker_ids[marker] for marker in markers]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, exactly the library's own, without markers and without stripping."""
        ids, offsets = self.encode_flat(texts)
        as_list, bounds = ids.tolist(), offsets.tolist()
        return [as_list[begin:end] for begin, end in pairwise(bounds)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As encode_batch, without a Python object per token: (ids of all texts, where each text's begin).

        The arrays are uint32 [tokens] and int64 [texts + 1]; text i has ids[offsets[i]:offsets[i + 1]].
        """
        with_symbol = [index for index, text in enumerate(texts) if _SPACE_SYMBOL in text]
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

    def piece(self, token_id: int) -> str:
        """How one id reads in a listing: its piece, or the marker's name, or `<unused N>`."""
        for marker, marker_id in zip(MARKERS, (*self.role_ids.values(), self.end_id), strict=True):
            if token_id == marker_id:
                return marker
        return self._model.piece(token_id) if 0 <= token_id < self._model.num_ids else f"<unused {token_id}>"


def tokenizer_in(folder: Path) -> Path:
    """The tokenizer of a shard, step or imported folder, whether or not it is there.

    Where both kinds lie, tokenizer.model counts; folders of earlier versions call a tokenizer.json so too.
    """
    model, document = (folder / name for name in TOKENIZER_FILES)
    return document if document.is_file() and not model.exists() else model


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError when the model's embedding has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, more than model.vocab_size {vocab_size}; "
            f"set --model.vocab_size {tokenizer.vocab_size}"
        )


def _read_model(content: bytes, path: Path) -> Model:
    from lumina_ds.data.tokenizer.sentencepiece import read_sentencepiece
    from lumina_ds.data.tokenizer.tokenizer_json import parse_tokenizer_json, read_tokenizer_json

    document = parse_tokenizer_json(content)
    model = read_tokenizer_json(document, path) if document else read_sentencepiece(content)
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


class _ByteRuns:
    """Text with a literal U+2581, for models that read it as a space but can spell characters in bytes.

    Encodes a character that the model does not know in its place, then swaps that character's byte ids for those
    of U+2581. A model without byte pieces keeps its own reading.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def encode(self, text: str) -> list[int]:
        stand_in = self._unused_in(text)
        if stand_in is None:
            return self._model.encode([text])[0]
        (ids,) = self._model.encode([text.replace(_SPACE_SYMBOL, stand_in)])
        old, new = self._byte_ids(stand_in), self._byte_ids(_SPACE_SYMBOL)
        position = 0
        while position < len(ids):
            if ids[position : position + len(old)] == old:
                ids[position : position + len(old)] = new
                position += len(new)
            else:
                position += 1
        return ids

    def _unused_in(self, text: str) -> str | None:
        """The first private character that `text` lacks and the model spells as its bytes; None if none is."""
        if self._model.byte_id(0) is None:
            return None
        for code in range(0xE000, 0xF8FF):
            character = chr(code)
            if character not in text and self._is_spelled_in_bytes(character):
                return character
        return None

    def _is_spelled_in_bytes(self, character: str) -> bool:
        run = self._byte_ids(character)
        (ids,) = self._model.encode([f"a{character}a"])  # inside a word, where no dummy prefix stands
        return any(ids[start : start + len(run)] == run for start in range(len(ids)))

    def _byte_ids(self, character: str) -> list[int]:
        ids = [self._model.byte_id(byte) for byte in character.encode()]
        return [i for i in ids if i is not None]
