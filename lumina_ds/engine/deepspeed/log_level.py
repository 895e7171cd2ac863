"""DeepSpeed's logger at another level for a while: it warns of what this package replaces, and writes to stdout."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lumina_ds.engine.deepspeed.changes import Need

NEEDS = (Need("deepspeed.utils:logger"),)


@contextmanager
def deepspeed_log_level(level: int = logging.ERROR) -> Iterator[None]:
    """Inside, DeepSpeed logs what is at least of `level`; after it, also after an error, what it logged before."""
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
