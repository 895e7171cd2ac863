"""`--batch-size auto`: the largest micro-batch that the plan says fits and a trial step confirms.

The rows of a step stay as they are, so that another machine trains alike: the accumulation makes up for the
micro-batch. What was chosen stands in config.yaml, and a resumed run keeps it.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from lumina_ds.checkpoint.format import find_checkpoint, step_folders
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import World, on_rank_0
from lumina_ds.errors import OutOfMemory
from lumina_ds.measure.probe import step_fits
from lumina_ds.model.device import device_and_precision
from lumina_ds.plan.batch import BatchChoice, largest_micro_batch, with_batch
from lumina_ds.text import counted
from lumina_ds.train.run_folder import RunFolder

log = logging.getLogger(__name__)

# Of a host's free memory; the rest is for data, the page cache and other programs.
_HOST_SHARE = 0.9


def settle_batch(config: RunConfig, world: World) -> RunConfig:
    """`config` with a micro-batch and accumulation for these ranks, where they are left to us. A collective.

    Raises OutOfMemory when not even one row fits, ConfigError when the rows of a step cannot be dealt out.
    """
    if not config.train.auto_micro_batch:
        return config
    _, precision, _ = device_and_precision(config.train.precision, config.model)
    rows, kept = on_rank_0(world, lambda: _earlier_life(config, world.share.size))
    choice = kept or largest_micro_batch(config, world.size, precision, world.device, free_bytes(world), rows)
    if kept is None:
        choice = _largest_that_fits(choice, config, world, precision)
    if world.rank == 0:
        log.info("%s", choice.line)
        print(choice.line, flush=True)
    return with_batch(config, choice.micro_batch_size, choice.gradient_accumulation_steps)


def free_bytes(world: World) -> int:
    """Memory that each rank may take: of its GPU, or an equal part of its host's. A collective; the least of all."""
    if world.device == "cuda":
        own = ("", torch.cuda.mem_get_info()[0])
    else:
        own = (socket.gethostname(), int(_HOST_SHARE * min(psutil.virtual_memory().available, _free_of_cgroup())))
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, own)
    hosts = [host for host, _ in found]
    return min(size // (hosts.count(host) if host else 1) for host, size in found)


def _free_of_cgroup() -> int:
    """What a container's limit leaves (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return psutil.virtual_memory().total


def _largest_that_fits(choice: BatchChoice, config: RunConfig, world: World, precision: str) -> BatchChoice:
    logs = RunFolder.of(config).logs
    while True:
        tried = with_batch(config, choice.micro_batch_size, choice.gradient_accumulation_steps)
        if step_fits(tried, world, precision, logs):
            return choice
        smaller = choice.smaller()
        if smaller is None:
            raise OutOfMemory(
                "--batch-size auto: not even a micro-batch of one row fits; use --activation-checkpointing full, a "
                "shorter --seq-length, --offload optimizer, or more ranks with --zero 3"
            )
        if world.rank == 0:
            log.info(
                "a micro-batch of %s does not fit; trying %d",
                *(counted(choice.micro_batch_size, "row"), smaller.micro_batch_size),
            )
        choice = smaller


def _earlier_life(config: RunConfig, readers: int) -> tuple[int | None, BatchChoice | None]:
    """(rows per step of the checkpoint to resume from, the batch of the run folder if it gives as many)."""
    folder, resume = RunFolder.of(config), config.run.resume
    folder.create()
    if resume == "none":
        return None, None
    if resume not in ("auto", "must"):
        chosen = find_checkpoint(Path(resume))
    elif steps := step_folders(folder.checkpoints):
        chosen = steps[-1]
    else:
        return None, None
    rows = read_manifest(chosen).schedule.rows_per_step
    micro, accumulation = folder.written_batch() or (0, 0)
    if micro * accumulation * readers != rows:
        return rows, None
    return rows, BatchChoice(micro, accumulation, readers, "what the run began with")
