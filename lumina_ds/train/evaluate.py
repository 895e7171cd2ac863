"""Loss and perplexity over packed rows, exact for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lumina_ds.data.loader import PackedRows
from lumina_ds.data.sampler import evaluation_rows
from lumina_ds.engine.world import World
from lumina_ds.monitor.metrics import perplexity
from lumina_ds.train.step import model_inputs


@torch.no_grad()
def evaluate(
    model: Any,
    rows: PackedRows,
    micro_batch_size: int,
    world: World,
    max_rows: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{"loss", "perplexity", "trained_tokens"} of `model` (an engine or a plain CausalLM) on `rows`.

    Every rank reads as many micro-batches as the others, short ones filled with empty rows, since expert and
    ZeRO-3 collectives need all ranks; empty rows hold no trained token, so the sum is exact. `on_batch` is called before
    each, and may leave the evaluation by raising on all ranks alike.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.torch_device)
    num_rows = min(rows.num_rows, max_rows or rows.num_rows)
    share = world.share
    try:
        for row_ids in evaluation_rows(num_rows, share.rank, share.size, micro_batch_size):
            on_batch()
            batch = share.cut(rows.collate(row_ids))
            loss_sum = model(**model_inputs(batch, world.torch_device))[0]
            sums += torch.tensor([float(loss_sum), batch.num_trained_tokens], dtype=torch.float64, device=sums.device)
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss_sum, tokens = sums.tolist()
    loss = loss_sum / max(1.0, tokens)
    return {"loss": loss, "perplexity": perplexity(loss), "trained_tokens": int(tokens)}
