"""What runs around an engine's phases, and around torch's collectives, while something is measured (measure/)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist

from lumina_ds.engine.deepspeed.changes import Need, existing, replace, replaced, wrapped

PHASES = ("forward", "backward", "step")
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
NEEDS = (
    *(Need(f"deepspeed:DeepSpeedEngine.{phase}") for phase in PHASES),
    *(Need(f"torch.distributed:{name}") for name in COLLECTIVES),
    Need("torch.distributed:Work.wait"),
)


def wrap_phases(engine: Any, wrap: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> None:
    """Let `wrap(function, phase)` stand for the engine's function of each of PHASES, until the engine's end."""
    for phase in PHASES:
        replace(engine, phase, wrap(existing(engine, phase), phase))


@contextmanager
def around_phases(engine: Any, around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, each of the engine's PHASES runs inside `around(phase)`."""
    with ExitStack() as changes:
        for phase in PHASES:
            call = wrapped(existing(engine, phase), partial(around, phase))
            changes.enter_context(replaced(engine, phase, call))
        yield


@contextmanager
def around_collectives(around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, torch.distributed's collectives run inside `around()`, and so does waiting for one."""
    with ExitStack() as changes:
        for owner, name in [*((dist, name) for name in COLLECTIVES), (dist.Work, "wait")]:
            changes.enter_context(replaced(owner, name, wrapped(existing(owner, name), around)))
        yield
