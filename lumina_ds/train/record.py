"""One step as a record of metrics.jsonl."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lumina_ds.engine.schedules import learning_rate
from lumina_ds.engine.world import World
from lumina_ds.train.evaluate import perplexity
from lumina_ds.train.step import StepCounts, StepOutcome

if TYPE_CHECKING:
    from lumina_ds.train.run import TrainingRun


def step_record(
    run: TrainingRun,
    outcome: StepOutcome,
    counts: StepCounts,
    seconds: float,
    data_seconds: float,
    anomaly_score: float,
) -> dict[str, Any]:
    """Of the step just done, which took `seconds`, `data_seconds` of them waiting for its rows."""
    step, positions = run.progress.step, run.order.num_positions
    return {
        "step": step,
        "time": time.time(),
        "epoch": run.order.epoch_at(min(step * run.batch_rows, positions or sys.maxsize)),
        "loss": outcome.loss,
        "perplexity": perplexity(outcome.loss),
        "learning_rate": learning_rate(step - 1, run.num_steps, run.config.train),
        "grad_norm": outcome.grad_norm,
        "load_balancing_loss": outcome.load_balancing_loss,
        "router_z_loss": outcome.router_z_loss,
        "tokens": run.progress.tokens,
        "trained_tokens": counts.trained_tokens,
        "step_seconds": seconds,
        "tokens_per_second": counts.tokens / seconds,
        "data_seconds": data_seconds,
        "memory_bytes": memory_bytes(run.world),
        "skipped": run.progress.skipped,
        "anomaly_score": anomaly_score,
        **run.watchdog.metrics,
        **outcome.routing.record(overflows=run.config.model.overflow_policy != "dropless"),
    }


def step_samples(run: TrainingRun) -> list[int]:
    """Packed rows of the step just done, all ranks together; a pure function of the step, so nothing is sent."""
    first = (run.progress.step - 1) * run.batch_rows
    return [run.order.row_at(position) for position in range(first, first + run.batch_rows)]


def memory_bytes(world: World) -> int:
    """Peak memory allocated on the card, or the resident memory of this process on a CPU."""
    if world.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
