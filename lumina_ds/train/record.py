"""What the loop knows of the step just done, as the metrics take it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import TrainingOrder
from lumina_ds.engine.schedules import learning_rate
from lumina_ds.engine.world import World
from lumina_ds.monitor.metrics import StepFacts
from lumina_ds.train.step import StepCounts, StepOutcome


def step_facts(
    config: RunConfig,
    world: World,
    order: TrainingOrder,
    batch_rows: int,
    num_steps: int,
    *,
    step: int,
    tokens: int,
    skipped: int,
    outcome: StepOutcome,
    counts: StepCounts,
    seconds: float,
    data_seconds: float,
    anomaly_score: float,
    machine: Mapping[str, Any],
) -> StepFacts:
    """Of step number `step`, which took `seconds`; `tokens` and `skipped` are those of the run so far."""
    return StepFacts(
        step=step,
        time=time.time(),
        epoch=order.epoch_at(min(step * batch_rows, order.num_positions or sys.maxsize)),
        tokens=tokens,
        skipped=skipped,
        learning_rate=learning_rate(step - 1, num_steps, config.train),
        seconds=seconds,
        data_seconds=data_seconds,
        memory_bytes=memory_bytes(world),
        anomaly_score=anomaly_score,
        counts=counts,
        outcome=outcome,
        config=config,
        machine=machine,
        samples=step_samples(order, step, batch_rows) if config.run.record_samples else None,
    )


def step_samples(order: TrainingOrder, step: int, batch_rows: int) -> list[int]:
    """Packed rows of a step, all ranks together; a pure function of the step, so nothing is sent."""
    first = (step - 1) * batch_rows
    return [order.row_at(position) for position in range(first, first + batch_rows)]


def memory_bytes(world: World) -> int:
    """Peak memory allocated on the card, or the resident memory of this process on a CPU."""
    if world.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
