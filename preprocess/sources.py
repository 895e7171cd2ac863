"""Inputs of the offline stage: paths, globs and standard input, plain or compressed, read in fixed blocks.

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
import hashlib
import lzma
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from lumina_ds.data.shards.manifest import InputEntry
from lumina_ds.data.strict_json import LINE_TOO_LONG, MAX_LINE_BYTES
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from preprocess.containers import MAX_EXPANSION, LineStream, open_lines, read_fully

STDIN = "-"
BLOCK_BYTES = 4 << 20
COMPRESSION_BOMB = "compression bomb"


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

    blocks() hashes what it reads, so that the digest is that of the bytes which went into the output.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self.name = name
        self.path = path
        self._raw: _CountingStream | None = None

    @property
    def size_bytes(self) -> int | None:
        return self.path.stat().st_size if self.path else None

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far, before decompression."""
        return self._raw.num_bytes if self._raw else 0

    def entry(self) -> InputEntry:
        """Name, size and SHA-256; for standard input, of what blocks() has read."""
        if self.path is None or (self._raw is not None and self._raw.at_end):
            assert self._raw is not None
            return InputEntry(name=self.name, size_bytes=self._raw.num_bytes, sha256=self._raw.digest.hexdigest())
        try:
            return InputEntry(name=self.name, size_bytes=self.path.stat().st_size, sha256=file_digest(self.path))
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Read the input. Raises UnreadableInput when it cannot be read or its compression is damaged."""
        shown = self.path or "standard input"
        try:
            with self.path.open("rb") if self.path else nullcontext(sys.stdin.buffer) as file:
                self._raw = _CountingStream(file)
                for block in read_blocks(open_lines(self._raw, shown), self.name, block_bytes):
                    yield replace(block, input_digest=self._raw.digest.copy().hexdigest())
        except (OSError, EOFError, lzma.LZMAError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise UnreadableInput(f"cannot read {shown}: {reason or error}") from error


def resolve_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """Files of paths, globs and `-` (standard input), in the order given, globs sorted. Raises DataError."""
    paths: list[Path | None] = []
    for pattern in patterns:
        if pattern == STDIN:
            paths.append(None)
        elif Path(pattern).is_file():
            paths.append(Path(pattern))
        elif Path(pattern).is_dir():
            raise DataError(f"{pattern} is a folder; name its files, for instance '{pattern}/*.jsonl'")
        elif Path(pattern).exists():  # a pipe, such as <(...): it could not be read again for its digest
            raise DataError(f"{pattern} is no ordinary file; write `- < {pattern}` to read it as standard input")
        else:
            matches = sorted(match for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
            if not matches:
                raise DataError(f"no such file: {pattern}")
            paths += map(Path, matches)
    if paths.count(None) > 1:
        raise DataError("standard input (-) is named twice; it can be read only once")
    names = iter(_short_names([path for path in paths if path is not None]))
    return [InputFile(STDIN if path is None else next(names), path) for path in paths]


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
    if isinstance(stream, LineStream) and stream.is_bomb:
        yield Block(source, line + skipping, offset, b"", is_oversized=True, is_bomb=True)
    elif pending:
        yield Block(source, line, offset, pending)


class _CountingStream:
    """A readable that counts and hashes the bytes that pass."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.at_end = False
        self.closed = False
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end alone; they are still to be read."""
        self._ahead += read_fully(self._file, size - len(self._ahead))
        return self._ahead[:size]

    def read(self, size: int = -1) -> bytes:
        if self._ahead and size >= 0:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data, self._ahead = self._ahead + self._file.read(size), b""
        self.num_bytes += len(data)
        self.digest.update(data)
        self.at_end = not data
        return data

    def close(self) -> None:
        self.closed = True


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell different files apart: no name depends on where a tree lies."""
    parts = [PurePath(path.resolve()).parts for path in paths]
    num_different = len(set(parts))
    length = 1
    while len({part[-length:] for part in parts}) < num_different:
        length += 1
    return ["/".join(part[-length:]) for part in parts]
