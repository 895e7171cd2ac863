"""The weights that a run starts from, drawn or read for the parts of the model that this rank holds, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import CheckpointError
from lumina_ds.files import read_weights_index
from lumina_ds.model.balancing import selection_biases
from lumina_ds.model.init import initial_values

# (name, start, stop): elements [start, stop) of the flattened whole parameter.
WeightSource = Callable[[str, int, int], Tensor]

# Elements drawn or read at once: what filling takes beside the model.
_CHUNK = 1 << 24


def drawn_weights(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, seed: int) -> WeightSource:
    """Initial weights from a seed, the same under every layout."""
    return lambda name, start, stop: initial_values(name, shapes[name], config, seed, start, stop)


def stored_weights(
    shapes: Mapping[str, tuple[int, ...]], folder: Path, biases: Mapping[str, tuple[int, ...]] | None = None
) -> WeightSource:
    """Weights of the safetensors files that the folder's index names, in our names.

    Raises CheckpointError when the folder has no such files or their names and shapes are not exactly `shapes`, beside
    `biases` of routers, which it may have (load_selection_biases).
    """
    slices: dict[str, Any] = {}
    try:
        for name in sorted(set(read_weights_index(folder).values())):
            file = safe_open(folder / name, framework="pt")
            slices |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"train.init_from {folder} holds no whole weights ({error}); `lumina import` makes such a folder"
        ) from error
    present = {name: shape for name, shape in (biases or {}).items() if name in slices}
    faults = _mismatches({**shapes, **present}, {name: found.get_shape() for name, found in slices.items()})
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"train.init_from {folder} does not fit the section `model`: {'; '.join(faults[:8])}{more}; "
            "use the config.yaml of that folder"
        )
    return lambda name, start, stop: _read_range(slices[name], shapes[name], start, stop)


@torch.no_grad()
def load_selection_biases(module: nn.Module, folder: Path) -> None:
    """Set the routers' biases to those of a folder of whole weights; where it has none they stay at zero."""
    places = read_weights_index(folder)
    for name, bias in selection_biases(module).items():
        if name in places:
            with safe_open(folder / places[name], framework="pt") as file:
                bias.copy_(file.get_tensor(name))


@torch.no_grad()
def fill_parameters(module: nn.Module, source: WeightSource) -> None:
    """Copy into every parameter the part of it that this rank holds: whole, its experts, its ZeRO-3 partition."""
    parameter: Any
    for name, parameter in module.named_parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        read = partial(_read_shifted, source, name, _first_element(parameter, numel))
        if not hasattr(parameter, "ds_id"):
            _copy(parameter.data.view(-1), read, 0)
        elif _is_plain_partition(parameter):
            own = parameter.ds_tensor
            start = own.numel() * parameter.ds_zero_partition_rank
            _copy(own[: max(0, min(own.numel(), numel - start))], read, start)
        else:
            _fill_gathered(parameter, read)


def _copy(target: Tensor, read: Callable[[int, int], Tensor], first: int) -> None:
    for start in range(0, target.numel(), _CHUNK):
        stop = min(start + _CHUNK, target.numel())
        target[start:stop].copy_(read(first + start, first + stop))


def _read_shifted(source: WeightSource, name: str, offset: int, start: int, stop: int) -> Tensor:
    return source(name, offset + start, offset + stop)


def _first_element(parameter: Any, numel: int) -> int:
    """Where this rank's experts begin in the whole tensor of experts; 0 for anything else."""
    if getattr(parameter, "allreduce", True):
        return 0
    from deepspeed.utils import groups

    return numel * groups._get_expert_parallel_rank(parameter.group_name)


def _is_plain_partition(parameter: Any) -> bool:
    """Whether the partition lies in memory as it is: not on NVMe, quantized, or copied a second time (hpZ)."""
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    own = parameter.ds_tensor
    in_memory = own.status is PartitionedParamStatus.AVAILABLE
    return in_memory and own.dtype.is_floating_point and parameter.ds_secondary_tensor is None


def _fill_gathered(parameter: Any, read: Callable[[int, int], Tensor]) -> None:
    import deepspeed
    import torch.distributed as dist

    # The modifier is a rank of the parameter's own group, whose first one fills for all.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank(parameter.ds_process_group) == 0:
            _copy(parameter.data.view(-1), read, 0)


def _read_range(stored: Any, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements [start, stop) by reading the rows that hold them."""
    row = prod(shape[1:])
    first = start // row
    rows = stored[first : -(-stop // row)].reshape(-1)
    return rows[start - first * row : stop - first * row]


def _mismatches(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, list[int]]) -> list[str]:
    faults = [f"{name} is missing" for name in shapes if name not in found]
    faults += [f"{name} is not part of the configured model" for name in found if name not in shapes]
    return faults + [
        f"{name} has shape {found[name]}, the configuration {list(shape)}"
        for name, shape in shapes.items()
        if name in found and list(shape) != found[name]
    ]
