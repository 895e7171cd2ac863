"""Modules that stay where they are, for engines among fake tensors (measure/rehearsal.py).

A fake tensor cannot be cast or moved in place, which DeepSpeed does to every parameter. There it has nothing to do:
engine/allocate.py has made them in their type and place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lumina_ds.engine.deepspeed.changes import Need, replaced

NEEDS = (Need("torch.nn:Module._apply", "self fn recurse"),)


@contextmanager
def modules_stay_in_place() -> Iterator[None]:
    """Inside, nn.Module's to(), half(), cuda() and the like do nothing."""

    def stay(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        return self

    with replaced(nn.Module, "_apply", stay):
        yield
