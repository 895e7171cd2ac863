"""Ulysses sequence parallelism (arXiv 2309.14509) for dense models: a group of ranks shares rows that are too long.

Each rank holds a slice of every row. Around attention DeepSpeed's DistributedAttention exchanges slices for heads: every
rank then sees whole rows in a part of the heads, so document boundaries and all attention backends work unchanged.
All other layers treat tokens one by one. To ZeRO the ranks are data-parallel ones that hold other tokens: the loss is a
sum over tokens divided by their global number, so slices need no scaling of their own.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from lumina_ds.engine.deepspeed.changes import Need
from lumina_ds.engine.world import World
from lumina_ds.model.attention import Attention

_EXCHANGE = "deepspeed.sequence.layer:DistributedAttention"
NEEDS = (
    Need(f"{_EXCHANGE}.__init__", contains="num_kv_heads"),
    Need(f"{_EXCHANGE}.forward", "self query key value batch_dim_idx"),
)


def share_rows(model: nn.Module, world: World) -> None:
    """Make the attention of `model` exchange slices within groups of world.sequence_parallel_size neighbours.

    A collective. Neighbours, because a group talks in every layer and belongs on one node.
    """
    import torch.distributed as dist
    from deepspeed.sequence.layer import DistributedAttention

    size = world.sequence_parallel_size
    for first in range(0, world.size, size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if world.rank in ranks:
            own = group
    for module in model.modules():
        if isinstance(module, Attention):
            exchange = DistributedAttention(
                module.attend, own, scatter_idx=2, gather_idx=1, num_kv_heads=module.num_key_value_heads
            )
            # A closure, not a child module: names of parameters and ZeRO's hooks stay as they are.
            module.attend = partial(_exchange, exchange)


def _exchange(exchange: nn.Module, q_BSHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, documents: object) -> Tensor:
    return exchange(q_BSHC, k_BSKC, v_BSKC, 0, documents=documents)
