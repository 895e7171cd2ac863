"""Real steps of a configuration on this machine, with random tokens: what they take in memory.

The measured side of `lumina plan verify`. On a GPU memory is the caching
allocator's; on a CPU torch's profiler reports every allocation, from which live bytes and peaks follow.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._profiler import _EventType

from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import MicroBatch
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.deepspeed.expert_parallel import autoep_layers
from lumina_ds.engine.deepspeed.linear import own_linear
from lumina_ds.engine.deepspeed.phases import wrap_phases
from lumina_ds.engine.deepspeed.waited_collectives import waited_collectives
from lumina_ds.engine.world import World
from lumina_ds.measure.live_tensors import (
    gradient_tensors,
    master_tensors,
    moment_tensors,
    num_bytes,
    parameter_tensors,
)
from lumina_ds.train.step import StepCounts, run_step

_PREFIX = "lumina memory mark "


def measure_memory(
    config: RunConfig, world: World, precision: str, deepspeed_json: Mapping[str, Any], steps: int = 3
) -> dict[str, Any]:
    """Bytes of the last of `steps` steps, the fullest rank's. A collective.

    `components` are live tensors, `activations` what the forward pass of the decoder leaves behind (gathered and cast
    parameters included), `peaks` the most that was alive in each phase, and `seconds` the steps' times. The forward
    phase ends where the gradient leaves the head, as in lumina_ds/plan/memory.py.
    """
    with _marked(world.device) as marks, own_linear():
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
    _destroy(engine)
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


def random_micro_batch(config: RunConfig, rank: int) -> MicroBatch:
    """Full rows of one document each, every position trained: the plan's worst case."""
    rows, length = config.train.micro_batch_size, config.seq_length
    tokens = np.random.default_rng(rank).integers(0, config.model.vocab_size, (rows, length + 1))
    return MicroBatch(
        input_ids=tokens[:, :-1].copy(),
        labels=tokens[:, 1:].copy(),
        position_ids=np.tile(np.arange(length), (rows, 1)),
        document_lengths=(length,) * rows,
        num_trained_tokens=rows * length,
        num_tokens=rows * length,
        row_ids=tuple(range(rows)),
        padding_mask=np.ones((rows, length), dtype=bool),
    )


def timed_step(engine: Any, config: RunConfig, world: World) -> float:
    """Seconds of one optimizer step with random tokens, the device's work included. A collective."""
    batches = [random_micro_batch(config, world.rank)] * config.train.gradient_accumulation_steps
    trained = sum(batch.num_trained_tokens for batch in batches) * world.size
    counts = StepCounts(trained, trained, stop_requested=False, save_due=False, failed=False)
    _synchronize(world)
    begin = time.perf_counter()
    run_step(engine, batches, counts, config.model, config.train.max_grad_norm, world)
    _synchronize(world)
    return time.perf_counter() - begin


class _CpuMarks:
    """Places in the profiler's record; live bytes at each and the peak up to the next."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.round = 0

    def restart(self) -> None:
        self.round += 1

    def mark(self, name: str) -> None:
        with torch.profiler.record_function(f"{_PREFIX}{self.round} {name}"):
            pass

    def read(self) -> tuple[dict[str, int], dict[str, int]]:
        live: dict[str, int] = {}
        peaks: defaultdict[str, int] = defaultdict(int)
        now, place = 0, None
        current = f"{_PREFIX}{self.round} "
        held: dict[int, int] = {}
        for event in sorted(_flattened(self.profile), key=lambda event: event.start_time_ns):
            if event.tag == _EventType.Allocation:
                if _is_of_gloo(event):
                    continue
                address, size = event.typed[1].ptr, event.typed[1].alloc_size
                if size > 0:
                    # Frees in threads of others are not recorded; the next use of the place tells.
                    now += size - held.get(address, 0)
                    held[address] = size
                else:
                    # What was allocated before the record began is not in it either.
                    now -= held.pop(address, 0)
            elif event.name.startswith(current):
                place = event.name.removeprefix(current)
                live[place] = max(now, live.get(place, 0))
            if place is not None:
                peaks[place] = max(peaks[place], now)
        return live, peaks


def _is_of_gloo(event: Any) -> bool:
    """Whether gloo made a copy for itself, which its threads free unseen; NCCL makes none."""
    parent = event.parent
    while parent is not None:
        if parent.name.startswith("c10d::"):
            return True
        parent = parent.parent
    return False


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


def _flattened(profile: torch.profiler.profile) -> Iterator[Any]:
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


class _CudaMarks:
    """The caching allocator's own figures."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.live: dict[str, int] = {}
        self.peaks: defaultdict[str, int] = defaultdict(int)
        self.place: str | None = None

    def mark(self, name: str) -> None:
        self._close()
        torch.cuda.reset_peak_memory_stats()
        self.place = name
        self.live[name] = max(torch.cuda.memory_allocated(), self.live.get(name, 0))

    def read(self) -> tuple[dict[str, int], dict[str, int]]:
        return self.live, self.peaks

    def _close(self) -> None:
        if self.place is not None:
            self.peaks[self.place] = max(self.peaks[self.place], torch.cuda.max_memory_allocated())


@contextmanager
def _marked(device: str) -> Iterator[Any]:
    if device == "cuda":
        yield _CudaMarks()
        return
    marks = _CpuMarks()
    with waited_collectives(), marks.profile:
        yield marks


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


def _synchronize(world: World) -> None:
    if world.device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _destroy(engine: Any) -> None:
    engine.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
