"""Which of DeepSpeed's compiled ops this machine could build or has."""

from __future__ import annotations

import contextlib
import io
import logging
import os

from lumina_ds.engine.resources import name_accelerator


def compatible_ops() -> dict[str, bool]:
    """Every op by name, as its own builder judges; nothing is compiled."""
    name_accelerator(os.environ)
    import deepspeed

    level = deepspeed.utils.logger.level
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # The builders print their warnings.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        found = {name: bool(builder.is_compatible(verbose=False)) for name, builder in sorted(ALL_OPS.items())}
    deepspeed.utils.logger.setLevel(level)
    return {name: usable for name, usable in found.items() if name != "deepspeed_not_implemented"}
