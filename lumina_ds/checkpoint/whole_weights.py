"""The whole weights in a checkpoint, for inference: files under Hugging Face's names, dealt out over the ranks.

Either gathered from the engine, by collectives between the ranks, or read from the pieces that all ranks have written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.checkpoint.format import BIASES_FILE, WEIGHTS_INDEX
from lumina_ds.checkpoint.pieces import WEIGHT
from lumina_ds.checkpoint.state import SavedState
from lumina_ds.checkpoint.tensor_file import CheckpointFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_WEIGHT_FILE_BYTES = 4 << 30


def weight_file_plan(sizes: dict[str, int], world_size: int) -> list[list[str]]:
    """Names of the parameters in each weight file: consecutive ones, at most 4 GiB and about a rank's share."""
    limit = min(MAX_WEIGHT_FILE_BYTES, -(-sum(sizes.values()) // world_size))
    files: list[list[str]] = []
    used = limit
    for name, size in sizes.items():
        if not files or (used + size > limit and used > 0):
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def gathered_weight_files(engine: Any) -> Iterator[CheckpointFile]:
    """This rank's weight files from the live parameters; rank 0 adds the index. A collective: exhaust it."""
    import torch.distributed as dist

    from lumina_ds.checkpoint.consolidate import full_parameters

    plan, place = _plan(engine)
    owner = {parameter: number % dist.get_world_size() for parameter, number in place.items()}
    batch: dict[str, Tensor] = {}
    for parameter, tensor in full_parameters(engine, owner):
        if tensor is not None:
            batch[parameter] = tensor
            if parameter == plan[place[parameter]][-1]:
                yield CheckpointFile(weight_file_name(place[parameter]), batch)
                batch = {}
    yield from _index(engine, place)


def weight_files_from_pieces(engine: Any, folder: Path) -> Iterator[CheckpointFile]:
    """The same files, bit for bit, from the optimizer files of all ranks in `folder`. No collective."""
    import torch
    import torch.distributed as dist

    plan, place = _plan(engine)
    saved = SavedState(folder, [path.name for path in folder.iterdir()])
    dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    for number in range(dist.get_rank(), len(plan), dist.get_world_size()):
        shapes = {name: torch.empty(saved.shapes[name], dtype=dtypes[name], device="meta") for name in plan[number]}
        yield CheckpointFile(weight_file_name(number), shapes, load=whole_from_pieces(saved, shapes))
    yield from _index(engine, place)


def whole_from_pieces(saved: SavedState, tensors: dict[str, Tensor]) -> Callable[[str], Iterator[Tensor]]:
    """What CheckpointFile asks for values: whole parameters in the dtypes of `tensors`, a few MiB at a time."""

    def load(name: str) -> Iterator[Tensor]:
        for values in saved.pieces(name, WEIGHT, 0, tensors[name].numel()):
            yield values.to(tensors[name].dtype)

    return load


def weight_file_name(number: int) -> str:
    """Name of a weight file by its place in the plan."""
    return f"model-{number + 1:05d}.safetensors"


def _plan(engine: Any) -> tuple[list[list[str]], dict[str, int]]:
    import torch.distributed as dist

    from lumina_ds.checkpoint.consolidate import whole_bytes

    plan = weight_file_plan(whole_bytes(engine), dist.get_world_size())
    return plan, {parameter: number for number, parameters in enumerate(plan) for parameter in parameters}


def _index(engine: Any, place: dict[str, int]) -> Iterator[CheckpointFile]:
    """What rank 0 adds. The routers' state is alike on all ranks; what inference needs of it belongs here too."""
    import torch.distributed as dist

    from lumina_ds.model.balancing import selection_biases

    if dist.get_rank() != 0:
        return
    biases = selection_biases(engine.module)
    if biases:
        yield CheckpointFile(BIASES_FILE, biases)
    weight_map = {parameter: weight_file_name(number) for parameter, number in place.items()}
    index = {"metadata": {}, "weight_map": weight_map | dict.fromkeys(biases, BIASES_FILE)}
    yield CheckpointFile(WEIGHTS_INDEX, content=json.dumps(index, indent=1).encode())
