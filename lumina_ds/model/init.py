"""All initial weights, in one place.

Every value depends on the seed, its parameter's name and its position in the whole parameter alone, so a rank that
holds a part of a parameter draws that part alone, and every layout starts from the same weights.
"""

from __future__ import annotations

import hashlib
from math import prod

import torch
from torch import Tensor, nn

from lumina_ds.config.schema import ModelConfig

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.w2")

# Elements that one seeded generator draws: small beside a parameter, large beside the cost of seeding.
_BLOCK = 1 << 18


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a whole `model` in place: normal(0, initializer_range); norms at one."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        parameter.copy_(initial_values(name, shape, config, seed, 0, parameter.numel()).view(shape))


def initial_values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened parameter `name` of a whole `shape`, fp32 on the CPU.

    Projections that write into the residual stream are scaled by 1/sqrt(2 * layers) (GPT-2), so that the
    stream's variance does not grow with depth. The global random state is left alone.
    """
    if len(shape) == 1:
        return torch.ones(stop - start)
    std = config.initializer_range
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= (2 * config.num_hidden_layers) ** 0.5
    values = torch.empty(stop - start)
    numel = prod(shape)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        first, last = block * _BLOCK, min((block + 1) * _BLOCK, numel)
        drawn = torch.empty(last - first).normal_(0.0, std, generator=_generator(seed, name, block))
        begin, end = max(start, first), min(stop, last)
        values[begin - start : end - start] = drawn[begin - first : end - first]
    return values


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
