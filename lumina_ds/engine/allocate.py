"""A model's parameters in no more memory than one rank's part of them takes.

The model is built without storage (engine/deepspeed/meta_parameters.py). Then each parameter gets the storage that
this rank keeps of it: at ZeRO-3 a parameter is partitioned before the next one exists, and the experts, of which AutoEP
will copy this rank's share, are zeros that all lie in one element.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lumina_ds.model.moe import Experts


def allocate(model: nn.Module, dtype: torch.dtype, device: torch.device, deepspeed_json: dict[str, Any]) -> None:
    """Give every parameter of `model` that was built without_storage zeros on `device`, and move its buffers there.

    At ZeRO-3 this is a collective: DeepSpeed broadcasts each parameter before it partitions it.
    """
    expert_ids = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    partition = _Partitioner(deepspeed_json) if deepspeed_json["zero_optimization"]["stage"] == 3 else None
    allocated: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is None:
                continue
            if id(meta) not in allocated:
                is_expert = id(meta) in expert_ids
                zeros = torch.zeros(() if is_expert else meta.shape, dtype=dtype, device=device).expand(meta.shape)
                parameter = nn.Parameter(zeros, requires_grad=meta.requires_grad)
                if partition is not None and not is_expert:
                    partition(parameter)
                allocated[id(meta)] = parameter
            module._parameters[name] = allocated[id(meta)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


class _Partitioner:
    """Turns one parameter after the other into a ZeRO-3 partition, by the one zero.Init that the first one starts."""

    def __init__(self, deepspeed_json: dict[str, Any]) -> None:
        self.deepspeed_json = deepspeed_json
        self.convert: Callable[..., None] | None = None

    def __call__(self, parameter: nn.Parameter) -> None:
        import deepspeed

        if self.convert is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=copy.deepcopy(self.deepspeed_json)
            )
            self.convert = parameter.convert_to_zero_parameters  # type: ignore[attr-defined]
        else:
            self.convert(param_list=[parameter])
