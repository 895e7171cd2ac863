"""Real steps of a configuration on this machine, with random tokens: what they take in memory.

The measured side of `lumina plan verify`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine, release
from lumina_ds.engine.deepspeed.expert_parallel import autoep_layers
from lumina_ds.engine.deepspeed.linear import own_linear
from lumina_ds.engine.deepspeed.phases import wrap_phases
from lumina_ds.engine.world import World
from lumina_ds.measure.allocations import marked_record
from lumina_ds.measure.live_tensors import (
    gradient_tensors,
    master_tensors,
    moment_tensors,
    num_bytes,
    parameter_tensors,
)
from lumina_ds.measure.steps import timed_step


def measure_memory(
    config: RunConfig, world: World, precision: str, deepspeed_json: Mapping[str, Any], steps: int = 3
) -> dict[str, Any]:
    """Bytes of the last of `steps` steps, the fullest rank's. A collective.

    `components` are live tensors, `activations` what the forward pass of the decoder leaves behind (gathered and cast
    parameters included), `peaks` the most that was alive in each phase, and `seconds` the steps' times. The forward
    phase ends where the gradient leaves the head, as in lumina_ds/plan/memory.py.
    """
    with marked_record(world.device) as marks, own_linear():
        engine = build_engine(config, world, precision, dict(deepspeed_json))
        components: dict[str, int] = {}
        wrap_phases(engine, lambda run, phase: _in_phase(run, phase, marks, engine, components))
        seconds = []
        hooks = [engine.module.model.register_forward_hook(lambda _, __, out: _watch_head(out[0], marks))]
        loads: list[list[int]] = []
        for layer in autoep_layers(engine.module):
            hooks.append(layer.experts.register_forward_pre_hook(lambda _, given: loads.append(given[1].tolist())))
        for _ in range(steps):
            # DeepSpeed's set-up leaves cycles behind, which would be counted until Python comes by.
            gc.collect()
            marks.restart()
            loads.clear()
            seconds.append(timed_step(engine, config, world))
        for hook in hooks:
            hook.remove()
        components |= {
            "parameters": num_bytes(parameter_tensors(engine)),
            "master weights": num_bytes(master_tensors(engine.optimizer)),
            "moments": num_bytes(moment_tensors(engine.optimizer)),
        }
    release(engine)
    live, peaks = marks.read()
    measured = {
        "components": components,
        "activations": live["decoder done"] - live["forward"],
        "expert_load": _load(loads, config),
        "peaks": {
            "forward": max(peaks["forward"], peaks["decoder done"]),
            "backward": peaks["backward"],
            "step": peaks["step"],
        },
    }
    return _fullest(measured, world) | {"seconds": seconds}


def _load(loads: list[list[int]], config: RunConfig) -> dict[str, float]:
    """Rows of this rank's experts over an even share, of all layers together, and those of the busiest expert where the
    backward pass may be highest: in the last layer, or in any where it recomputes whole blocks."""
    if not loads:
        return {}
    tokens = config.train.micro_batch_size * config.seq_length
    even = tokens * config.model.num_experts_per_tok
    layers = sum(config.model.is_moe_layer(layer) for layer in range(config.model.num_hidden_layers))
    counted = loads[:layers] if config.train.activation_checkpointing == "full" else loads[layers - 1 : layers]
    busiest = max(max(counts) for counts in counted)
    mean = sum(sum(counts) for counts in loads) / len(loads)
    return {"rank": mean / even, "expert": busiest * len(loads[0]) / even}


def _in_phase(
    run: Callable[..., Any], phase: str, marks: Any, engine: Any, components: dict[str, int]
) -> Callable[..., Any]:
    """`run` with a mark before it; the mark after it ends what the phase is charged for."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        if phase == "step":
            components["gradients"] = num_bytes(gradient_tensors(engine))
        # The backward phase begins where the head's gradient is done.
        if phase != "backward":
            marks.mark(phase)
        result = run(*args, **kwargs)
        marks.mark(f"after {phase}") if phase != "forward" else None
        return result

    return marked


def _watch_head(hidden: torch.Tensor, marks: Any) -> None:
    """Marks at the decoder's end and where the gradient comes back to it."""
    marks.mark("decoder done")
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: marks.mark("backward"))


def _fullest(measured: dict[str, Any], world: World) -> dict[str, Any]:
    """Each figure of the rank where it is largest."""
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, measured)
    return {
        name: max(each[name] for each in found)
        if isinstance(value, int)
        else {key: max(each[name][key] for each in found) for key in value}
        for name, value in measured.items()
    }
