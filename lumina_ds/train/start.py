"""What every rank runs: prepare or open the data, join the others, train, and end with the right exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from lumina_ds.config.checks import device_faults, world_faults
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.distributed import World, start, stop
from lumina_ds.errors import ConfigError, LuminaError, OutOfMemory
from lumina_ds.logs import configure_logging

logger = logging.getLogger(__name__)


def run_rank(config: RunConfig, shards: Path, eval_shards: Path | None) -> NoReturn:
    """Train as one rank and end the process: 0, or the error's exit code.

    A user's mistake is one line on rank 0; every rank finds the same one. Anything unexpected keeps its traceback.
    """
    rank, code, clean = 0, 1, False
    try:
        world = start()
        rank = world.rank
        configure_logging(rank, Path(config.run.runs_dir) / config.run_name / "logs" / f"rank-{rank}.log")
        train(config, shards, eval_shards, world)
        code, clean = 0, True
    except LuminaError as error:
        code = error.exit_code
        _report(rank, f"error: {error}")
    except BaseException as error:
        code = _report_unexpected(rank, error)
    stop(code, clean)


def train(config: RunConfig, shards: Path, eval_shards: Path | None, world: World) -> None:
    """Open the shards and train, in a process group that exists already."""
    from lumina_ds.data.loader import PackedRows
    from lumina_ds.data.shards import ShardFolder
    from lumina_ds.data.tokenizer import Tokenizer, check_vocabulary
    from lumina_ds.train.loop import TrainingRun

    faults = world_faults(config, world.size) + device_faults(config, world.device)
    if faults:
        raise ConfigError.from_faults(faults)
    folders = [
        ShardFolder.open(path, force_streaming=config.data.force_streaming)
        for path in (shards, eval_shards)
        if path is not None
    ]
    for folder in folders:
        check_vocabulary(Tokenizer.load(folder.tokenizer_path), config.model.vocab_size)
    rows = [PackedRows(folder, config.seq_length) for folder in folders]
    TrainingRun(config, rows[0], rows[1] if len(rows) > 1 else None, world).run()


def _report(rank: int, text: str) -> None:
    logger.debug(text)
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def _report_unexpected(rank: int, error: BaseException) -> int:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        remedy = "lower --batch-size and raise --grad-accum, or use --activation-checkpointing full"
        print(f"error: rank {rank} ran out of memory ({error}); {remedy}", file=sys.stderr, flush=True)
        return OutOfMemory.exit_code
    print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
