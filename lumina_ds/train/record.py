"""One step as a record of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from lumina_ds.engine.world import World
from lumina_ds.train.evaluate import perplexity
from lumina_ds.train.step import StepCounts, StepOutcome


def step_record(
    outcome: StepOutcome,
    counts: StepCounts,
    *,
    step: int,
    epoch: float,
    learning_rate: float,
    tokens: int,
    skipped: int,
    seconds: float,
    data_seconds: float,
    anomaly_score: float,
    memory_bytes: int,
    machine: Mapping[str, Any],
    overflows: bool,
) -> dict[str, Any]:
    """The step just done, which took `seconds`, `data_seconds` of them waiting for its rows.

    `tokens` and `skipped` count from the run's start, `epoch` the passes over the data up to here; `machine` is what the
    watchdog measured; `overflows` says whether the routers have a capacity at all.
    """
    return {
        "step": step,
        "time": time.time(),
        "epoch": epoch,
        "loss": outcome.loss,
        "perplexity": perplexity(outcome.loss),
        "learning_rate": learning_rate,
        "grad_norm": outcome.grad_norm,
        "load_balancing_loss": outcome.load_balancing_loss,
        "router_z_loss": outcome.router_z_loss,
        "tokens": tokens,
        "trained_tokens": counts.trained_tokens,
        "step_seconds": seconds,
        "tokens_per_second": counts.tokens / seconds,
        "data_seconds": data_seconds,
        "memory_bytes": memory_bytes,
        "skipped": skipped,
        "anomaly_score": anomaly_score,
        **machine,
        **outcome.routing.record(overflows=overflows),
    }


def peak_memory(world: World) -> int:
    """Peak bytes allocated on the card, or the resident memory of this process on a CPU."""
    if world.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
