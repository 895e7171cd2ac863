"""Files of a checkpoint, written once: hashed on the way, synced, and tried again where a disk hiccups.

Tensors are written in the safetensors format (https://github.com/huggingface/safetensors, "Format"). The library's
own writer keeps Python's lock while it writes, which would stall a training loop beside it, and leaves the digest
to a second pass over the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.checkpoint.manifest import FileEntry
from lumina_ds.errors import CheckpointError
from lumina_ds.foreign_files import ForeignFileError, open_plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

# A failing disk or network file system may recover; a full one does not.
TRANSIENT = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
MAX_ATTEMPTS = 4
# What is read or written at a time: memory does not grow with the file or with a tensor.
PIECE_BYTES = 4 << 20
_TYPE_NAMES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NAMES_OF_TYPES = {short: name for name, short in _TYPE_NAMES.items()}
_BYTES = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F32", "F64", "F16", "BF16")


@dataclass
class CheckpointFile:
    """A file to be written: tensors with text about them, or plain bytes.

    With `load`, `tensors` are on the meta device, and their values are asked for one after the other, each in 1-D
    pieces, so that the file may be larger than memory.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None
    load: Callable[[str], Iterable[Tensor]] | None = None

    def __post_init__(self) -> None:
        # Widest values first, as the library does, so that every tensor is aligned to its own type.
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: -item[1].element_size()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the values, without the header."""
        if self.content is not None:
            return len(self.content)
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def copied(self) -> CheckpointFile:
        """The same with tensors of its own in host memory, which training does not change."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return CheckpointFile(self.name, copies, self.metadata, self.content)

    def first_not_finite(self) -> str | None:
        """Name of a tensor with a value that is no finite number, if there is one; values still to be asked for are
        not looked at."""
        import torch

        if self.load is not None:
            return None
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return name
        return None

    def write(self, folder: Path) -> FileEntry:
        """Write and sync; what the manifest says of the file. Transient errors are tried again, others raise OSError."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return _write(folder / self.name, self._pieces())
            except OSError as error:
                if error.errno not in TRANSIENT or attempt == MAX_ATTEMPTS:
                    raise
                logger.warning("writing %s failed (%s), attempt %d", self.name, error.strerror, attempt)
                time.sleep(random.uniform(0.5, 1.0) * 0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _pieces(self) -> Iterator[memoryview]:
        if self.content is not None:
            yield memoryview(self.content)
            return
        yield memoryview(_header(self.tensors, self.metadata))
        for name, tensor in self.tensors.items():
            for piece in [tensor] if self.load is None else self.load(name):
                yield from _bytes_of(piece)


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header of a safetensors file describes it."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]


def _check_offsets(tensors: Iterable[_Stored], size: int) -> None:
    """ValueError unless the tensors fill `size` bytes, one after the other, as the format demands."""
    position = 0
    for tensor in sorted(tensors, key=lambda each: each.data_offsets):
        if not all(type(number) is int and number >= 0 for number in (*tensor.shape, *tensor.data_offsets)):
            raise ValueError("a shape or an offset is no number")
        if tensor.data_offsets != [position, position + tensor.num_bytes]:
            raise ValueError(f"a tensor is said to be at {tensor.data_offsets} instead of {position}")
        position += tensor.num_bytes
    if position != size:
        raise ValueError(f"its tensors take {position} bytes, and it has {size}")


class TensorReader:
    """Tensors of a safetensors file, a few MiB at a time. Of a mapped file every page read would count as memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_plain(path, follow_links=False) as file:
                self._descriptor = os.dup(file.fileno())
        except (OSError, ForeignFileError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        self._values_at = 8 + length
        size = path.stat().st_size
        if self._values_at > size:
            raise CheckpointError(f"{path} is no safetensors file: its header is longer than it is")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in self.metadata.values()):
                raise ValueError("its metadata is no text")
            self._tensors = {name: _Stored(**entry) for name, entry in header.items()}
            _check_offsets(self._tensors.values(), size - self._values_at)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise CheckpointError(f"{path} is no safetensors file: its header is damaged ({error})") from error

    def num_values(self, name: str) -> int | None:
        """Elements of a tensor of floating-point numbers; None when the file has none of that name."""
        entry = self._tensors.get(name)
        return None if entry is None or entry.dtype not in _FLOATS else prod(entry.shape)

    def read_into(self, target: Tensor, name: str, start: int) -> None:
        """Fill the 1-D `target` with the elements of the flattened tensor `name` from `start` on."""
        import torch

        entry = self._tensors[name]
        dtype: torch.dtype = getattr(torch, _NAMES_OF_TYPES[entry.dtype])
        offset = self._values_at + entry.data_offsets[0] + start * dtype.itemsize
        if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
            self._read(target, offset, name)
            return
        for piece in target.split(PIECE_BYTES // dtype.itemsize):
            values = torch.empty(piece.numel(), dtype=dtype)
            offset += self._read(values, offset, name)
            piece.copy_(values)

    def _read(self, values: Tensor, offset: int, name: str) -> int:
        import torch

        room = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(room):
            count = os.preadv(self._descriptor, [room[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{self.path} ends before the values of {name} do")
            done += count
        return done


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        dtype = _TYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    import torch

    values = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    whole = memoryview(values)  # type: ignore[arg-type]
    for begin in range(0, len(whole), PIECE_BYTES):
        yield whole[begin : begin + PIECE_BYTES]


def _write(path: Path, pieces: Iterator[memoryview]) -> FileEntry:
    digest = hashlib.sha256()
    size = 0
    with open(path, "wb", buffering=0) as stream:
        for piece in pieces:
            digest.update(piece)
            rest = piece
            while len(rest):
                rest = rest[stream.write(rest) :]
            size += len(piece)
        os.fsync(stream.fileno())
    return FileEntry(bytes=size, sha256=digest.hexdigest())
