"""What every rank runs: prepare or open the data, join the others, train, and end with the right exit code."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lumina_ds.config.checks import device_faults, world_faults
from lumina_ds.config.elastic import for_ranks
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.cards import card_name, cards_line
from lumina_ds.engine.meeting_point import refuse_agent_store
from lumina_ds.engine.world import World, on_rank_0, start, stop
from lumina_ds.errors import ConfigError, LuminaError
from lumina_ds.logs import CONSOLE_LOGGER, configure_logging
from lumina_ds.train.ending import report_error, report_unexpected
from lumina_ds.train.run_folder import RunFolder

if TYPE_CHECKING:
    from lumina_ds.data.shards.folder import ShardFolder

log = logging.getLogger(CONSOLE_LOGGER)

# The configuration with the micro-batch and accumulation that fit these ranks; measure/batch_size.py has it.
SettleBatch = Callable[[RunConfig, World], RunConfig]
# SHA-256 takes some seconds for so much.
MAX_VERIFIED_BYTES = 4 << 30


def run_rank(
    config: RunConfig, shards: Path | None, eval_shards: Path | None, settle_batch: SettleBatch | None = None
) -> NoReturn:
    """Train as one rank and end the process: 0, or the error's exit code. The arguments are those of train().

    A user's mistake is one line on rank 0; every rank finds the same one. Anything unexpected keeps its traceback.
    """

    def body(world: World) -> None:
        folder = RunFolder.of(config)
        folder.create()
        configure_logging(world.rank, folder.logs / f"rank-{world.rank}.log")
        _say_cards(world)
        train(config, shards, eval_shards, world, settle_batch)

    run_as_rank(body, config.deepspeed.rendezvous_seconds, RunFolder.of(config).logs)


def _say_cards(world: World) -> None:
    """Under every launcher, which GPU each rank has taken. A collective."""
    if world.device != "cuda":
        return
    import torch.distributed as dist

    from lumina_ds.engine.resources import is_amd

    own = (socket.gethostname(), card_name(os.environ, world.local_rank, is_amd()))
    places: list[tuple[str, str]] = [own] * world.size
    dist.all_gather_object(places, own)
    logging.getLogger(__name__).info("%s", cards_line(places))


def run_as_rank(body: Callable[[World], None], rendezvous_seconds: float, shared: Path | None = None) -> NoReturn:
    """Join the others, do `body`, and end the process with 0 or the exit code of the error. `shared` is a folder that
    all ranks have, if any."""
    rank, code, clean = 0, 1, False
    try:
        world = start(rendezvous_seconds, shared=shared)
        rank = world.rank
        body(world)
        code, clean = 0, True
    except LuminaError as error:
        code = error.exit_code
        report_error(rank, error)
    except BaseException as error:
        code = report_unexpected(rank, error)
    stop(code, clean)


def train(
    config: RunConfig,
    shards: Path | None,
    eval_shards: Path | None,
    world: World,
    settle_batch: SettleBatch | None = None,
) -> None:
    """Open the shards and train, in a process group that exists already. A collective.

    Without `shards`, data.sources are trained, each a shard folder by now; data.eval_sets are evaluated beside
    `eval_shards`.

    `settle_batch` chooses the micro-batch where the configuration leaves it open; ConfigError when it is needed and not
    given.
    """
    from lumina_ds.data.tokenizer.tokenizer import check_vocabulary
    from lumina_ds.model.device import device_and_precision
    from lumina_ds.train.opened_data import OpenedData
    from lumina_ds.train.precision_fallback import train_with_fallback

    precision = device_and_precision(config.train.precision, config.model)[1]
    faults = world_faults(for_ranks(config, world.size), world.size) + device_faults(config, world.device, precision)
    if faults:
        raise ConfigError.from_faults(faults)
    if config.run.elastic is not None:
        refuse_agent_store()
        on_rank_0(world, lambda: _check_memory(config, world, precision))
    world = replace(world, sequence_parallel_size=config.deepspeed.sequence_parallel_size)
    data = OpenedData.of(config, shards, eval_shards)
    verify_shards(data.folders, world)
    for folder in data.folders:
        check_vocabulary(folder.tokenizer(), config.model.vocab_size)
    if config.train.auto_micro_batch:
        if settle_batch is None:
            raise ConfigError("--batch-size auto needs trial steps, which are not to be had here; give it a number")
        config = settle_batch(config, world)
    train_with_fallback(config, data.rows(config.seq_length), data.evaluation_sets(config), world)


def _check_memory(config: RunConfig, world: World, precision: str) -> None:
    """Refuse a number of ranks whose plan does not fit: nobody chose it."""
    from lumina_ds.engine.launchers import LOCAL_WORLD_SIZE
    from lumina_ds.engine.resources import memory_of_rank
    from lumina_ds.plan.elastic import memory_fault

    here = int(os.environ.get(LOCAL_WORLD_SIZE, world.size))
    limit = memory_of_rank(world.device, here)
    if fault := memory_fault(for_ranks(config, world.size), world.size, precision, world.device, limit):
        raise ConfigError(f"--elastic {config.run.elastic} cannot go on: {fault}; start more ranks")


def verify_shards(folders: Sequence[ShardFolder], world: World) -> None:
    """Refuse damaged shards: Arrow reads most flipped bits without an error. A collective.

    Rank 0 reads every byte of up to MAX_VERIFIED_BYTES; a larger corpus is left to `lumina data verify`.
    """

    def verify() -> None:
        for folder in folders:
            size = sum(shard.size_bytes for shard in folder.manifest.shards)
            if size > MAX_VERIFIED_BYTES:
                log.info("%s is large and is not verified here; see lumina data verify", folder.path)
            else:
                folder.verify()

    on_rank_0(world, verify)
