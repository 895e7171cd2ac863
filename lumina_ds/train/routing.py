"""What routers report of a step: the metrics of balance, per MoE layer, and the seeds of their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.router import MEASURED


@dataclass(frozen=True)
class RoutingMetrics:
    """One step, all ranks and micro-batches; lists are per MoE layer. Shares are of the tokens' own choices.

    expert_usage: each expert's share of the choices, before any is dropped or rerouted. usage_entropy: entropy of
    these shares, 1 is even. router_entropy: mean entropy of a token's probabilities, 1 is undecided. max_violation:
    load of the busiest expert over an even share, minus one (arXiv 2408.15664). dead_experts: experts that no token
    chose. capacity_factor: of the step to come where it follows overflow; else empty.
    """

    expert_usage: list[list[float]]
    usage_entropy: list[float]
    router_entropy: list[float | None]
    max_violation: list[float]
    dead_experts: list[int]
    dropped_share: list[float]
    rerouted_share: list[float]
    capacity_factor: list[float]


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over a step of what routers measured (model/router.py): [MoE layers, 2E + 4] in float64, on the host."""

    measured: Tensor
    num_experts: int

    @property
    def assignments_LE(self) -> Tensor:
        return self.measured[:, : self.num_experts]

    @property
    def overflow_L(self) -> Tensor:
        """Share of the choices that found no room, whatever became of them."""
        return (self._scalar("dropped") + self._scalar("rerouted")) / self._choices()

    @property
    def load_balancing_loss(self) -> float:
        """Of the whole step as one batch, whatever the loss's scope: comparable between runs. 1 is balanced."""
        if not len(self.measured):
            return 0.0
        usage_LE = self.assignments_LE / self._choices().unsqueeze(1)
        probability_LE = self.measured[:, self.num_experts : 2 * self.num_experts]
        mean_LE = probability_LE / self._scalar("tokens").clamp(min=1).unsqueeze(1)
        return float(self.num_experts * (usage_LE * mean_LE).sum(1).mean())

    def metrics(self, capacity_factors: Sequence[float] = ()) -> RoutingMetrics:
        if not len(self.measured):
            return RoutingMetrics(*([] for _ in fields(RoutingMetrics)))
        scale = math.log(max(2, self.num_experts))
        usage_LE = self.assignments_LE / self._choices().unsqueeze(1)
        tokens_L = self._scalar("tokens").clamp(min=1)
        return RoutingMetrics(
            expert_usage=usage_LE.tolist(),
            usage_entropy=(-torch.special.xlogy(usage_LE, usage_LE).sum(1) / scale).tolist(),
            # Of a step with non-finite logits there is none; JSON knows no NaN.
            router_entropy=[
                value if math.isfinite(value) else None
                for value in (self._scalar("entropy") / tokens_L / scale).tolist()
            ],
            max_violation=(usage_LE.max(1).values * self.num_experts - 1).tolist(),
            dead_experts=(usage_LE == 0).sum(1).tolist(),
            dropped_share=(self._scalar("dropped") / self._choices()).tolist(),
            rerouted_share=(self._scalar("rerouted") / self._choices()).tolist(),
            capacity_factor=list(capacity_factors),
        )

    def _scalar(self, name: str) -> Tensor:
        return self.measured[:, 2 * self.num_experts + MEASURED.index(name)]

    def _choices(self) -> Tensor:
        return self.assignments_LE.sum(1).clamp(min=1)


def noise_seeds(model: ModelConfig, seed: int, step: int, row_ids: Sequence[int]) -> tuple[int, ...] | None:
    """A seed for every packed row, from the run's seed, the step and the row alone, so that resuming or another
    number of ranks draws the same; None when the routers draw nothing."""
    if not (model.router_jitter_noise or model.expert_dropout):
        return None
    # Row numbers begin at -1, the filler.
    return tuple(int(np.random.SeedSequence([seed, step, row + 1]).generate_state(1, np.uint64)[0]) for row in row_ids)
