"""The tensors that an engine keeps alive, by what they are for: the measured side of the memory plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory that the tensors keep alive: each storage once, whatever views there are."""
    storages = {id_: size for id_, size in map(_storage, tensors) if size}
    return sum(storages.values())


def parameter_tensors(engine: Any) -> Iterator[Tensor]:
    """The model's parameters, whole or partitioned."""
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def master_tensors(optimizer: Any) -> list[Tensor]:
    """fp32 copies that the optimizer steps; none at ZeRO-0."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def moment_tensors(optimizer: Any) -> list[Tensor]:
    """Adam's two averages, Muon's momentum, or what else the optimizer keeps of each element; not its step counts."""
    inner = getattr(optimizer, "optimizer", optimizer)
    values = (value for state in inner.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor) and value.dim() > 0]


def gradient_tensors(engine: Any) -> Iterator[Tensor]:
    """What holds gradients between the backward pass and the step."""
    optimizer = engine.optimizer
    yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        yield optimizer.grad_partitions_flat_buffer
    for tensors in getattr(optimizer, "averaged_gradients", {}).values():
        yield from tensors or []
    yield from getattr(optimizer, "fp32_groups_gradients_flat", [])


def _storage(tensor: Tensor) -> tuple[int, int]:
    # Not the address: a fake tensor's storage has none.
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
