"""What routers learn outside the optimizer, once per step, from the counts of all ranks and micro-batches.

Three tensors per router, each present only where its setting asks for it: `e_score_correction_bias` [E], which
shifts the choice of experts; `load` [E], the step's shares of assignments; `capacity_factor`, a scalar. Every rank
applies the same rule to the same numbers, so they stay equal without communication.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lumina_ds.model.router import TRAINING_STATE, Router

# Factors of one step: room is missed at once, and given up slowly.
_GROWTH, _DECAY = 1.05, 0.99


def routers(module: nn.Module) -> dict[str, Router]:
    """Every router by its name, in the order of layers."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Router)}


@torch.no_grad()
def update_balance(module: nn.Module, assignments_LE: Tensor, overflow_L: Tensor) -> None:
    """Update the state of all routers after a step.

    assignments_LE [MoE layers, E]: the tokens' own choices in the step, of all ranks. overflow_L [MoE layers]: share
    of them that found no room. A layer without assignments keeps its state.
    """
    for router, assignments_E, overflow in zip(
        routers(module).values(), assignments_LE.double(), overflow_L.double(), strict=True
    ):
        # No branch on a value: the host need not wait for the device.
        total = assignments_E.sum()
        bias_E, kept_E, factor = (router.state(name) for name in ("e_score_correction_bias", "load", "capacity_factor"))
        if bias_E is not None:
            assert router.config.router_bias_update_rate is not None
            step_E = bias_step(assignments_E, router.config.router_bias_update_rate)
            bias_E += torch.where(total > 0, step_E, 0.0).to(bias_E.device)
        if kept_E is not None:
            load_E = (assignments_E / total.clamp(min=1)).float().to(kept_E.device)
            kept_E.copy_(torch.where((total > 0).to(kept_E.device), load_E, kept_E))
        if factor is not None:
            low, high = router.config.min_capacity_factor, router.config.max_capacity_factor
            assert low is not None and high is not None
            grows = overflow > router.config.capacity_overflow_target
            moved = (factor * torch.where(grows, _GROWTH, _DECAY).to(factor)).clamp(low, high)
            factor.copy_(torch.where((total > 0).to(factor.device), moved, factor))


def capacity_factors(module: nn.Module) -> list[float]:
    """Factors that follow overflow, per MoE layer; empty where none does."""
    factors = [factor for router in routers(module).values() if (factor := router.state("capacity_factor")) is not None]
    return torch.stack(factors).tolist() if factors else []


def bias_step(assignments_E: Tensor, rate: float) -> Tensor:
    """+rate for experts below the mean load, -rate above it (arXiv 2408.15664, algorithm 1), fp32 [E]."""
    return (rate * torch.sign(assignments_E.mean() - assignments_E)).float()


def routing_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of all routers' state by `ROUTER.NAME`, as they are held; empty when no setting asks for any."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, router in routers(module).items()
        for name, buffer in router._buffers.items()
        if buffer is not None
    }


def selection_biases(module: nn.Module) -> dict[str, Tensor]:
    """The part of routing_state that inference needs too, and that whole weights therefore hold."""
    state = routing_state(module)
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in TRAINING_STATE}
