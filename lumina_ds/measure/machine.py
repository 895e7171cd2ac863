"""What this machine can do, measured on ranks: products of matrices, writes to its disk, collectives."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lumina_ds.engine.world import World
from lumina_ds.measure.steps import over_ranks
from lumina_ds.plan.hardware import card_of_device

_WRITTEN_BYTES = 1 << 27
_EXCHANGED_BYTES = 1 << 25


def device_name(world: World) -> str:
    """The card as its driver calls it, or cpu."""
    return torch.cuda.get_device_name() if world.device == "cuda" else "cpu"


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


def measure_bandwidths(folder: Path, world: World) -> dict[str, float | None]:
    """Bytes per second, of the slowest rank: `write` of all ranks together, each a file in `folder` with an fsync;
    `all_reduce` and `all_to_all` what one rank sends, None of one rank. A collective."""
    dist.barrier()
    slowest = over_ranks(_written_seconds(folder), world, dist.ReduceOp.MAX)
    found: dict[str, float | None] = {"write": world.size * _WRITTEN_BYTES / slowest}
    if world.size == 1:
        return found | {"all_reduce": None, "all_to_all": None}
    sent = torch.zeros(_EXCHANGED_BYTES // 4 // world.size * world.size, device=world.torch_device)
    received = torch.empty_like(sent)
    share = sent.nbytes * (world.size - 1) / world.size
    reduction = _seconds_of_call(lambda: dist.all_reduce(sent), world)
    exchange = _seconds_of_call(lambda: dist.all_to_all_single(received, sent), world)
    found["all_reduce"] = 2 * share / over_ranks(reduction, world, dist.ReduceOp.MAX)
    found["all_to_all"] = share / over_ranks(exchange, world, dist.ReduceOp.MAX)
    return found


def _seconds_of_product(operand: torch.Tensor, world: World) -> float:
    dist.barrier()
    if world.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    operand @ operand
    if world.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _written_seconds(folder: Path) -> float:
    content = os.urandom(1 << 20)
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-speed-") as stream:
        for _ in range(_WRITTEN_BYTES >> 20):
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        return time.perf_counter() - begin


def _seconds_of_call(collective: Callable[[], Any], world: World, times: int = 5) -> float:
    """The median of some, after one that warms up."""
    seconds = []
    for _ in range(times + 1):
        dist.barrier()
        begin = time.perf_counter()
        collective()
        if world.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
