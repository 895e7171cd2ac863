"""`lumina plan time`: how long a run takes, what its checkpoints weigh, what it costs, assumed or calibrated."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.cli.completers import complete_card
from lumina_ds.cli.plan.options import TokenCount, overrides, setting_options
from lumina_ds.config.checks import world_faults
from lumina_ds.config.load import load_config
from lumina_ds.config.precision import resolve_precision
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.tensors import num_parameters
from lumina_ds.errors import ConfigError
from lumina_ds.plan.calibration import (
    Calibration,
    default_path,
    read_calibration,
    saved_calibrations,
    write_calibration,
)
from lumina_ds.plan.duration import TimePlan, plan_time
from lumina_ds.plan.hardware import Gpu, find_gpu
from lumina_ds.text import counted, format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_GPU = "h100-80"


@click.command(
    "time",
    epilog="Example: lumina plan time --config b7 --gpus 8 --tokens 10B --price 2.50",
    short_help="time, checkpoints and cost of a run",
)
@click.option("--config", "source", required=True, help="A preset's name or a YAML file.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of a machine.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines of --gpus each.")
@click.option(
    "--gpu",
    "gpu_name",
    shell_complete=complete_card,
    help=f"A card, such as a100-80; else the calibrated device, else {DEFAULT_GPU}.",
)
@click.option("--tokens", type=TokenCount(), help="Tokens to train, all epochs together: 10B, 3e8.")
@click.option("--data", type=click.Path(path_type=Path), help="A shard folder: its tokens times the run's epochs.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Model FLOPs utilization to assume.")
@click.option("--calibrate", "calibrating", is_flag=True, help="First run a few real steps on this machine.")
@click.option(
    "--calibration",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Measured rates: written with --calibrate, else read; by default one in the user's cache for this machine.",
)
@click.option("--price", type=click.FloatRange(min=0), help="Of one GPU for an hour, in any currency.")
@setting_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def time(
    source: str,
    gpus: int,
    nodes: int,
    gpu_name: str | None,
    tokens: int | None,
    data: Path | None,
    mfu: float | None,
    calibrating: bool,
    file: Path | None,
    price: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time, checkpoints and cost of a run, from its FLOPs and an assumed or measured utilization.

    --calibrate measures steps, file writes and collectives on --gpus ranks of this machine and keeps the result,
    which later calls use for the same device.
    """
    config = load_config(source, overrides(settings)).config
    asked = find_gpu(gpu_name) if gpu_name else None
    if tokens is not None and data is not None:
        raise click.UsageError("--tokens and --data both say how much is trained; give one of them")
    if calibrating and mfu is not None:
        raise click.UsageError("--calibrate measures what --mfu assumes; give one of them")
    if data is not None:
        from lumina_ds.data.shards.manifest import read_manifest

        tokens = round(read_manifest(data).totals.tokens * config.train.epochs)
    world_size = gpus * nodes
    faults = world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    calibration = None
    if calibrating:
        calibration = _calibrated(config, gpus, file)
    elif mfu is None:
        calibration = read_calibration(file) if file else _saved(config, asked)
    gpu = _gpu_of(calibration, asked)
    precision = _precision(config, calibration, gpu)
    if calibration is not None and calibration.precision != precision:
        raise ConfigError(
            f"the calibration is of {calibration.precision}, and the run is in {precision}; --calibrate again, give "
            f"--precision {calibration.precision}, or assume with --mfu"
        )
    plan = plan_time(config, world_size, gpu, precision, tokens, mfu, price, calibration)
    if as_json:
        record = _record(plan) | {"calibration": None if calibration is None else asdict(calibration)}
        click.echo(json.dumps(record, indent=2))
    else:
        _print(plan, price, calibration)


def _calibrated(config: RunConfig, gpus: int, file: Path | None) -> Calibration:
    from lumina_ds.cli.plan.calibrate import calibrate
    from lumina_ds.engine.resources import num_local_gpus

    # A machine with GPUs has so many ranks; on a CPU they are as many as are asked for.
    calibration = calibrate(config, min(gpus, num_local_gpus() or gpus))
    write_calibration(calibration, file or default_path(calibration.host, calibration.device))
    return calibration


def _saved(config: RunConfig, gpu: Gpu | None) -> Calibration | None:
    """The newest of this machine in the run's precision, and of the card where one is named."""
    found = [each for each in saved_calibrations(socket.gethostname()) if gpu is None or each.card == gpu.name]
    return next((each for each in found if each.precision == _precision(config, each)), None)


