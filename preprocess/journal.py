"""The journal of an unfinished run: one line per sealed block, so that a killed run goes on where it stood.

    OUT.partial/journal      header, then one record per block
    OUT.partial/*.lengths    length and first trained token of every document, for packing
    OUT.partial/result/      shards and rejected.jsonl, as far as they are written

A record says which block of the input it stands for, digest included, and how far each output file reached after
it. It is written only after that output is on the disk. A later run reads the input again, which is cheap beside
tokenizing, passes over the blocks that the journal holds as they are, cuts every output file off there, and goes
on. A changed input just ends the run of equal blocks earlier; other settings make the journal void.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lumina_ds.data.shards.manifest import ShardEntry
from lumina_ds.data.shards.text_loss import TextLoss
from lumina_ds.data.shards.writer import FilePosition, OpenShard
from preprocess.sources import Block, Place

log = logging.getLogger("lumina_ds.preprocess")

# Output is synced to the disk, and its blocks sealed, about so often: a sync takes tens of milliseconds.
SEAL_EVERY_SECONDS = 1.0


class SplitPosition(BaseModel):
    """How far the files of one split reach. new_shards: those sealed since the block before."""

    new_shards: list[ShardEntry]
    open_shard: OpenShard | None
    lengths: FilePosition | None
    num_conversations: int
    num_tokens: int
    num_trained_tokens: int


class QuarantinePosition(BaseModel):
    file: FilePosition
    by_rule: dict[str, int]
    first_by_rule: dict[str, str]


class SealedBlock(BaseModel):
    """The state of all outputs after one block."""

    place: Place
    train: SplitPosition
    held_out: SplitPosition
    quarantine: QuarantinePosition
    other_keys: dict[str, int] = {}  # of all blocks so far
    notes: dict[str, int] = {}  # likewise
    text_loss: TextLoss | None = None  # of all blocks so far


class Journal:
    """Seals blocks: `sync_output` brings everything written so far to the disk before the records go there."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self._header = header
        self._waiting: list[bytes] = []
        self._last_seal = time.monotonic()

    def read(self) -> list[SealedBlock]:
        """Blocks sealed by an earlier run with the same header; the reading ends at the first damaged line."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        records = list(_intact(lines))
        if not records:
            return []
        found = json.loads(records[0])
        difference = [name for name, value in self._header.items() if found.get(name) != value]
        if difference:
            log.warning(
                "%s is an unfinished run with another %s; starting from the beginning",
                self._path.parent,
                difference[0].replace("_", " "),
            )
            return []
        return [SealedBlock.model_validate_json(record) for record in records[1:]]

    def start(self, sealed: list[SealedBlock]) -> None:
        """Begin to write, with `sealed` as the first blocks."""
        temporary = self._path.with_name(f"{self._path.name}.new")
        with temporary.open("wb") as file:
            file.write(_line(json.dumps(self._header, sort_keys=True)))
            file.writelines(_line(block.model_dump_json()) for block in sealed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file = self._path.open("ab")

    def add(self, block: SealedBlock, sync_output: Callable[[], None]) -> None:
        """Take a block in; it is sealed, with all that wait, once SEAL_EVERY_SECONDS have passed."""
        self._waiting.append(_line(block.model_dump_json()))
        if time.monotonic() - self._last_seal >= SEAL_EVERY_SECONDS:
            self.seal(sync_output)

    def seal(self, sync_output: Callable[[], None]) -> None:
        """Sync the output, then the records of the blocks in it."""
        if self._waiting:
            sync_output()
            self._file.write(b"".join(self._waiting))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._waiting = []
        self._last_seal = time.monotonic()

    def close(self) -> None:
        self._file.close()


def pass_over_sealed(blocks: Iterator[Block], sealed: list[SealedBlock]) -> tuple[int, Iterator[Block]]:
    """(how many of `sealed` the input still begins with, the blocks after them)."""
    for number, record in enumerate(sealed):
        block = next(blocks, None)
        if block is None:
            return number, iter(())
        if block.place != record.place:
            return number, chain([block], blocks)
    return len(sealed), blocks


def _line(text: str) -> bytes:
    return f"{_short_digest(text.encode())} {text}\n".encode()


def _intact(lines: list[bytes]) -> Iterator[bytes]:
    """Records of the lines up to the first damaged one, such as a crash of the machine leaves at the end."""
    for line in lines:
        digest, _, text = line.partition(b" ")
        if digest != _short_digest(text).encode():
            return
        yield text


def _short_digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
