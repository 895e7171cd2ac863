"""Many measurements on one start of ranks: what `lumina plan verify` and `plan time --calibrate` ask for."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import MachineError, OutOfMemory
from lumina_ds.ranks.ask import Question, ask_ranks

if TYPE_CHECKING:
    from lumina_ds.engine.world import World


def measure_on_ranks(requests: Sequence[dict[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """Run every request (`config`, `precision`, `deepspeed`, and `measure`) on ranks of this machine.

    `measure` is memory (of the last of `steps`), or step_seconds, or bandwidths, which takes a `folder` and no configuration.
    A request that runs out of a GPU's memory has {"out_of_memory": true} for its result when there is one rank.
    Raises MachineError, or OutOfMemory, when the ranks end without results.
    """
    question = Question("lumina_ds.measure.requests.answer_requests", {"requests": list(requests)})
    answers, code = ask_ranks(question, ["--num_gpus", str(num_ranks)])
    if code == OutOfMemory.exit_code:
        raise OutOfMemory("a rank ran out of memory; use more ranks, a smaller --micro-batch or a smaller preset")
    if answers is None:
        raise MachineError(f"the ranks ended with {code} before they had measured; their messages stand above")
    return list(answers)


def answer_requests(requests: Sequence[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    """What the ranks do for `measure_on_ranks`. A collective."""
    # Each measurement collects what the one before has left: not among all that was imported, half a second each time.
    gc.collect()
    gc.freeze()
    return [_answer(request, world) for request in requests]


def _answer(request: dict[str, Any], world: World) -> dict[str, Any]:
    import torch

    from lumina_ds.measure.machine import device_name, measure_bandwidths
    from lumina_ds.measure.memory import measure_memory
    from lumina_ds.measure.steps import measure_step_seconds

    if request.get("measure") == "bandwidths":
        memory = torch.cuda.mem_get_info()[1] if world.device == "cuda" else 0
        found = measure_bandwidths(Path(request["folder"]), world)
        return found | {"device": device_name(world), "device_bytes": memory}
    asked = (RunConfig.model_validate(request["config"]), world, request["precision"], request["deepspeed"])
    try:
        if request.get("measure") == "step_seconds":
            return {"seconds": measure_step_seconds(*asked)}
        return measure_memory(*asked, steps=request.get("steps", 3)) | {"device": device_name(world)}
    except torch.OutOfMemoryError:
        # Of several ranks the others would wait for this one for ever.
        if world.size > 1:
            raise
        torch.cuda.empty_cache()
        return {"out_of_memory": True, "device": device_name(world)}
