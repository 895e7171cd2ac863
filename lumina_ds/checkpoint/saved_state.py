"""The optimizer files of all ranks in a step folder, read by parameter and elements: what any layout is filled from.

The header of an optimizer file says of each of its pieces which elements of which whole parameter it is. Both ways stand
here: the header's text, and looking up which files hold the elements that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from lumina_ds.checkpoint.tensor_file import PIECE_BYTES, TensorReader
from lumina_ds.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PIECES = "lumina_pieces"


class PieceRecord(BaseModel):
    """What an optimizer file's header says of one piece: elements start .. start + numel of a parameter of `shape`."""

    model_config = ConfigDict(strict=True, frozen=True)

    shape: list[NonNegativeInt]
    start: NonNegativeInt
    numel: NonNegativeInt
    keys: list[str]
    scalars: dict[str, float]


def pieces_metadata(records: Mapping[str, PieceRecord]) -> dict[str, str]:
    """The pieces of an optimizer file, by parameter, as text for its header."""
    return {PIECES: json.dumps({name: record.model_dump() for name, record in records.items()})}


_PIECE_RECORDS = TypeAdapter(dict[str, PieceRecord])


class SavedState:
    """The pieces of every rank's optimizer file, looked up by parameter and elements."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, list[str]] = {}
        self._scalars: dict[str, dict[str, float]] = {}
        self._places: dict[str, list[tuple[int, int, TensorReader]]] = {}
        for name in sorted(files):
            if not name.startswith("optimizer-"):
                continue
            file = TensorReader(folder / name)
            for parameter, piece in _piece_records(file).items():
                self.shapes[parameter] = tuple(piece.shape)
                self._keys[parameter] = piece.keys
                self._scalars[parameter] = piece.scalars
                self._places.setdefault(parameter, []).append((piece.start, piece.numel, file))
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])

    def keys_of(self, parameter: str, shape: tuple[int, ...]) -> list[str]:
        """What was saved of a parameter (weight, moments); CheckpointError when it is absent or of another shape."""
        found = self.shapes.get(parameter)
        if found != shape:
            raise CheckpointError(f"the checkpoint has {parameter} as {found}, the model as {shape}")
        return self._keys[parameter]

    def scalars_of(self, parameter: str) -> dict[str, float]:
        """The optimizer's numbers for a parameter."""
        return self._scalars[parameter]

    def read_into(self, target: Tensor, parameter: str, key: str, start: int) -> None:
        """Fill the 1-D `target` with the elements from `start` on; a few MiB of a file are in memory at a time."""
        position, end = start, start + target.numel()
        for begin, numel, file in self._places[parameter]:
            if begin <= position < min(end, begin + numel):
                stop = min(end, begin + numel)
                file.read_into(target[position - start : stop - start], f"{parameter}/{key}", position - begin)
                position = stop
        if position != end:
            raise CheckpointError(f"the checkpoint lacks elements {position} to {end} of {parameter} ({key})")

    def pieces(self, parameter: str, key: str, start: int, numel: int) -> Iterator[Tensor]:
        """The fp32 elements start .. start + numel, 1-D, a few MiB at a time, each valid until the next is asked for."""
        import torch

        buffer = torch.empty(min(numel, PIECE_BYTES // torch.float32.itemsize))
        for begin in range(start, start + numel, len(buffer) or 1):
            values = buffer[: start + numel - begin]
            self.read_into(values, parameter, key, begin)
            yield values


def _piece_records(file: TensorReader) -> dict[str, PieceRecord]:
    """The way back; CheckpointError where the header does not describe the file's own tensors."""
    try:
        records = _PIECE_RECORDS.validate_json(file.metadata.get(PIECES, ""))
    except ValidationError as error:
        raise CheckpointError(
            f"{file.path} is no optimizer file of a checkpoint: its header names no pieces"
        ) from error
    for parameter, record in records.items():
        for key in record.keys:
            if file.num_values(f"{parameter}/{key}") != record.numel:
                raise CheckpointError(f"{file.path} does not hold {record.numel} elements of {parameter} ({key})")
    return records
