"""Our router inside DeepSpeed's AutoEP layers.

deepspeed.initialize replaces every MoE block by an AutoEPMoELayer (deepspeed/module_inject/auto_ep_layer.py),
which dispatches tokens over the expert-parallel group for ZeRO 0 to 3. Its router is exchanged afterwards by
giving the existing module objects our classes: parameters, hooks and optimizer state stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.router import Router, RouterGate


def autoep_layers(module: nn.Module) -> list[Any]:
    """The layers that AutoEP built."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return [child for child in module.modules() if isinstance(child, AutoEPMoELayer)]


def install_routers(module: nn.Module, config: ModelConfig) -> None:
    """Turn every AutoEP router in `module` into ours, in place."""
    layers = autoep_layers(module)
    expected = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    assert len(layers) == expected, f"AutoEP replaced {len(layers)} of {expected} MoE layers"
    numbers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    for number, layer in zip(numbers, layers, strict=True):
        router = layer.router
        router.__class__ = Router
        router.gate.__class__ = RouterGate
        router.configure(config, number, router.gate.weight.device)
