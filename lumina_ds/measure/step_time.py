"""Rates of this machine, measured by ranks that `lumina plan time --calibrate` starts: steps, a write, collectives."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine, release
from lumina_ds.engine.world import World
from lumina_ds.measure.memory import timed_step

_WRITTEN_BYTES = 1 << 27
_EXCHANGED_BYTES = 1 << 25


def measure_step_seconds(
    config: RunConfig, world: World, precision: str, deepspeed_json: Mapping[str, Any], steps: int = 4
) -> float:
    """Median seconds of an optimizer step with random tokens, after one that warms up. A collective."""
    engine = build_engine(config, world, precision, dict(deepspeed_json))
    seconds = [timed_step(engine, config, world) for _ in range(steps + 1)][1:]
    release(engine)
    return statistics.median(seconds)


def measure_bandwidths(folder: Path, world: World) -> dict[str, float | None]:
    """Bytes per second, of the slowest rank: `write` of all ranks together, each a file in `folder` with an fsync;
    `all_reduce` and `all_to_all` what one rank sends, None of one rank. A collective."""
    dist.barrier()
    slowest = _slowest(_written_seconds(folder), world)
    found: dict[str, float | None] = {"write": world.size * _WRITTEN_BYTES / slowest}
    if world.size == 1:
        return found | {"all_reduce": None, "all_to_all": None}
    sent = torch.zeros(_EXCHANGED_BYTES // 4 // world.size * world.size, device=world.torch_device)
    received = torch.empty_like(sent)
    share = sent.nbytes * (world.size - 1) / world.size
    found["all_reduce"] = 2 * share / _slowest(_repeated(lambda: dist.all_reduce(sent), world), world)
    exchange = _repeated(lambda: dist.all_to_all_single(received, sent), world)
    found["all_to_all"] = share / _slowest(exchange, world)
    return found


def _written_seconds(folder: Path) -> float:
    content = os.urandom(1 << 20)
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-speed-") as stream:
        for _ in range(_WRITTEN_BYTES >> 20):
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        return time.perf_counter() - begin


def _repeated(collective: Callable[[], Any], world: World, times: int = 5) -> float:
    """Median seconds of one call."""
    seconds = []
    for _ in range(times + 1):
        dist.barrier()
        begin = time.perf_counter()
        collective()
        if world.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _slowest(seconds: float, world: World) -> float:
    found = torch.tensor([seconds], dtype=torch.float64, device=world.torch_device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
