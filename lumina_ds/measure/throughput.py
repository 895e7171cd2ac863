"""Speed of training: what a row of `lumina bench train` says."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import World
from lumina_ds.measure.machine import device_name, peak_flops
from lumina_ds.measure.steps import StepTime, TimedSteps, open_rows, peak_memory
from lumina_ds.plan.flops import flops_per_token


def measure_throughput(config: RunConfig, world: World, num_steps: int, num_warmup: int) -> dict[str, Any]:
    """Median and spread of `num_steps` steps after `num_warmup`, tokens per second, MFU, memory. A collective.

    `tokens_per_second` counts all ranks, without padding, over the whole time measured; `mfu` is its share of
    `peak_flops`, by the FLOPs of lumina_ds/plan/flops.py. `peak_bytes` is the fullest rank's.
    """
    with TimedSteps(config, open_rows(config), world) as steps:
        for _ in range(num_warmup):
            steps.take()
        if world.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = [steps.take() for _ in range(num_steps)]
        peak_bytes = peak_memory(world)
        precision, stage = steps.precision, steps.deepspeed_json["zero_optimization"]["stage"]
    flops, source = peak_flops(world, precision)
    speed = sum(step.tokens for step in taken) / sum(step.seconds for step in taken)
    train = config.train
    return {
        "device": device_name(world),
        "world_size": world.size,
        "precision": precision,
        "zero_stage": stage,
        "expert_parallel_size": config.deepspeed.expert_parallel_size,
        "micro_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "seq_length": config.seq_length,
        "data": config.data.shards or "random tokens",
        "warmup_steps": num_warmup,
        "steps": num_steps,
        "step_seconds": spread([step.seconds for step in taken]),
        "data_share": sum(step.data_seconds for step in taken) / sum(step.seconds for step in taken),
        "tokens_per_step": taken[0].tokens,
        "tokens_per_second": speed,
        "flops_per_token": flops_per_token(config.model, config.seq_length),
        "peak_flops": flops,
        "peak_flops_of": source,
        "mfu": flops_per_token(config.model, config.seq_length) * speed / (flops * world.size),
        "peak_bytes": peak_bytes,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, least and most."""
    if len(values) == 1:
        values = values * 2
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": statistics.median(values),
        "p10": deciles[0],
        "p90": deciles[-1],
        "min": min(values),
        "max": max(values),
    }


def median_seconds(taken: list[StepTime]) -> float:
    return statistics.median(step.seconds for step in taken)