def _gpu_of(calibration: Calibration | None, asked: Gpu | None) -> Gpu | None:
    if calibration is None:
        return asked or find_gpu(DEFAULT_GPU)
    if asked is not None and calibration.card != asked.name:
        raise ConfigError(
            f"the calibration is of {calibration.device}, not of {asked.name}; leave --gpu out, or calibrate there"
        )
    return find_gpu(calibration.card) if calibration.card else None


def _precision(config: RunConfig, calibration: Calibration | None, gpu: Gpu | None = None) -> str:
    """Of the run, where auto means what it does on the device."""
    on_cpu = calibration is not None and calibration.device == "cpu"
    supported = gpu is None or gpu.bf16
    device = "cpu" if on_cpu else "cuda"
    return resolve_precision(config.train.precision, device, supported, num_parameters(config.model))[0]


def _record(plan: TimePlan) -> dict[str, Any]:
    derived = ("flops_per_token", "tokens_per_second", "gpu_hours")
    record = {**asdict(plan), **{name: getattr(plan, name) for name in derived}}
    record["checkpoint"]["total"] = plan.checkpoint.total
    return record


def _print(plan: TimePlan, price: float | None, calibration: Calibration | None) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(f"[bold]{plan.name}[/bold] on {plan.world_size} x {plan.gpu}, {plan.precision}")
    for part, flops in plan.flops.items():
        if flops:
            share = 100 * flops / plan.flops_per_token
            console.print(f"  {part:<24}{format_count(flops):>8}FLOP per token {share:5.1f} %")
    _print_basis(plan, calibration, console)
    console.print(
        f"{counted(plan.steps, 'step')} of {plan.tokens_per_step:,} tokens, {_duration(plan.step_seconds)} each: "
        f"{plan.tokens_per_second:,.0f} tokens per second, {format_count(plan.tokens)} tokens in all."
    )
    console.print(f"Total {_duration(plan.total_seconds)}, {plan.gpu_hours:,.1f} GPU hours.")
    if plan.cost is not None:
        console.print(f"Cost {plan.cost:,.2f} at {price:,.2f} per GPU hour.")
    saved = plan.checkpoint
    console.print(
        f"Checkpoint {format_bytes(saved.total)}: optimizer states {format_bytes(saved.optimizer_states)}, "
        f"whole weights {format_bytes(saved.weights)}."
    )
    written = "measured" if calibration else "assumed"
    console.print(
        f"Saving one takes {_duration(plan.save_seconds)} at {format_bytes(round(plan.write_bytes_per_second))} per second, "
        f"{written}, beside training where memory holds a copy."
    )
    console.print(f"{plan.num_checkpoints} saved; at most {format_bytes(plan.disk_bytes)} of disk at once.")
    if plan.num_checkpoints > 1 and plan.save_seconds * plan.num_checkpoints > plan.total_seconds:
        console.print(
            "Saving all of them takes longer than the training: each waits for the one before, which the total leaves out; "
            "raise train.save_every_minutes or train.save_every_n_batches."
        )


def _print_basis(plan: TimePlan, calibration: Calibration | None, console: Console) -> None:
    """Where the rate comes from; of measured ones also the collectives'."""
    if calibration is None or plan.mfu_source == "as given":
        console.print(f"MFU {100 * (plan.mfu or 0):.0f} %, assumed ({plan.mfu_source}); --mfu sets it.")
        return
    share = "" if plan.mfu is None else f", MFU {100 * plan.mfu:.1f} %"
    console.print(
        f"Calibrated on {calibration.host}, {calibration.num_ranks} x {calibration.device}, {calibration.date}: "
        f"{format_count(round(calibration.flops_per_second))}FLOP per second and rank{share} ({calibration.measured_on}). "
        "--gpu plans for another card."
    )
    sent = {
        "all-reduce": calibration.all_reduce_bytes_per_second,
        "all-to-all": calibration.all_to_all_bytes_per_second,
    }
    measured = [f"{name} {format_bytes(round(rate))} per second and rank" for name, rate in sent.items() if rate]
    if measured:
        console.print(f"Measured between the ranks: {', '.join(measured)}; both are inside the steps.")
    if plan.world_size > calibration.num_ranks:
        console.print(
            f"{plan.world_size} ranks are more than were measured: what they communicate beyond that is not in the time."
        )


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.2f} seconds"
