"""Ranks that measure: what `lumina plan verify` and `plan time --calibrate` start through the deepspeed runner.

A list of requests goes in and a list of results comes out, as JSON files, so that many configurations share a start.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lumina_ds.errors import ConfigError, MachineError, OutOfMemory

# Ranks of a CPU take turns; beyond this they mostly wait for each other.
_RANKS_PER_CORE = 4
_MODULE = "lumina_ds.cli.plan_measure"


def measure_on_ranks(requests: Sequence[dict[str, Any]], num_ranks: int) -> list[dict[str, Any]]:
    """Run every request (`config`, `precision`, `deepspeed`, and `measure`) on ranks of this machine.

    `measure` is memory (of the last of `steps`), or step_seconds, or bandwidths, which takes a `folder` and no configuration.
    A request that runs out of a GPU's memory has {"out_of_memory": true} for its result when there is one rank.
    Raises MachineError, or OutOfMemory, when the ranks end without results.
    """
    from lumina_ds.cli.launch import Signals, complete_runner_arguments, run_until_done, runner_command
    from lumina_ds.cli.train import rank_environment

    with tempfile.TemporaryDirectory(prefix="lumina-measure-") as folder:
        asked, answered = Path(folder, "requests.json"), Path(folder, "results.json")
        asked.write_text(json.dumps(list(requests)), encoding="utf-8")
        runner = complete_runner_arguments(["--num_gpus", str(num_ranks)])
        command = runner_command(runner, [str(asked), str(answered)], module=_MODULE)
        with Signals() as signals:
            code = run_until_done(command, rank_environment(), signals, output=sys.stderr).code
        if code == OutOfMemory.exit_code:
            raise OutOfMemory("a rank ran out of memory; use more ranks, a smaller --micro-batch or a smaller preset")
        if code or not answered.is_file():
            raise MachineError(f"the ranks ended with {code} before they had measured; their messages stand above")
        return list(json.loads(answered.read_text(encoding="utf-8")))


def check_ranks(num_ranks: int, device: str, peak_bytes: int) -> None:
    """Raise ConfigError where this machine has no room for ranks that peak at `peak_bytes` each."""
    import os

    from lumina_ds.engine.resources import num_local_gpus
    from lumina_ds.plan.hardware import GIB

    cores = os.cpu_count() or 1
    limit = num_local_gpus() if device == "cuda" else _RANKS_PER_CORE * cores
    if num_ranks > limit:
        have = f"{limit} GPUs" if device == "cuda" else f"{cores} CPU cores"
        raise ConfigError(f"--gpus {num_ranks} are more ranks than this machine with {have} runs; use at most {limit}")
    if device == "cpu":
        import psutil

        free = psutil.virtual_memory().available
        if num_ranks * peak_bytes > free:
            raise ConfigError(
                f"{num_ranks} ranks of {peak_bytes / GIB:.1f} GiB do not fit the {free / GIB:.1f} GiB that are free on "
                "this machine; use a smaller preset, fewer --gpus or a smaller --micro-batch"
            )


def _run_rank(asked: Path, answered: Path) -> None:
    from lumina_ds.engine.distributed import start, stop
    from lumina_ds.errors import LuminaError
    from lumina_ds.train.start import report_error

    code, clean, world = 1, False, None
    try:
        world = start()
        results = [_answer(request, world) for request in json.loads(asked.read_text(encoding="utf-8"))]
        if world.rank == 0:
            answered.write_text(json.dumps(results), encoding="utf-8")
        code, clean = 0, True
    except LuminaError as error:
        code = error.exit_code
        report_error(0 if world is None else world.rank, error)
    except BaseException as error:
        import traceback

        import torch

        code = OutOfMemory.exit_code if isinstance(error, torch.OutOfMemoryError) else 1
        print(traceback.format_exc(), file=sys.stderr)
    stop(code, clean)


def _answer(request: dict[str, Any], world: Any) -> dict[str, Any]:
    import torch

    from lumina_ds.config.schema import RunConfig
    from lumina_ds.train.measure import measure_memory
    from lumina_ds.train.measure_time import measure_bandwidths, measure_step_seconds

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


def _device(world: Any) -> str:
    import torch

    return torch.cuda.get_device_name() if world.device == "cuda" else "cpu"


if __name__ == "__main__":
    _run_rank(Path(sys.argv[-2]), Path(sys.argv[-1]))
