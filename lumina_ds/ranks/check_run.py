"""What a run would use on this machine, and everything that can be refused before a rank starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.config.checks import device_faults, world_faults
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.text import counted, format_bytes

if TYPE_CHECKING:
    from lumina_ds.engine.kernel_choice import KernelChoice
    from lumina_ds.model.attention_backends import AttentionChoice

# Ranks of a CPU take turns; beyond this they mostly wait for each other.
_RANKS_PER_CORE = 4


@dataclass(frozen=True)
class RunCheck:
    """A run that can start: its device (cuda or cpu), its precision with the reason, and what it was checked with."""

    device: str
    precision: str
    precision_reason: str
    deepspeed_json: dict[str, Any]
    attention: AttentionChoice
    kernels: KernelChoice


def check_run(config: RunConfig, world_size: int) -> RunCheck:
    """Resolve `config` for `world_size` ranks of this machine's kind.

    Raises ConfigError with every fault of the run, and MachineError for what the machine lacks.
    """
    from lumina_ds.config.deepspeed.compose import compose_deepspeed
    from lumina_ds.engine.kernel_choice import choose_kernels
    from lumina_ds.model.attention_backends import choose_attention
    from lumina_ds.model.device import device_and_precision
    from lumina_ds.monitor.trackers import missing_trackers

    device, precision, reason = device_and_precision(config.train.precision, config.model)
    faults = world_faults(config, world_size) + device_faults(config, device, precision)
    if faults:
        raise ConfigError.from_faults(faults)
    if missing := missing_trackers(config.run):
        raise MachineError("; ".join(missing))
    return RunCheck(
        device,
        precision,
        reason,
        compose_deepspeed(config, world_size, precision),
        choose_attention(config, device, precision),
        choose_kernels(config, device, precision, compares=False),
    )


def check_start(config: RunConfig, runner: Sequence[str]) -> None:
    """Refuse, before anything is made, a run that the deepspeed runner with these arguments could not start."""
    from lumina_ds.ranks.elastic import planned_start
    from lumina_ds.ranks.reach import check_hosts
    from lumina_ds.ranks.runner import complete_runner_arguments

    start = planned_start(config, runner)
    check_run(start.config, start.num_ranks)
    # An elastic run has asked its hosts, and goes without those that it does not reach.
    if config.run.elastic is None:
        check_hosts(complete_runner_arguments(list(runner)), config.deepspeed.rendezvous_seconds)


def device_reason(device: str, runner: Sequence[str]) -> str:
    """Where ranks started with these arguments would train, and what a plan assumes of it."""
    from lumina_ds.engine.resources import planned_resources

    num_hosts = len(planned_resources(list(runner)))
    if num_hosts > 1:
        return f"{device}; every one of the {num_hosts} hosts is taken to be like this one"
    if device == "cpu":
        return "cpu: this machine has no GPU, so its ranks train on the CPU; lumina plan --gpu CARD plans for GPUs elsewhere"
    return f"{device} of this machine"


def check_measurable(config: RunConfig, runner: Sequence[str]) -> str:
    """The device; refuses before a rank starts what no run could do, or what is not there to be read."""
    from lumina_ds.data.shards.folder import ShardFolder
    from lumina_ds.ranks.runner import complete_runner_arguments, planned_world_size

    if config.data.train_data:
        raise ConfigError(
            "--train-data is not prepared here; give --data with a shard folder, or no data for random tokens"
        )
    if config.data.sources:
        raise ConfigError(
            "data.sources are not measured here; leave them out and give --data with the shard folder of one, or no data "
            "for random tokens"
        )
    checked = check_run(config, planned_world_size(complete_runner_arguments(list(runner))))
    if config.data.shards is not None:
        # A plan for a new row length is made once here, not by every rank at the same time.
        ShardFolder.open(Path(config.data.shards), config.data.force_streaming).packing(config.seq_length)
    return checked.device


def check_ranks(num_ranks: int, device: str, peak_bytes: int) -> None:
    """Raise ConfigError where this machine has no room for ranks that peak at `peak_bytes` each."""
    from lumina_ds.engine.resources import num_local_gpus

    cores = os.cpu_count() or 1
    limit = num_local_gpus() if device == "cuda" else _RANKS_PER_CORE * cores
    if num_ranks > limit:
        have = counted(limit, "GPU") if device == "cuda" else counted(cores, "CPU core")
        raise ConfigError(f"--gpus {num_ranks} are more ranks than this machine with {have} runs; use at most {limit}")
    if device == "cpu":
        import psutil

        free = psutil.virtual_memory().available
        if num_ranks * peak_bytes > free:
            raise ConfigError(
                f"{counted(num_ranks, 'rank')} of {format_bytes(peak_bytes)} do not fit the {format_bytes(free)} that are "
                "free on this machine; use a smaller preset, fewer --gpus or a smaller --micro-batch"
            )
