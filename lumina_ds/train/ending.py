"""How the end of a rank is told: its exit code, its one line, and whether it was memory that it lacked."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from typing import NoReturn

from lumina_ds.errors import DataError, Interrupted, LuminaError, MachineError, OutOfMemory, SharedFault
from lumina_ds.logs import CONSOLE_LOGGER, tell
from lumina_ds.train.watch.heartbeat import tells_of_another_end

log = logging.getLogger(CONSOLE_LOGGER)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a card, of Python, or of torch's CPU allocator, which raises a plain RuntimeError (c10/core/alloc_cpu.cpp).

    A rank cannot go on after it, but the run may, with smaller pieces.
    """
    import torch

    refused = "DefaultCPUAllocator" in str(error) and ("allocate memory" in str(error) or "enough memory" in str(error))
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and refused)


def end_code(error: BaseException | None) -> int:
    """The exit code by which other programs learn why a rank ended."""
    if error is None:
        return 0
    if is_out_of_memory(error):
        return OutOfMemory.exit_code
    return error.exit_code if isinstance(error, LuminaError) else 1


def report_error(rank: int, error: LuminaError) -> None:
    """One line on stderr and in the log: of rank 0, and of others what may be theirs alone, such as missing files."""
    log.error("%s", error)
    if rank == 0:
        # A stop that was asked for is no error.
        tell(str(error) if isinstance(error, Interrupted) else f"error: {error}")
    elif isinstance(error, DataError | MachineError) and not isinstance(error, SharedFault):
        tell(f"[rank {rank}] error: {error}")


def report_unexpected(rank: int, error: BaseException) -> int:
    """What is no LuminaError, on stderr and with its traceback in the log; the exit code."""
    log.error("%s", traceback.format_exc())
    if is_out_of_memory(error):
        remedy = "lower --batch-size and raise --grad-accum, or use --activation-checkpointing full"
        what = str(error).partition("\n")[0]
        tell(f"error: rank {rank} ran out of memory ({what}); {remedy}")
        return OutOfMemory.exit_code
    if isinstance(error, RuntimeError) and tells_of_another_end(str(error)):
        # Its traceback is in the log; the rank that failed first has the cause.
        tell(f"rank {rank} lost the connection to another rank and ends")
        return 1
    tell(f"rank {rank} failed:\n{traceback.format_exc()}")
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def end_at_once(rank: int, error: LuminaError) -> NoReturn:
    """Report the error and end the process from whichever thread this is, without waiting for the others."""
    report_error(rank, error)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(error.exit_code)
