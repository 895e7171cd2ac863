"""Where the time and the memory of training steps go: what `lumina profile` says.

Some plain steps give times and memory, and as many under torch.profiler give the shares of the parts. A part is a
range of ours: a phase of the step, a module's forward call, or a collective. Work of the backward pass belongs to the
part whose forward call made it (autograd numbers both alike).
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.deepspeed.phases import around_collectives, around_phases
from lumina_ds.engine.world import World
from lumina_ds.measure.live_tensors import (
    gradient_tensors,
    master_tensors,
    moment_tensors,
    num_bytes,
    parameter_tensors,
)
from lumina_ds.measure.machine import device_name
from lumina_ds.measure.steps import PART, TimedSteps, open_rows, over_ranks
from lumina_ds.measure.throughput import median_seconds

PHASE = "lumina phase "
_BACKWARD_NODE = "autograd::engine::evaluate_function: "
_OTHER = "other"
# DeepSpeed's hooks on parameters run inside these nodes: it keeps, buckets and reduces the gradients there.
_ACCUMULATE = "gradients"

# What the engine's phases are called here.
_PHASES = {"forward": "forward", "backward": "backward", "step": "optimizer"}
# Parts of the model by the last word of a module's name; an MoE block's own share is moving tokens to experts.
PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared experts",
    "lm_head": "head and loss",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
}

Place = tuple[str, str]


def profile_steps(
    config: RunConfig, world: World, num_steps: int, num_warmup: int, trace: str | None, snapshot: str | None
) -> dict[str, Any]:
    """Time by phase and part, and memory by component and phase, of rank 0. A collective.

    The times of the parts add up to `profiled_step_seconds`, a mean; `step_seconds` is the median of plain steps.

    `trace` is a file for Chrome's trace of the profiled steps, `snapshot` one for torch's memory snapshot of the
    plain ones, which only a GPU's allocator has.
    """
    with TimedSteps(config, open_rows(config), world) as steps:
        for _ in range(max(1, num_warmup)):
            steps.take()
        memory = _Memory(steps)
        with _snapshot(snapshot), around_phases(steps.engine, lambda phase: memory.phase(_PHASES[phase])):
            plain = [steps.take() for _ in range(num_steps)]
        found = memory.read()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device == "cuda")
        with _ranges(steps.engine):
            steps.take()
            with torch.profiler.profile(activities=activities) as profile:
                profiled = [steps.take() for _ in range(num_steps)]
        precision, stage = steps.precision, steps.deepspeed_json["zero_optimization"]["stage"]
    if trace is not None and world.rank == 0:
        _write_trace(profile, Path(trace))
    return {
        "device": device_name(world),
        "world_size": world.size,
        "precision": precision,
        "zero_stage": stage,
        "expert_parallel_size": config.deepspeed.expert_parallel_size,
        "steps": num_steps,
        "step_seconds": median_seconds(plain),
        "profiled_step_seconds": sum(step.seconds for step in profiled) / num_steps,
        "data_seconds": sum(step.data_seconds for step in plain) / num_steps,
        "time": time_by_part(profile, num_steps, world.device, sum(step.seconds for step in profiled)),
        "memory": {
            **found,
            "peak_bytes_of_fullest_rank": int(over_ranks(found["peak_bytes"], world, dist.ReduceOp.MAX)),
        },
    }


def time_by_part(
    profile: torch.profiler.profile, num_steps: int, device: str, total_seconds: float
) -> list[dict[str, Any]]:
    """Seconds of one step by `phase` and `part`, longest first; what lies between the phases is phase "between".

    On a GPU the time of kernels, of which those of several streams overlap, and `idle`, when the wall clock has more;
    on a CPU the time of this rank's own threads, waiting for other ranks included.
    """
    events = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CPU]
    places = _places(events)
    seconds: defaultdict[Place, float] = defaultdict(float)
    for event in events:
        if device == "cuda":
            ours = event.name.startswith((PHASE, PART))
            spent = 0.0 if ours else sum(kernel.duration for kernel in event.kernels)
        else:
            spent = event.self_cpu_time_total
        seconds[places[event.id]] += spent / 1e6 / num_steps
    idle = total_seconds / num_steps - sum(seconds.values())
    if idle > 0:
        seconds["between", "idle" if device == "cuda" else _OTHER] += idle
    rows = sorted(seconds.items(), key=lambda item: -item[1])
    return [{"phase": phase, "part": part, "seconds": spent} for (phase, part), spent in rows if spent > 0]


def _places(events: list[Any]) -> dict[int, Place]:
    """Phase and part of every event, by its id: of the nearest range around it, or of its forward call."""
    in_order = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    places: dict[int, Place] = {}
    made_by: dict[int, str] = {}
    for event in in_order:
        phase, part = places[event.cpu_parent.id] if event.cpu_parent is not None else ("between", _OTHER)
        if event.name.startswith(PHASE):
            phase, part = event.name.removeprefix(PHASE), _OTHER
        elif event.name.startswith(PART):
            part = event.name.removeprefix(PART)
        elif event.name.startswith(_BACKWARD_NODE):
            # On a GPU autograd has a thread of its own, outside of our range.
            phase = "backward"
            part = _ACCUMULATE if "AccumulateGrad" in event.name else made_by.get(event.sequence_nr, part)
        elif event.sequence_nr >= 0:
            # The last operation that carries a number is the one that made the node; recomputed ones count too.
            made_by[event.sequence_nr] = part
        places[event.id] = phase, part
    return places


class _Memory:
    """Live tensors by component, and the most that a phase held: of the allocator on a GPU, resident on a CPU."""

    def __init__(self, steps: TimedSteps) -> None:
        self.engine, self.device = steps.engine, steps.world.device
        self.phases: dict[str, int] = {}
        self.gradients = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "optimizer":
            self.gradients = max(self.gradients, num_bytes(gradient_tensors(self.engine)))
        _restart_peak(self.device)
        yield
        self.phases[name] = max(self.phases.get(name, 0), _peak(self.device))

    def read(self) -> dict[str, Any]:
        optimizer = self.engine.optimizer
        return {
            "measure": "allocated by torch" if self.device == "cuda" else "resident in this process",
            "components": {
                "parameters": num_bytes(parameter_tensors(self.engine)),
                "master weights": num_bytes(master_tensors(optimizer)),
                "moments": num_bytes(moment_tensors(optimizer)),
                "gradients": self.gradients,
            },
            "peak_by_phase": self.phases,
            "peak_bytes": max(self.phases.values()),
        }


def _restart_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        # Linux: 5 sets the peak of the resident memory back to what it is now (man 5 proc, clear_refs).
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def _ranges(engine: Any) -> Iterator[None]:
    """Named ranges around phases, modules and collectives."""
    hooks: list[Any] = []
    for name, module in engine.module.named_modules():
        part = PARTS.get(name.rpartition(".")[2])
        if name.endswith(".mlp"):
            part = "dispatch and combine" if hasattr(module, "experts") else "feed-forward"
        if part is not None:
            hooks += _range_of(module, part)
    with (
        around_phases(engine, lambda phase: record_function(PHASE + _PHASES[phase])),
        around_collectives(lambda: record_function(PART + "communication")),
    ):
        yield
    for hook in hooks:
        hook.remove()


def _range_of(module: torch.nn.Module, part: str) -> tuple[Any, Any]:
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(PART + part))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)


@contextlib.contextmanager
def _snapshot(path: str | None) -> Iterator[None]:
    """torch's record of a GPU's allocations, for https://pytorch.org/memory_viz."""
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    yield
    if int(os.environ.get("RANK", "0")) == 0:
        torch.cuda.memory._dump_snapshot(path)
    torch.cuda.memory._record_memory_history(enabled=None)


def _write_trace(profile: torch.profiler.profile, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    profile.export_chrome_trace(str(partial))
    os.replace(partial, path)
