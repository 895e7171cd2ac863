"""Full weights out of a partitioned engine, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


def full_parameters(engine: Any, owner: Mapping[str, int] | None = None) -> Iterator[tuple[str, Tensor | None]]:
    """Every parameter of the model by its name, whole, on the CPU of its owner (rank 0 by default); None elsewhere.

    A collective: every rank must exhaust the iterator. Only one parameter is whole at a time, so memory stays
    bounded. ZeRO-3 partitions are gathered first, then the experts of the expert-parallel group (their order is
    the group's rank order, deepspeed/module_inject/auto_ep_layer.py).
    """
    import torch.distributed as dist

    for name, parameter in engine.module.named_parameters():
        with _gathered(parameter), torch.no_grad():
            whole = _all_experts(parameter) if _is_expert(parameter) else parameter.data
            mine = dist.get_rank() == (owner[name] if owner is not None else 0)
            yield name, whole.detach().cpu().clone() if mine else None


def whole_bytes(engine: Any) -> dict[str, int]:
    """Bytes of every parameter with all experts, by name, in the model's order."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    sizes = {}
    for name, parameter in engine.module.named_parameters():
        size = prod(getattr(parameter, "ds_shape", parameter.shape)) * parameter.element_size()
        if _is_expert(parameter):
            size *= dist.get_world_size(groups._get_expert_parallel_group(parameter.group_name))
        sizes[name] = size
    return sizes


def _is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _gathered(parameter: nn.Parameter) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id"))


def _all_experts(parameter: Any) -> Tensor:
    import torch.distributed as dist
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)
    local = parameter.data.contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local, group=group)
    return torch.cat(parts)
