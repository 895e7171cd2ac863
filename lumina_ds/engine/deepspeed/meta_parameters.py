"""Modules whose parameters have no storage, so that a model never takes more memory than one rank's part of it.

torch's own `torch.device("meta")` context would take the buffers along, whose values are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lumina_ds.engine.deepspeed.changes import Need, replaced

NEEDS = (Need("torch.nn:Module.register_parameter", "self name param"),)


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made inside register their parameters on the meta device; buffers keep their values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # One that is on meta already may be shared (tied), and must stay the same object.
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with replaced(nn.Module, "register_parameter", register_on_meta):
        yield
