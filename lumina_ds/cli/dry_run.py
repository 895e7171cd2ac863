"""`lumina train --dry-run`: everything a run would use, without starting one."""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.table import Table

from lumina_ds.cli.plan.render import plan_record, render_plan
from lumina_ds.config.load import ResolvedConfig
from lumina_ds.plan.memory import plan_memory
from lumina_ds.ranks.check_run import check_run
from lumina_ds.ranks.runner import planned_world_size, runner_command
from preprocess.prepare import check_sources


def show_dry_run(resolved: ResolvedConfig, runner: list[str], arguments: list[str], as_json: bool) -> None:
    """Print the resolved configuration with origins, the DeepSpeed JSON, the memory plan and the command."""
    config = resolved.config
    world_size = planned_world_size(runner)
    checked = check_run(config, world_size)
    check_sources(config)
    plan = plan_memory(config, world_size, checked.precision, checked.device, checked.deepspeed_json)
    started = [word for word in arguments if word not in ("--dry-run", "--json")]
    command = shlex.join(["deepspeed", *runner_command(runner, started)[3:]])
    tree = config.model_dump()
    values = {name: _value(tree, name) for name in resolved.origins}
    if as_json:
        document = {
            "config": {name: {"value": value, "origin": resolved.origins[name]} for name, value in values.items()},
            "deepspeed": checked.deepspeed_json,
            "plan": plan_record(plan),
            "precision": {"value": checked.precision, "reason": checked.precision_reason},
            "attention": {"value": checked.attention.backend, "reason": checked.attention.reason},
            "fused_kernels": {"value": list(checked.kernels.names), "reason": checked.kernels.reason},
            "command": command,
        }
        print(json.dumps(document, indent=2))
        return
    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("field", no_wrap=True)
    table.add_column("value")
    table.add_column("origin")
    for name, value in values.items():
        style = "dim" if resolved.origins[name] == "default" else None
        table.add_row(name, "" if value is None else str(value), resolved.origins[name], style=style)
    console.print(table)
    console.print(
        f"\nPrecision: {checked.precision_reason}\nAttention: {checked.attention.reason}\n"
        f"Fused kernels: {checked.kernels.reason}\n"
    )
    console.print("DeepSpeed JSON:")
    console.print_json(data=checked.deepspeed_json)
    render_plan(plan, console)
    if config.train.auto_micro_batch:
        console.print("The micro-batch is chosen and tried when the ranks start; planned here is the configured one.")
    console.print("Command (started from this folder; the data is prepared first):")
    console.print(f"  {command}", soft_wrap=True, highlight=False)


def _value(tree: object, name: str) -> object:
    for part in name.split("."):
        assert isinstance(tree, dict)
        tree = tree[part]
    return tree
