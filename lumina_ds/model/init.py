"""All initial weights, in one place."""

from __future__ import annotations

import torch
from torch import nn

from lumina_ds.config.schema import ModelConfig

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.w2")


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill `model` in place: normal(0, initializer_range); norms at one.

    Projections that write into the residual stream are scaled by 1/sqrt(2 * layers) (GPT-2), so that the
    stream's variance does not grow with depth. The generator is private: the same seed gives the same
    weights on every rank and leaves the global random state alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = config.initializer_range
        if name.endswith(RESIDUAL_OUTPUTS):
            std /= (2 * config.num_hidden_layers) ** 0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
