"""A memory plan as a table for people and as a mapping for programs; `lumina plan` and `train --dry-run` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lumina_ds.plan.hardware import cards, cards_that_fit
from lumina_ds.plan.memory import COMPONENTS, PHASES, MemoryPlan
from lumina_ds.text import counted, format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console


def render_plan(plan: MemoryPlan, console: Console, gpus_per_node: int | None = None) -> None:
    """Print the layout, the breakdown by phase, the peak, and the cards that hold it."""
    from rich.table import Table

    counts = plan.parameters
    console.print(
        f"[bold]{plan.name}[/bold]: {format_count(counts.total)} parameters, {format_count(counts.active)} active, "
        f"{format_count(plan.flops_per_token)}FLOP per token",
        highlight=False,
    )
    console.print(
        f"{counted(plan.world_size, 'rank')}, ZeRO {plan.zero_stage}, expert parallel {plan.expert_parallel_size}, "
        f"{plan.precision}, {plan.micro_batch_size} x {plan.seq_length} tokens, accumulation "
        f"{plan.gradient_accumulation_steps}, activation checkpointing {plan.activation_checkpointing}",
        highlight=False,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("per rank", no_wrap=True)
    for phase in PHASES:
        table.add_column(phase, justify="right", no_wrap=True, style="bold" if phase == plan.peak_phase else "")
    for component in COMPONENTS:
        sizes = [plan.phases[phase][component] for phase in PHASES]
        if any(sizes):
            table.add_row(component, *(format_bytes(size) if size else "-" for size in sizes))
    table.add_section()
    table.add_row("total", *(format_bytes(plan.phase_bytes(phase)) for phase in PHASES))
    console.print(table)
    peak = f"Peak {format_bytes(plan.peak_bytes)} in {plan.peak_phase} ({plan.peaks[plan.peak_phase].label})."
    console.print(peak, highlight=False)
    if plan.host_bytes:
        ranks = gpus_per_node or 1
        node = (
            f" per node: {format_bytes(ranks * plan.host_bytes)} for {counted(ranks, 'rank')},"
            if gpus_per_node
            else ":"
        )
        console.print(f"Host memory{node} {format_bytes(plan.host_bytes)} for each.", highlight=False)
    if plan.device == "cuda":
        known = cards()
        none = f"none of {known[0].memory_gb} to {known[-1].label}"
        fitting = ", ".join(card.label for card in cards_that_fit(plan.peak_bytes))
        console.print(f"Fits on cards of: {fitting or none}.", highlight=False)


def plan_record(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as one JSON-ready mapping."""
    layout = {
        name: value for name, value in vars(plan).items() if name not in ("parameters", "phases", "peaks", "shape")
    }
    return {
        **layout,
        "parameters": {**vars(plan.parameters), "bf16_bytes": plan.parameters.bf16_bytes},
        "moments": {phase: plan.peaks[phase].label for phase in PHASES},
        "phases": {phase: dict(plan.phases[phase]) for phase in PHASES},
        "peak_phase": plan.peak_phase,
        "peak_bytes": plan.peak_bytes,
        "fits_on_gb": [card.memory_gb for card in cards_that_fit(plan.peak_bytes)] if plan.device == "cuda" else None,
    }
