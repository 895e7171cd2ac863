"""Inputs of the offline stage: paths, globs, saved datasets and standard input, read in fixed blocks of lines.

A block holds the lines that end within one stretch of BLOCK_BYTES of the (decompressed) input, so its
boundaries depend on the input alone: never on the number of workers, which is what makes the output the
same bytes for any of them. Memory stays bounded whatever is read: a line above MAX_LINE_BYTES is passed
over without being held, and decompression runs piece by piece. So does time: a compressed input that
expands beyond all reason is read no further.

Every block knows the digest of its input up to where it was cut off: two runs that agree on it agree on the
block and on all blocks before it, which is how an interrupted run finds the place to go on from.
"""

from __future__ import annotations

import glob
import logging
import lzma
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from lumina_ds.data.shards.manifest import InputEntry
from lumina_ds.data.strict_json import LINE_TOO_LONG, MAX_LINE_BYTES
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest, path_of_text, shown_path
from preprocess.containers.compression import MAX_EXPANSION, read_fully
from preprocess.containers.counting import CountingStream, open_in_turn
from preprocess.containers.lines import LineStream, open_lines
from preprocess.containers.rows import RowStream
from preprocess.containers.saved_dataset import dataset_files

log = logging.getLogger("lumina_ds.preprocess")

STDIN = "-"
BLOCK_BYTES = 4 << 20
COMPRESSION_BOMB = "compression bomb"
_LIKELY_ENDINGS = (".jsonl", ".parquet", ".arrow", ".json", ".csv", ".tsv", ".gz", ".zst", ".xz", ".bz2")


class UnreadableInput(DataError):
    """An input that breaks off or is damaged on the way: once it is mended, a run can go on with it."""


class Place(NamedTuple):
    """Where a block begins, and the SHA-256 of everything read of its input when it was cut off."""

    source: str
    line: int
    byte_offset: int
    input_digest: str


@dataclass(frozen=True)
class Block:
    """Whole lines of one input. `is_oversized`: a single line too long to be held; `data` is empty then.

    `is_bomb`: such a "line" that stands for the rest of a compressed input, which is not read.
    """

    source: str
    first_line: int  # 1-based
    byte_offset: int  # of `data` in the decompressed input
    data: bytes
    is_oversized: bool = False
    is_bomb: bool = False
    input_digest: str = field(default="", compare=False)

    @property
    def place(self) -> Place:
        return Place(self.source, self.first_line, self.byte_offset, self.input_digest)

    @property
    def is_blank(self) -> bool:
        """No line to look at, only line ends and spaces: millions of them, maybe, in a compression bomb."""
        return not self.data.strip(b" \t\r\n")

    @property
    def fault(self) -> tuple[str, str] | None:
        """(rule, reason) why the block as a whole is refused."""
        if self.is_bomb:
            reason = f"expands more than {MAX_EXPANSION}-fold; the rest of the file is not read, decompress it first"
            return COMPRESSION_BOMB, reason
        return (LINE_TOO_LONG, f"longer than {MAX_LINE_BYTES} bytes") if self.is_oversized else None


