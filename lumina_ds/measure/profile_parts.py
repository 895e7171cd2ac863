"""Time by part, from the record of torch.profiler."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

PHASE = "lumina phase "
PART = "lumina part "
_BACKWARD_NODE = "autograd::engine::evaluate_function: "
_OTHER = "other"
# DeepSpeed's hooks on parameters run inside these nodes: it keeps, buckets and reduces the gradients there.
_ACCUMULATE = "gradients"

Place = tuple[str, str]


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
