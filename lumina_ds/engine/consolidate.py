"""Full weights out of a partitioned engine, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor | None]]:
    """Every parameter of the model by its name, whole, on the CPU of rank 0; None on the other ranks.

    A collective: every rank must exhaust the iterator. Only one parameter is whole at a time, so memory stays
    bounded. ZeRO-3 partitions are gathered first, then the experts of the expert-parallel group (their order is
    the group's rank order, deepspeed/module_inject/auto_ep_layer.py).
    """
    import torch.distributed as dist

    for name, parameter in engine.module.named_parameters():
        with _gathered(parameter), torch.no_grad():
            whole = _all_experts(parameter) if _is_expert(parameter) else parameter.data
            yield name, whole.detach().cpu().clone() if dist.get_rank() == 0 else None


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
