"""`lumina presets`: the shipped model presets, their shapes and counted sizes."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from lumina_ds.cli.completers import complete_preset
from lumina_ds.config.load import load_config, preset_names
from lumina_ds.errors import ConfigError
from lumina_ds.plan.parameters import count_parameters
from lumina_ds.text import format_bytes, format_count, nearest


@click.group(
    invoke_without_command=True, epilog="Example: lumina presets show b7 --json", short_help="list the model presets"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the shipped model presets, or show one of them."""
    if context.invoked_subcommand is None:
        _list(as_json)


@command.command("list", epilog="Example: lumina presets list --json")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def list_presets(as_json: bool) -> None:
    """All presets, smallest first."""
    _list(as_json)


@command.command("show", epilog="Example: lumina presets show debug")
@click.argument("name", shell_complete=complete_preset)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def show_preset(name: str, as_json: bool) -> None:
    """Every setting and counted size of the preset NAME."""
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}{nearest(name, preset_names())} (see: lumina presets list)")
    record = _record(name)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    from rich.console import Console

    _print_preset(record, Console(file=sys.stdout))


def _list(as_json: bool) -> None:
    records = sorted((_record(name) for name in preset_names()), key=lambda record: record["parameters"]["total"])
    if as_json:
        click.echo(json.dumps(records, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("preset", no_wrap=True)
    for heading in ("total", "active", "experts", "layers", "hidden", "context", "BF16 size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        model, counts = record["model"], record["parameters"]
        table.add_row(
            record["name"],
            format_count(counts["total"]),
            format_count(counts["active"]),
            f"{model['num_experts']} (top {model['num_experts_per_tok']})",
            str(model["num_hidden_layers"]),
            str(model["hidden_size"]),
            str(model["max_position_embeddings"]),
            format_bytes(counts["bf16_bytes"]),
        )
    Console(file=sys.stdout).print(table)


def _record(name: str) -> dict[str, Any]:
    config = load_config(name).config
    counts = count_parameters(config.model)
    return {
        "name": name,
        "description": config.description,
        "parameters": {**vars(counts), "bf16_bytes": counts.bf16_bytes},
        "model": config.model.model_dump(),
        "train": config.train.model_dump(),
        "deepspeed": config.deepspeed.model_dump(),
    }


def _print_preset(record: dict[str, Any], console: Any) -> None:
    counts = record["parameters"]
    console.print(f"[bold]{record['name']}[/bold]: {record['description']}")
    for part, value in counts.items():
        shown = format_bytes(value) if part == "bf16_bytes" else f"{value:,}"
        if value:
            console.print(f"  {part:<22}{shown:>18}", highlight=False)
    for section in ("model", "train", "deepspeed"):
        console.print(f"[bold]{section}[/bold]")
        for field, value in record[section].items():
            if value is not None:
                console.print(f"  {field:<30}{value}", highlight=False)
