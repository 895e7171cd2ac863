"""`lumina plan`: memory of a run per rank, before a GPU is touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.completers import complete_card, complete_config
from lumina_ds.cli.plan.check import check
from lumina_ds.cli.plan.choice import render_explanations, render_search, search_record, write_choice
from lumina_ds.cli.plan.grid import grid_record, plan_grid, render_grid
from lumina_ds.cli.plan.model import plan_foreign
from lumina_ds.cli.plan.options import TokenCount, overrides, setting_options
from lumina_ds.cli.plan.rehearse import rehearse
from lumina_ds.cli.plan.render import plan_record, render_plan
from lumina_ds.cli.plan.time import time
from lumina_ds.cli.plan.verify import verify
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.precision import resolve_precision
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.tensors import num_parameters
from lumina_ds.errors import ConfigError
from lumina_ds.export.planned_config import PlannedModel, planned_model
from lumina_ds.plan.explain import explain
from lumina_ds.plan.hardware import find_gpu, usable_bytes
from lumina_ds.plan.layout import Composer, Fixed
from lumina_ds.plan.memory import plan_memory
from lumina_ds.plan.search import find_cheapest
from lumina_ds.text import with_article

_MOST_TOKENS = 4096  # of a row, where a foreign model's context says nothing about the rows that it is trained on


@click.group(
    invoke_without_command=True, epilog="Example: lumina plan --config b7 --gpus 8 --zero 3 --expert-parallel 8"
)
@click.option("--config", "source", shell_complete=complete_config, help="A preset's name or a YAML file.")
@click.option("--model", "foreign", type=click.Path(path_type=Path), help="A model's config.json, or its folder.")
@click.option("--freeze", multiple=True, metavar="PATTERN", help="With --model: parameters that are not trained.")
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of a machine: ranks of the run."
)
@setting_options
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--gpu-memory", type=click.FloatRange(min=1), default=80, show_default=True, help="GB, for the grid.")
@click.option(
    "--gpu",
    "gpu_name",
    shell_complete=complete_card,
    help="A card, such as h100-80 or rtx4090: find the cheapest plan that fits it.",
)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines of --gpus each.")
@click.option("--global-batch-tokens", type=TokenCount(), help="Solve micro-batch and accumulation for it: 4M.")
@click.option("--explain", "explained", is_flag=True, help="Each formula with the numbers filled in.")
@click.option("--write", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write run.yaml and ds.json.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def command(
    context: click.Context,
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
    # What chooses the model is read from the context.
    settings = {name: value for name, value in settings.items() if name not in ("source", "foreign", "freeze")}
    config = _config(context, settings)
    if config is None:
        return
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


def _config(context: click.Context, settings: dict[str, Any]) -> RunConfig | None:
    """The run of --config or --model; None where all that is known of the model was printed."""
    given = context.params
    source, path = given["source"], given["foreign"]
    if source is None and path is None:
        raise click.UsageError(
            "--config is missing; give a preset or a YAML file, or --model with a model's config.json", context
        )
    if source is not None and path is not None:
        raise click.UsageError("--config and --model both say which model; leave one of them out", context)
    if path is None:
        if given["freeze"]:
            raise click.UsageError("--freeze goes with --model", context)
        return load_config(source, overrides(settings)).config
    found = planned_model(path)
    if found.model is not None:
        return _config_of(found, settings, given["freeze"], given["folder"])
    refused = {"gpu_name": "--gpu", "global_batch_tokens": "--global-batch-tokens"}
    refused |= {"explained": "--explain", "folder": "--write"}
    words = [flag for name, flag in refused.items() if given[name]]
    plan_foreign(
        found, given["freeze"], given["gpus"] * given["nodes"], given["device"], settings, words, given["as_json"]
    )
    return None


def _config_of(
    found: PlannedModel, settings: dict[str, Any], freeze: tuple[str, ...], folder: Path | None
) -> RunConfig:
    """A run of a foreign model that we train, on rows of at most 4,096 tokens where --seq-length says nothing."""
    assert found.model is not None
    if freeze:
        raise ConfigError(f"--freeze: training freezes no part of {with_article(found.family)} yet; leave it out")
    if folder is not None:
        raise ConfigError(
            "--write goes with --config: run `lumina import FOLDER --out start`, then give --config start/config.yaml"
        )
    rows = settings["seq_length"] or min(found.model.max_position_embeddings, _MOST_TOKENS)
    given = overrides({**settings, "seq_length": rows})
    shape = [Override(f"model.{name}", value, "--model") for name, value in found.model.model_dump().items()]
    config = load_config(None, [*shape, Override("run.name", found.name, "--model"), *given]).config
    click.echo(f"{found.name} ({found.family}), rows of {rows} tokens (--seq-length)", err=True)
    if found.ignored:
        click.echo(f"takes no memory, and lumina train does not compute it: {', '.join(found.ignored)}", err=True)
    return config


command.add_command(check)
command.add_command(rehearse)
command.add_command(time)
command.add_command(verify)