class InputFile:
    """One input: opened once by blocks(), its digest known before (a file) or after (standard input).

    blocks() hashes what it reads, so that the digest is that of the bytes which went into the output. A saved dataset
    is read as its files one after the other.
    """

    def __init__(self, name: str, path: Path | None, parts: Sequence[Path] | None = None) -> None:
        """path: of the file or the dataset's folder, None for standard input; parts: the files that are read."""
        self.name = name
        self.path = path
        self._parts = parts if parts is not None or path is None else [path]
        self._raw: CountingStream | None = None

    @property
    def shown(self) -> str:
        """The path as text, for messages."""
        return shown_path(self.path) if self.path else "standard input"

    @property
    def identity(self) -> tuple[int, int] | None:
        """The same for all names of a file, links too; None for standard input."""
        if self.path is None:
            return None
        status = self.path.stat()
        return status.st_dev, status.st_ino

    @property
    def size_bytes(self) -> int | None:
        return None if self._parts is None else sum(part.stat().st_size for part in self._parts)

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far, before decompression."""
        return self._raw.num_bytes if self._raw else 0

    def entry(self) -> InputEntry:
        """Name, size and SHA-256; for standard input, of what blocks() has read."""
        if self._parts is None or (self._raw is not None and self._raw.at_end):
            assert self._raw is not None
            return InputEntry(name=self.name, size_bytes=self._raw.num_bytes, sha256=self._raw.digest.hexdigest())
        try:
            return InputEntry(name=self.name, size_bytes=self.size_bytes or 0, sha256=file_digest(*self._parts))
        except OSError as error:
            raise DataError(f"cannot read {self.shown}: {error.strerror}") from error

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Read the input. Raises UnreadableInput when it cannot be read or its compression is damaged."""
        try:
            with nullcontext(sys.stdin.buffer) if self._parts is None else open_in_turn(self._parts) as file:
                self._raw = CountingStream(file)
                for block in read_blocks(open_lines(self._raw, self.shown, self.name), self.name, block_bytes):
                    yield replace(block, input_digest=self._raw.digest.copy().hexdigest())
                self._raw.check_unchanged()
        except (OSError, EOFError, lzma.LZMAError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise UnreadableInput(f"cannot read {self.shown}: {reason or error}") from error


def resolve_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Files of paths, globs, saved datasets and `-` (standard input), in the order given, globs sorted. Raises DataError.

    A path may be written as shown_path() writes it. A file that is named twice, by whatever names, is read once.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        found += [InputFile(STDIN, None)] if pattern == STDIN else _inputs_of(pattern)
    if sum(file.path is None for file in found) > 1:
        raise DataError("standard input (-) is named twice; it can be read only once")
    files = _each_once(found)
    paths = [file.path for file in files if file.path is not None]
    names = dict(zip(paths, _short_names(paths), strict=True))
    for file in files:
        file.name = STDIN if file.path is None else names[file.path]
    return files


def _inputs_of(pattern: str) -> list[InputFile]:
    """The inputs that a path or a glob names, each called by its path so far."""
    if not os.path.lexists(pattern):
        pattern = path_of_text(pattern)
    path = Path(pattern)
    if path.is_file():
        return [InputFile("", path)]
    if path.is_dir():
        return [_saved_dataset(path)]
    if path.exists():  # a pipe, such as <(...): it could not be read again for its digest
        shown = shown_path(path)
        raise DataError(f"{shown} is no ordinary file; write `- < {shown}` to read it as standard input")
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    inputs = [InputFile("", match) for match in matches if match.is_file()]
    # A folder among them is taken where it is a dataset; others are passed over, as `**` meets many.
    inputs += (
        [_saved_dataset(match) for match in matches if match.is_dir() and dataset_files(match)] if not inputs else []
    )
    if not inputs:
        raise DataError(f"no such file: {shown_path(pattern)}")
    return inputs


def _saved_dataset(path: Path) -> InputFile:
    found = dataset_files(path)
    if found is None:
        endings = {each.suffix for each in sorted(path.iterdir()) if each.suffix and each.is_file()}
        ending = next((each for each in _LIKELY_ENDINGS if each in endings), ".jsonl")
        raise DataError(f"{shown_path(path)} is a folder; name its files, for instance '{shown_path(path)}/*{ending}'")
    return InputFile("", *found)


def _each_once(files: Sequence[InputFile]) -> list[InputFile]:
    """The inputs without those that are the same file as one before: by path, link or overlapping patterns."""
    first: dict[tuple[int, int] | None, InputFile] = {}
    for file in files:
        before = first.setdefault(file.identity, file)
        if before is not file:
            _warn_of_same_file(before.shown, file.shown)
    return list(first.values())


@cache
def _warn_of_same_file(first: str, second: str) -> None:
    """Once in a process: the inputs of a run are looked at several times."""
    names = f"{first} is named twice" if first == second else f"{second} is the same file as {first}"
    log.warning("%s; it is read once", names)


def warn_of_shared_files(train: Sequence[str], evaluation: Sequence[str]) -> None:
    """Say which files are both trained and evaluated on: such an evaluation tells what was learned by heart."""
    trained = {file.identity: file.shown for file in resolve_inputs(train)}
    for file in resolve_inputs(evaluation):
        if file.identity in trained:
            _warn_of_evaluation(file.shown, trained[file.identity])


@cache
def _warn_of_evaluation(evaluated: str, trained: str) -> None:
    names = evaluated if evaluated == trained else f"{evaluated}, which is the same file as {trained},"
    log.warning("%s is evaluated on and trained on too; --eval-fraction holds a part out instead", names)


def read_blocks(stream: Any, source: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut a binary stream into blocks of whole lines; the last line may lack its line end."""
    line, offset = 1, 0
    pending = b""  # the beginning of a line whose end is not read yet
    skipping = False
    while piece := read_fully(stream, block_bytes):
        if skipping:
            newline = piece.find(b"\n") + 1
            if not newline:
                offset += len(piece)
                continue
            line, offset, piece, skipping = line + 1, offset + newline, piece[newline:], False
        end = piece.rfind(b"\n") + 1
        if end:
            data = pending + piece[:end]
            yield Block(source, line, offset, data)
            line, offset, pending = line + data.count(b"\n"), offset + len(data), piece[end:]
        else:
            pending += piece
        if len(pending) > MAX_LINE_BYTES:
            yield Block(source, line, offset, b"", is_oversized=True)
            offset, pending, skipping = offset + len(pending), b"", True
    if isinstance(stream, LineStream | RowStream) and stream.is_bomb:
        yield Block(source, line + skipping, offset, b"", is_oversized=True, is_bomb=True)
    elif pending:
        yield Block(source, line, offset, pending)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell different files apart: no name depends on where a tree lies."""
    parts = [PurePath(path.resolve()).parts for path in paths]
    num_different = len(set(parts))
    length = 1
    while len({part[-length:] for part in parts}) < num_different:
        length += 1
    return [shown_path("/".join(part[-length:])) for part in parts]
