"""Ranks that measure: what `lumina plan verify` and `plan time --calibrate` start through the deepspeed runner.

A list of requests goes in and a list of results comes out, as JSON files, so that many configurations share a start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.config.schema import DeepSpeedConfig
from lumina_ds.errors import ConfigError, MachineError, OutOfMemory
from lumina_ds.ranks.ask import ask_ranks
from lumina_ds.text import counted, format_bytes

if TYPE_CHECKING:
    from lumina_ds.engine.world import World

# Ranks of a CPU take turns; beyond this they mostly wait for each other.
_RANKS_PER_CORE = 4
_MODULE = "lumina_ds.ranks.measure"


def measure_on_ranks(requests: Sequence[dict[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """Run every request (`config`, `precision`, `deepspeed`, and `measure`) on ranks of this machine.

    `measure` is memory (of the last of `steps`), or step_seconds, or bandwidths, which takes a `folder` and no configuration.
    A request that runs out of a GPU's memory has {"out_of_memory": true} for its result when there is one rank.
    Raises MachineError, or OutOfMemory, when the ranks end without results.
    """
    answers, code = ask_ranks(_MODULE, list(requests), ["--num_gpus", str(num_ranks)])
    if code == OutOfMemory.exit_code:
        raise OutOfMemory("a rank ran out of memory; use more ranks, a smaller --micro-batch or a smaller preset")
    if answers is None:
        raise MachineError(f"the ranks ended with {code} before they had measured; their messages stand above")
    return list(answers)


def check_ranks(num_ranks: int, device: str, peak_bytes: int) -> None:
    """Raise ConfigError where this machine has no room for ranks that peak at `peak_bytes` each."""
    import os

    from lumina_ds.engine.resources import num_local_gpus

    cores = os.cpu_count() or 1
    limit = num_local_gpus() if device == "cuda" else _RANKS_PER_CORE * cores
    if num_ranks > limit:
        have = counted(limit, "GPU") if device == "cuda" else counted(cores, "CPU core")
        raise ConfigError(f"--gpus {num_ranks} are more ranks than this machine with {have} runs; use at most {limit}")
    if device == "cpu":
        import psutil

        free = psutil.virtual_memory().available
        if num_ranks * peak_bytes > free:
            raise ConfigError(
                f"{counted(num_ranks, 'rank')} of {format_bytes(peak_bytes)} do not fit the {format_bytes(free)} that are free on "
                "this machine; use a smaller preset, fewer --gpus or a smaller --micro-batch"
            )


def main() -> None:
    """Entry point of a rank: the runner gives two files after its own --local_rank."""
    from lumina_ds.train.start import run_as_rank

    asked, answered = (Path(word) for word in sys.argv[-2:])

    def body(world: World) -> None:
        results = [_answer(request, world) for request in json.loads(asked.read_text(encoding="utf-8"))]
        if world.rank == 0:
            answered.write_text(json.dumps(results), encoding="utf-8")

    run_as_rank(body, DeepSpeedConfig().rendezvous_seconds)


def _answer(request: dict[str, Any], world: World) -> dict[str, Any]:
    import torch

    from lumina_ds.config.schema import RunConfig
    from lumina_ds.measure.memory import measure_memory
    from lumina_ds.measure.step_time import measure_bandwidths, measure_step_seconds

    if request.get("measure") == "bandwidths":
        memory = torch.cuda.mem_get_info()[1] if world.device == "cuda" else 0
        return measure_bandwidths(Path(request["folder"]), world) | {"device": _device(world), "device_bytes": memory}
    config = RunConfig.model_validate(request["config"])
    asked = (config, world, request["precision"], request["deepspeed"])
    try:
        if request.get("measure") == "step_seconds":
            return {"seconds": measure_step_seconds(*asked)}
        return measure_memory(*asked, steps=request.get("steps", 3)) | {"device": _device(world)}
    except torch.OutOfMemoryError:
        # Of several ranks the others would wait for this one for ever.
        if world.size > 1:
            raise
        torch.cuda.empty_cache()
        return {"out_of_memory": True, "device": _device(world)}


def _device(world: World) -> str:
    import torch

    return torch.cuda.get_device_name() if world.device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
