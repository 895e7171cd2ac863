"""Speed of training: what a row of `lumina bench train` says."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import World
from lumina_ds.measure.steps import StepTime, TimedSteps, open_rows, over_ranks, peak_memory
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.hardware import card_of_device


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
        "device": torch.cuda.get_device_name() if world.device == "cuda" else "cpu",
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


def peak_flops(world: World, precision: str) -> tuple[float, str]:
    """FLOP/s that a rank could reach, and where that is from. A collective.

    The maker's dense 16-bit rate where the card is known and computes in 16 bits; elsewhere the best of some large
    matrix products of this precision, all ranks at the same time, which share a CPU's cores.
    """
    if world.device == "cuda" and precision != "fp32":
        card = card_of_device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
        if card is not None:
            return card.tflops * 1e12, f"data sheet of {card.name}"
    width = 8192 if world.device == "cuda" else 1024
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    operand = torch.ones(width, width, dtype=dtype, device=world.torch_device)
    best = min(_seconds_of_product(operand, world) for _ in range(6))
    mean = over_ranks(best, world, dist.ReduceOp.SUM) / world.size
    return 2 * width**3 / mean, f"a matrix product of {width} in {str(dtype).removeprefix('torch.')} here"


def _seconds_of_product(operand: torch.Tensor, world: World) -> float:
    dist.barrier()
    if world.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    operand @ operand
    if world.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
