"""`manifest.json` of a shard folder: what it was made from, how, and the size and digest of every file.

It holds no path, time or worker count, so the same input and settings give the same bytes anywhere.
A digest over its own content stands inside it, so a damaged manifest is noticed like a damaged shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from lumina_ds.data.packing import Overlong, Packing
from lumina_ds.data.shards.text_loss import TextLoss
from lumina_ds.data.turn_keys import KNOWN_KEYS
from lumina_ds.data.turns import TrainReasoning, TrainTurns
from lumina_ds.errors import DataError
from lumina_ds.foreign_files import ForeignFileError, NotStrictJson, plain_name, read_bounded, shown, strict_json

MANIFEST_FILE = "manifest.json"
FORMAT = "lumina-shards"
VERSION = 1
# How lines are read: 1 passed over the flags and keys of turn_keys.py and packed pieces without a label token,
# 2 obeys or refuses them and packs no such piece, 3 refuses flags beside the turns, pictures and refusals too,
# 4 reads tools, reasoning and more formats, 5 obeys or refuses every key of KNOWN_KEYS. What 3 accepted 5 reads as 3 did:
# only folders with refused lines, or with such keys among those that were passed over, differ.
READING_WITH_LABELS = 2
READING_OF_PLAIN_CHATS = 3
READING = 5


MAX_SEQ_LENGTH = 1 << 24
_MOST_BYTES = 32 << 20  # 130,000 files

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
FileName = Annotated[str, AfterValidator(plain_name)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Settings(_Entry):
    """What the shards' bytes depend on beside the inputs, the tokenizer and the template."""

    seq_length: Annotated[int, Field(ge=2, le=MAX_SEQ_LENGTH)]
    packing: Packing = "best_fit"
    overlong: Overlong = "truncate"
    shard_size_mb: int = 256
    disable_sharding: bool = False
    max_conversations: int | None = None
    eval_fraction: float = 0.0
    train_turns: TrainTurns = "all"
    train_reasoning: TrainReasoning = "yes"
    format: str | None = None  # of every line; None where its keys tell

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(write(self), {"train_reasoning": "yes", "format": None})


class InputEntry(_Entry):
    """One input file: its name without the folder where that is unambiguous, and its content's digest."""

    name: str
    size_bytes: Count
    sha256: str


class TokenizerEntry(_Entry):
    digest: str
    vocab_size: Annotated[int, Field(ge=1, le=1 << 32)]


