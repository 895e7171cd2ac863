"""Our router inside DeepSpeed's AutoEP layers.

deepspeed.initialize replaces every MoE block by an AutoEPMoELayer (deepspeed/module_inject/auto_ep_layer.py),
which dispatches tokens over the expert-parallel group for ZeRO 0 to 3. Its router is exchanged afterwards by
giving the existing module objects our classes: parameters, hooks and optimizer state stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from lumina_ds.config.schema import ModelConfig
from lumina_ds.engine.deepspeed.changes import Need, existing, replace
from lumina_ds.model.experts import Experts
from lumina_ds.model.moe import MoE
from lumina_ds.model.router import Router, RouterGate

_LAYER = "deepspeed.module_inject.auto_ep_layer:AutoEPMoELayer"
NEEDS = (
    Need("deepspeed.moe.ep_router:TokenChoiceTopKRouter.forward", "self x expert_bias"),
    Need("deepspeed.moe.ep_router:TokenChoiceTopKRouter.gate"),
    Need("deepspeed.moe.ep_experts:GroupedExperts.forward", "self x"),
    Need(f"{_LAYER}._forward", contains="RouterOutput(*self.router(x, self.expert_bias))"),
    Need(f"{_LAYER}._forward", contains='elif self.combine_impl == "fused_weighted_sum":'),
    *(Need(f"{_LAYER}.{name}") for name in ("router", "experts", "combine_impl", "score_apply", "forward")),
)


def autoep_layers(module: nn.Module) -> list[Any]:
    """The layers that AutoEP built."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return [child for child in module.modules() if isinstance(child, AutoEPMoELayer)]


@dataclass(frozen=True)
class ExpertGroups:
    """`owned`: numbers of this rank's experts, where they are the same in every layer. `sharing`: the ranks that share
    one set of experts, `num_sharing` of them; `replicas`: those that hold copies of this rank's own."""

    owned: list[int] = field(default_factory=list)
    sharing: list[int] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    num_sharing: int = 1


def expert_groups(module: nn.Module) -> ExpertGroups:
    """The groups that DeepSpeed has made for the AutoEP layers of `module`."""
    from deepspeed.checkpoint.autoep_affine import autoep_experts_for_rank
    from deepspeed.utils import groups

    layers = autoep_layers(module)
    if not layers:
        return ExpertGroups()
    owned = [list(autoep_experts_for_rank(layer.expert_placement_descriptor, layer.ep_rank)) for layer in layers]
    name = layers[0].ep_group_name
    return ExpertGroups(
        owned[0] if all(each == owned[0] for each in owned) else [],
        list(groups._get_expert_parallel_group_ranks(name)),
        list(groups._get_expert_data_parallel_group_ranks(name)),
        layers[0].ep_size,
    )


def install_cpu_experts(module: nn.Module, expert_parallel_size: int) -> None:
    """On a CPU, let our experts (model/experts.py) work in the AutoEP layers of `module`, in place.

    Without expert parallelism no token leaves the rank, so the whole layer is our plain one. On a GPU DeepSpeed's
    grouped kernels, made for its cards, stay.
    """
    for layer in autoep_layers(module):
        replace(existing(layer, "experts"), "__class__", Experts)
        if expert_parallel_size == 1:
            replace(layer, "__class__", _local_layer())


def fuse_combination(module: nn.Module) -> None:
    """Let DeepSpeed's kernel sum each token's experts, which is its `combine_impl`, in the AutoEP layers of `module`.

    Set here and not in the JSON, which is composed before a GPU is seen. A user's JSON that chose otherwise keeps it.
    """
    for layer in autoep_layers(module):
        if layer.combine_impl == "weighted_sum" and layer.score_apply == "post":
            replace(layer, "combine_impl", "fused_weighted_sum")


@lru_cache(maxsize=1)
def _local_layer() -> Any:
    """A class made on first use, since its base needs deepspeed; DeepSpeed knows its layers by that base."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return type("LocalMoELayer", (AutoEPMoELayer,), {"forward": MoE.forward})


def install_routers(module: nn.Module, config: ModelConfig) -> None:
    """Turn every AutoEP router in `module` into ours, in place."""
    layers = autoep_layers(module)
    expected = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    assert len(layers) == expected, f"AutoEP replaced {len(layers)} of {expected} MoE layers"
    numbers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    for number, layer in zip(numbers, layers, strict=True):
        router = existing(layer, "router")
        replace(router, "__class__", Router)
        replace(existing(router, "gate"), "__class__", RouterGate)
        router.configure(config, number, router.gate.weight.device)
