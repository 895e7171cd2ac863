"""One optimizer step: several micro-batches, one loss divided by the global number of trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.engine.build import clip_gradients, clips_by_itself
from lumina_ds.engine.world import World
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.balancing import capacity_factors, update_balance
from lumina_ds.train.routing import RoutingMetrics, RoutingTotals, noise_seeds


@dataclass(frozen=True)
class StepCounts:
    """What all ranks together bring to a step."""

    trained_tokens: int
    tokens: int
    stop_requested: bool
    save_due: bool
    failed: bool
    slow: bool = False
    labels_by_source: tuple[int, ...] = ()  # label tokens of each source of a mixture


@dataclass(frozen=True)
class StepOutcome:
    """Losses are global means of this step."""

    loss: float
    load_balancing_loss: float
    router_z_loss: float
    routing: RoutingMetrics
    grad_norm: float
    skipped: bool
    losses_by_source: tuple[float, ...] = ()  # sums over the label tokens of each source of a mixture


class Rows(Protocol):
    """Packed rows by number: of a shard folder, or made up."""

    def collate(self, row_ids: Sequence[int]) -> MicroBatch: ...


def rank_micro_batches(
    config: RunConfig, rows: Rows, order: TrainingOrder, step: int, world: World
) -> list[MicroBatch]:
    """A rank's part of a step, counted from 0: a micro-batch per accumulation step."""
    train, share = config.train, world.share
    batches = []
    for index in range(train.gradient_accumulation_steps):
        row_ids = order.step_rows(
            step, index, share.rank, share.size, train.micro_batch_size, train.gradient_accumulation_steps
        )
        batch = rows.collate(row_ids)
        seeds = noise_seeds(config.model, train.seed, step, batch.row_ids)
        batches.append(share.cut(batch if seeds is None else replace(batch, row_seeds=seeds)))
    return batches


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Any]:
    """The model's keyword arguments for one micro-batch, on `device`."""
    tensors = {
        name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True)
        for name in ("input_ids", "position_ids", "labels", "padding_mask")
    }
    inputs: dict[str, Any] = tensors | {"documents": DocumentLayout.from_lengths(batch.document_lengths, device)}
    if batch.row_seeds is not None:
        inputs["row_seeds"] = batch.row_seeds
    if batch.row_sources is not None:
        inputs["row_groups"] = torch.tensor(batch.row_sources, device=device)
        inputs["num_groups"] = batch.num_sources
    return inputs


def agree(
    batches: Sequence[MicroBatch],
    stop_requested: bool,
    world: World,
    save_due: bool = False,
    failed: bool = False,
    slow: bool = False,
    num_sources: int = 0,
) -> StepCounts:
    """Sum token counts over ranks, and learn whether any was asked to stop, finds a save due, has failed, or is slow.

    A collective: `num_sources` is that of the run, also on a rank without a batch.
    """
    labels_by_source = [sum(batch.labels_by_source[number] for batch in batches) for number in range(num_sources)]
    counts = torch.tensor(
        [
            sum(batch.num_trained_tokens for batch in batches),
            sum(batch.num_tokens for batch in batches),
            int(stop_requested),
            int(save_due),
            int(failed),
            int(slow),
            *labels_by_source,
        ],
        dtype=torch.int64,
        device=world.torch_device,
    )
    dist.all_reduce(counts)
    trained, tokens, *rest = counts.tolist()
    stop, save, fail, is_slow = (flag > 0 for flag in rest[:4])
    return StepCounts(trained, tokens, stop, save, fail, is_slow, labels_by_source=tuple(rest[4:]))


def any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is set on any rank. A collective, and on a card a synchronisation."""
    flags = torch.tensor(int(flag), device=world.torch_device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


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
    between_batches: Callable[[], None] = lambda: None,
    before_update: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Forward and backward over this rank's `batches`, then the optimizer step. A collective.

    The gradient is that of (sum of token losses over all ranks and micro-batches) / (their trained tokens), plus the
    router losses, summed and divided by all tokens in the same way. DeepSpeed averages gradients over ranks, hence the
    factor world.size. A sound step also updates what the routers learn outside the optimizer.

    `gate` costs one more synchronisation. A loss that it refuses becomes NaN on every rank before the last
    backward pass, and such a step is skipped at every stage; engine/deepspeed/gradient_norm.py hands it the norm.

    Parameters and optimizer stay as before the step until `before_update` is called, so a step that `between_batches`
    gives up, by raising on all ranks alike, leaves a state that can be saved.
    """
    engine.train()
    device = world.torch_device
    skipped_before = engine.skipped_steps
    sums: Tensor | None = None
    norm, sound = float("nan"), True
    for index, batch in enumerate(batches):
        if index:
            between_batches()
        loss_sum, balance_sum, z_sum, measured, *by_source = engine(**model_inputs(batch, device))
        router_loss = model.router_aux_loss_coef * balance_sum + model.router_z_loss_coef * z_sum
        total = world.size * (loss_sum / max(1, counts.trained_tokens) + router_loss / max(1, counts.tokens))
        if gate is not None and index == len(batches) - 1:
            so_far = loss_sum.detach().double() + (sums[0] if sums is not None else 0.0)
            dist.all_reduce(so_far)
            if gate.refuses_loss(float(so_far) / max(1, counts.trained_tokens)):
                total = total * float("nan")
        engine.backward(total, scale_wrt_gas=False)
        parts = torch.cat([torch.stack([loss_sum, z_sum]).detach().double(), *by_source, measured.double().flatten()])
        sums = parts if sums is None else sums + parts
        if index == len(batches) - 1 and not clips_by_itself(engine):
            norm, sound = clip_gradients(engine, max_norm, *([gate.refuses_norm] if gate is not None else []))
        if index == len(batches) - 1:
            before_update()
        engine.step()
    assert sums is not None
    dist.all_reduce(sums)
    if clips_by_itself(engine):
        sound = engine.skipped_steps == skipped_before
    first = 2 + batches[0].num_sources
    if sound and model.num_experts:
        on_device = RoutingTotals(sums[first:].view(measured.shape), model.num_experts)
        update_balance(engine.module, on_device.assignments_LE, on_device.overflow_L)
    reported = engine.get_global_grad_norm() if clips_by_itself(engine) else norm
    totals, norm = _read(sums, 0.0 if reported is None else reported)
    routing = RoutingTotals(totals[first:].view(measured.shape), model.num_experts)
    return StepOutcome(
        loss=float(totals[0]) / max(1, counts.trained_tokens),
        load_balancing_loss=routing.load_balancing_loss,
        router_z_loss=float(totals[1]) / max(1, counts.tokens),
        routing=routing.metrics(capacity_factors(engine.module)),
        grad_norm=norm,
        skipped=not sound,
        losses_by_source=tuple(totals[2:first].tolist()),
    )


def _read(sums: Tensor, norm: Tensor | float) -> tuple[Tensor, float]:
    """Sums and gradient norm on the host: the one time after the update that it waits for the device.

    DeepSpeed itself waits for the norm in every step, before the update (stage_1_and_2.py, stage3.py: step).
    """
    if isinstance(norm, Tensor) and norm.device == sums.device:
        read = torch.cat([sums, norm.detach().double().reshape(1)]).cpu()
        return read[:-1], float(read[-1])
    return sums.cpu(), float(norm)


def peak_memory(world: World) -> int:
    """Peak bytes allocated on the card, or the resident memory of this process on a CPU."""
    if world.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
