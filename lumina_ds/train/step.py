"""One optimizer step: several micro-batches, one loss divided by the global number of trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.engine.build import clip_gradients, clips_by_itself
from lumina_ds.engine.distributed import World
from lumina_ds.model.attention_backends import DocumentLayout


@dataclass(frozen=True)
class StepCounts:
    """What all ranks together bring to a step; `micro_batches` leaves out those of filler rows only."""

    trained_tokens: int
    tokens: int
    micro_batches: int
    stop_requested: bool


@dataclass(frozen=True)
class StepOutcome:
    """Losses are global means of this step; `expert_usage` [MoE layers][E] is each expert's share of assignments."""

    loss: float
    load_balancing_loss: float
    router_z_loss: float
    expert_usage: list[list[float]]
    grad_norm: float
    skipped: bool


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """The model's keyword arguments for one micro-batch, on `device`."""
    tensors = {
        name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True)
        for name in ("input_ids", "position_ids", "labels", "padding_mask")
    }
    return tensors | {"documents": DocumentLayout.from_lengths(batch.document_lengths, device)}


def agree(batches: Sequence[MicroBatch], stop_requested: bool, world: World) -> StepCounts:
    """Sum token counts over ranks, and learn whether any rank was asked to stop. A collective."""
    counts = torch.tensor(
        [
            sum(batch.num_trained_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_tokens > 0 for batch in batches),
            int(stop_requested),
        ],
        dtype=torch.int64,
        device=world.torch_device,
    )
    dist.all_reduce(counts)
    trained, tokens, micro_batches, stops = counts.tolist()
    return StepCounts(trained, tokens, micro_batches, stops > 0)


class Gate(Protocol):
    """Who may refuse a step before its update: by the global loss, or by the global gradient norm."""

    def refuses_loss(self, loss: float) -> bool: ...

    def refuses_norm(self, norm: float) -> bool: ...


def run_step(
    engine: Any,
    batches: Sequence[MicroBatch],
    counts: StepCounts,
    model: ModelConfig,
    max_norm: float,
    world: World,
    gate: Gate | None = None,
) -> StepOutcome:
    """Forward and backward over this rank's `batches`, then the optimizer step. A collective.

    The gradient is that of (sum of token losses over all ranks and micro-batches) / (their trained tokens),
    plus the router losses averaged over all micro-batches that hold a token. DeepSpeed averages gradients over
    ranks, hence the factor world.size.

    `gate` costs one more synchronisation. A loss that it refuses becomes NaN on every rank before the last
    backward pass, and such a step is skipped at every stage; engine/gradient_norm.py hands it the norm.
    """
    engine.train()
    device = world.torch_device
    skipped_before = engine.skipped_steps
    sums: Tensor | None = None
    norm, sound = float("nan"), True
    for index, batch in enumerate(batches):
        loss_sum, balance, z_loss, usage = engine(**model_inputs(batch, device))
        router_loss = model.router_aux_loss_coef * balance + model.router_z_loss_coef * z_loss
        total = world.size * (loss_sum / max(1, counts.trained_tokens) + router_loss / max(1, counts.micro_batches))
        if gate is not None and index == len(batches) - 1:
            so_far = loss_sum.detach().double() + (sums[0] if sums is not None else 0.0)
            dist.all_reduce(so_far)
            if gate.refuses_loss(float(so_far) / max(1, counts.trained_tokens)):
                total = total * float("nan")
        engine.backward(total, scale_wrt_gas=False)
        parts = torch.cat([torch.stack([loss_sum, balance, z_loss]).detach().double(), usage.double().flatten()])
        sums = parts if sums is None else sums + parts
        if index == len(batches) - 1 and not clips_by_itself(engine):
            norm, sound = clip_gradients(engine, max_norm, *([gate.refuses_norm] if gate is not None else []))
        engine.step()
    assert sums is not None
    dist.all_reduce(sums)
    if clips_by_itself(engine):
        norm = float(engine.get_global_grad_norm() or 0.0)
        sound = engine.skipped_steps == skipped_before
    units = max(1, counts.micro_batches)
    totals = sums.tolist()
    return StepOutcome(
        loss=totals[0] / max(1, counts.trained_tokens),
        load_balancing_loss=totals[1] / units,
        router_z_loss=totals[2] / units,
        expert_usage=_shares(totals[3:], model.num_experts),
        grad_norm=norm,
        skipped=not sound,
    )


def _shares(counts: list[float], num_experts: int) -> list[list[float]]:
    rows = [counts[start : start + num_experts] for start in range(0, len(counts), max(1, num_experts))]
    return [[count / max(1.0, sum(row)) for count in row] for row in rows]
