"""`lumina plan time`: how long a run takes, what its checkpoints weigh, what it costs."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.plan_options import overrides, setting_options
from lumina_ds.cli.presets import format_bytes, format_count
from lumina_ds.config.load import load_config
from lumina_ds.config.precision import resolve_precision
from lumina_ds.config.tensors import num_parameters
from lumina_ds.plan.duration import TimePlan, plan_time
from lumina_ds.plan.hardware import find_gpu

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class TokenCount(click.ParamType):
    """A number of tokens: 300000000, 3e8, 300M, 1.5B."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmbt]?)", str(value).lower().replace("_", ""))
        try:
            number = int(float(found[1]) * _SUFFIXES[found[2]]) if found else 0
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value} is no number of tokens; write it as 300000000, 3e8 or 300M", param, ctx)
        return number


@click.command("time", epilog="Example: lumina plan time --config b7 --gpus 8 --tokens 10B --price 2.50")
@click.option("--config", "source", required=True, help="A preset's name or a YAML file.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of a machine.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines of --gpus each.")
@click.option("--gpu", "gpu_name", default="h100-80", show_default=True, help="A card, such as a100-80.")
@click.option("--tokens", type=TokenCount(), help="Tokens to train, all epochs together: 10B, 3e8.")
@click.option("--data", type=click.Path(path_type=Path), help="A shard folder: its tokens times the run's epochs.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Model FLOPs utilization to assume.")
@click.option("--price", type=click.FloatRange(min=0), help="Of one GPU for an hour, in any currency.")
@setting_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def time(
    source: str,
    gpus: int,
    nodes: int,
    gpu_name: str,
    tokens: int | None,
    data: Path | None,
    mfu: float | None,
    price: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time, checkpoints and cost of a run, from its FLOPs and an assumed utilization of the GPUs."""
    config = load_config(source, overrides(settings)).config
    gpu = find_gpu(gpu_name)
    if tokens is not None and data is not None:
        raise click.UsageError("--tokens and --data both say how much is trained; give one of them")
    if data is not None:
        from lumina_ds.data.manifest import read_manifest

        tokens = round(read_manifest(data).totals.tokens * config.train.epochs)
    precision, _ = resolve_precision(config.train.precision, "cuda", gpu.bf16, num_parameters(config.model))
    plan = plan_time(config, gpus * nodes, gpu, precision, tokens, mfu, price)
    if as_json:
        click.echo(json.dumps(_record(plan), indent=2))
    else:
        _print(plan, price)


def _record(plan: TimePlan) -> dict[str, Any]:
    derived = ("flops_per_token", "tokens_per_second", "gpu_hours")
    record = {**asdict(plan), **{name: getattr(plan, name) for name in derived}}
    record["checkpoint"]["total"] = plan.checkpoint.total
    return record


def _print(plan: TimePlan, price: float | None) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(f"[bold]{plan.name}[/bold] on {plan.world_size} x {plan.gpu}, {plan.precision}")
    for part, flops in plan.flops.items():
        if flops:
            share = 100 * flops / plan.flops_per_token
            console.print(f"  {part:<24}{format_count(flops):>8}FLOP per token {share:5.1f} %")
    console.print(f"MFU {100 * plan.mfu:.0f} %, assumed ({plan.mfu_source}); --mfu sets it.")
    console.print(
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {_duration(plan.step_seconds)} each: "
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
    console.print(f"{plan.num_checkpoints} saved; at most {format_bytes(plan.disk_bytes)} of disk at once.")


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.2f} seconds"
