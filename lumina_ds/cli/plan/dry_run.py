"""What `lumina train --dry-run` prints for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lumina_ds.cli.plan.render import render_plan
from lumina_ds.cli.plan.sources import render_sources
from lumina_ds.config.load import ResolvedConfig
from lumina_ds.plan.duration import checkpoint_bytes, describe_saves

if TYPE_CHECKING:
    from lumina_ds.plan.memory import MemoryPlan
    from lumina_ds.ranks.check_run import RunCheck


def print_dry_run(
    resolved: ResolvedConfig,
    values: Mapping[str, Any],
    found: tuple[RunCheck, MemoryPlan, Any],
    device: str,
    command: str,
) -> None:
    """Configuration with origins, what was resolved on `device`, DeepSpeed's JSON, the plan, and the `command`."""
    console, config, origins, (checked, plan, sources) = Console(), resolved.config, resolved.origins, found
    table = Table(box=None, pad_edge=False)
    table.add_column("field", no_wrap=True)
    table.add_column("value")
    table.add_column("origin")
    for name, value in values.items():
        style = "dim" if origins[name] == "default" else None
        table.add_row(name, "" if value is None else str(value), origins[name], style=style)
    console.print(table)
    console.print(
        f"\nDevice: {device}\nPrecision: {checked.precision_reason}\nAttention: {checked.attention.reason}\n"
        f"Fused kernels: {checked.kernels.reason}\n"
    )
    console.print("DeepSpeed JSON:")
    console.print_json(data=checked.deepspeed_json)
    render_plan(plan, console)
    if config.train.auto_micro_batch:
        console.print("The micro-batch is chosen and tried when the ranks start; planned here is the configured one.")
    render_sources(config, sources, console)
    saves = describe_saves(config.train, checkpoint_bytes(config, checked.precision).total)
    console.print(f"Checkpoints: {saves}.", highlight=False)
    console.print(f"Command (after the data is prepared):\n  {command}", soft_wrap=True, highlight=False)