class TemplateEntry(_Entry):
    """certificate: digest of the proof of a model's own template; day: year-month-day that it has written, if any."""

    version: str
    digest: str
    certificate: str | None = None
    day: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_missing(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
        """Manifests of our own template stay what they were."""
        return {name: value for name, value in handler(self).items() if value is not None}


class FileEntry(_Entry):
    """A file beside the shards: the tokenizer, the packing plan, the rejected lines."""

    file: FileName
    size_bytes: Count
    sha256: Digest


class ShardEntry(FileEntry):
    rows: Count
    tokens: Count


class Totals(_Entry):
    """lines (blank ones not counted) = conversations + held_out (moved into the eval folder) + rejected."""

    lines: Count
    conversations: Count
    held_out: Count = 0
    rejected: Count = 0
    rejected_by_rule: dict[str, Count] = {}
    first_rejected: dict[str, str] = {}  # by rule: source, line and reason of its first line
    other_keys: dict[str, Count] = {}  # keys that mean nothing here: places where they stand
    notes: dict[str, Count] = {}  # what is to be said of conversations, and how often it is true
    tokens: Count
    trained_tokens: Count
    text_loss: TextLoss | None = None  # of held out conversations too; absent in an eval folder

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(write(self), {"notes": {}, "text_loss": None})


class Manifest(_Entry):
    format: str = FORMAT
    version: int = VERSION
    reading: int = 1
    split: str = "train"
    settings: Settings
    tokenizer: TokenizerEntry
    template: TemplateEntry
    inputs: list[InputEntry]
    totals: Totals
    shards: list[ShardEntry]
    files: list[FileEntry]


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest. Raises DataError when it is missing, damaged or of another version."""
    return read_with_digest(folder)[0]


def read_with_digest(folder: Path) -> tuple[Manifest, str]:
    """As read_manifest, with the SHA-256 of the file that was read."""
    path = folder / MANIFEST_FILE
    try:
        content = read_bounded(path, _MOST_BYTES, follow_links=False)
        document = strict_json(content)
    except FileNotFoundError:
        what = "has no manifest.json, so it is no finished shard folder" if folder.is_dir() else "does not exist"
        raise DataError(f"{folder} {what}; `lumina preprocess` makes one") from None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file, not a shard folder; `lumina preprocess` makes one") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except NotStrictJson as error:
        raise DataError(f"{path} is damaged: {error}; preprocess again") from None
    except ForeignFileError as error:
        raise DataError(f"{path} {error}; preprocess again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path} is no manifest of a shard folder")
    if document.get("version") != VERSION:
        raise DataError(f"{path} has format version {shown(document.get('version'))}, not {VERSION}; preprocess again")
    digest = document.pop("digest", None)
    if digest != _digest(document) or not content.endswith(b"\n"):  # the digest is of the values, not of the text
        raise DataError(f"{path} is damaged: its content does not match its digest; preprocess again")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        where = shown(".".join(map(str, fault["loc"])))
        raise DataError(f"{path} is no valid manifest: {where}: {shown(fault['msg'])}; preprocess again") from None
    if contradiction := _contradiction(manifest):
        raise DataError(f"{path} is no valid manifest: {contradiction}; preprocess again")
    return manifest, hashlib.sha256(content).hexdigest()


def _contradiction(manifest: Manifest) -> str | None:
    names = [entry.file for entry in (*manifest.shards, *manifest.files)]
    if len(set(names)) < len(names):
        return "a file is named twice"
    rows, tokens = sum(entry.rows for entry in manifest.shards), sum(entry.tokens for entry in manifest.shards)
    if (rows, tokens) != (manifest.totals.conversations, manifest.totals.tokens):
        return "the totals are not those of the shards"
    if not rows:
        return "it holds no conversation"
    return None


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest; done last, it is what makes a folder a finished one."""
    document = manifest.model_dump()
    text = json.dumps(document | {"digest": _digest(document)}, indent=2, ensure_ascii=False) + "\n"
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def describe_difference(old: Manifest, new: Manifest) -> str | None:
    """The first thing that `old` was made with and `new` would not be; None when both have the same source."""
    if old.tokenizer != new.tokenizer:
        return f"tokenizer {old.tokenizer.digest[:12]}, not {new.tokenizer.digest[:12]}"
    if old.template.digest != new.template.digest:
        return f"chat template {old.template.version}, not {new.template.version}"
    if old.template.certificate != new.template.certificate:
        return f"chat template {old.template.version} with another certificate"
    if old.reading != reading_of(old.totals):
        return "made before all keys and formats were read that are read now"
    for name in Settings.model_fields:
        value, wanted = getattr(old.settings, name), getattr(new.settings, name)
        if value != wanted:
            return f"{name} {value}, not {wanted}"
    if old.inputs != new.inputs:
        return "other input files, or other contents of them"
    return None


def reading_of(totals: Totals) -> int:
    """How lines are read now, as a folder with such totals says it."""
    is_plain = not totals.rejected and not totals.other_keys.keys() & KNOWN_KEYS.keys()
    return READING_OF_PLAIN_CHATS if is_plain else READING


def _without_defaults(document: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Without entries that no feature in use needs, so that folders of plain chats stay what they were."""
    return {name: value for name, value in document.items() if name not in defaults or value != defaults[name]}


def _digest(document: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
