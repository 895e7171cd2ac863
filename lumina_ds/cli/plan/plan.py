"""`lumina plan`: memory of a run per rank, before a GPU is touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.plan.check import check
from lumina_ds.cli.plan.choice import render_explanations, render_search, search_record, write_choice
from lumina_ds.cli.plan.grid import grid_record, plan_grid, render_grid
from lumina_ds.cli.plan.options import TokenCount, overrides, setting_options
from lumina_ds.cli.plan.rehearse import rehearse
from lumina_ds.cli.plan.render import plan_record, render_plan
from lumina_ds.cli.plan.time import time
from lumina_ds.cli.plan.verify import verify
from lumina_ds.config.load import load_config
from lumina_ds.config.precision import resolve_precision
from lumina_ds.config.tensors import num_parameters
from lumina_ds.plan.explain import explain
from lumina_ds.plan.hardware import find_gpu, usable_bytes
from lumina_ds.plan.layout import Composer, Fixed
from lumina_ds.plan.memory import plan_memory
from lumina_ds.plan.search import find_cheapest


@click.group(
    invoke_without_command=True, epilog="Example: lumina plan --config b7 --gpus 8 --zero 3 --expert-parallel 8"
)
@click.option("--config", "source", help="A preset's name or a YAML file.")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of a machine: ranks of the run."
)
@setting_options
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--gpu-memory", type=click.FloatRange(min=1), default=80, show_default=True, help="GB, for the grid.")
@click.option("--gpu", "gpu_name", help="A card, such as h100-80 or rtx4090: find the cheapest plan that fits it.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines of --gpus each.")
@click.option("--global-batch-tokens", type=TokenCount(), help="Solve micro-batch and accumulation for it: 4M.")
@click.option("--explain", "explained", is_flag=True, help="Each formula with the numbers filled in.")
@click.option("--write", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write run.yaml and ds.json.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def command(
    context: click.Context,
    source: str | None,
    gpus: int,
    device: str,
    gpu_memory: float,
    gpu_name: str | None,
    nodes: int,
    global_batch_tokens: int | None,
    explained: bool,
    folder: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Memory of a run per rank: what takes it, in which phase it peaks, which cards hold it.

    With --gpu, --global-batch-tokens or --write also the cheapest plan that fits: ZeRO-1 and 2, activation
    checkpointing, smaller buckets, expert parallelism, ZeRO-3, then offload, unless an option here decides it.
    """
    if context.invoked_subcommand is not None:
        return
    if source is None:
        raise click.UsageError("--config is missing; give a preset or a YAML file", context)
    config = load_config(source, overrides(settings)).config
    gpu = find_gpu(gpu_name) if gpu_name else None
    # Without a card's name, planned for any GPU of today; a run asks the GPU that it has.
    bf16 = gpu is None or gpu.bf16
    precision, reason = resolve_precision(config.train.precision, device, bf16, num_parameters(config.model))
    world_size = gpus * nodes
    card_gb = gpu.memory_gb if gpu else gpu_memory
    composer = Composer(config, precision)
    composed = composer.json(config, world_size)
    plan = plan_memory(config, world_size, precision, device, composed)
    grid = plan_grid(config, world_size, composer) if device == "cuda" else []
    result = None
    if gpu_name or global_batch_tokens or folder:
        if device == "cpu":
            raise click.UsageError(
                "--gpu, --global-batch-tokens and --write plan for GPUs; leave --device out", context
            )
        fixed = Fixed(
            settings["zero"], settings["expert_parallel"], settings["activation_checkpointing"], settings["offload"]
        )
        limit = usable_bytes(card_gb)
        result = find_cheapest(config, world_size, precision, limit, gpus, fixed, global_batch_tokens, composer)
    formulas = explain(plan, config, composed) if explained else []
    if folder is not None:
        written = write_choice(result, precision, gpus, folder)
    if as_json:
        record = plan_record(plan) | grid_record(grid, card_gb)
        record["host_bytes_per_node"] = gpus * plan.host_bytes
        if result is not None:
            record["cheapest"] = search_record(result)
        if explained:
            record["explain"] = [vars(formula) for formula in formulas]
        click.echo(json.dumps(record, indent=2))
        return
    from rich.console import Console

    console = Console(file=sys.stdout)
    render_plan(plan, console, gpus)
    if config.train.precision == "auto":
        console.print(f"Precision: {reason}.")
    render_explanations(formulas, console)
    if grid:
        render_grid(grid, card_gb, console)
    if result is not None:
        render_search(result, gpu.name if gpu else f"{card_gb:g} GB", gpus, console)
    if folder is not None:
        console.print(f"Written; train with: {written}", highlight=False, soft_wrap=True)


command.add_command(check)
command.add_command(rehearse)
command.add_command(time)
command.add_command(verify)
