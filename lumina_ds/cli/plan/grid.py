"""The grid of `lumina plan`: ZeRO stage x number of GPUs x expert parallelism, and what fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.hardware import usable_bytes
from lumina_ds.plan.layout import Composer
from lumina_ds.plan.memory import plan_memory
from lumina_ds.text import GIB, counted

if TYPE_CHECKING:
    from rich.console import Console

GPUS = (1, 2, 4, 8, 16, 32, 64)
STAGES = (0, 1, 2, 3)


def plan_grid(config: RunConfig, world_size: int, composer: Composer) -> list[dict[str, Any]]:
    """Peak bytes for every ZeRO stage, expert-parallel size and number of GPUs, the run's own among them; None where
    the layout is refused."""
    # The grid varies the ranks, which a fixed global batch would not allow.
    varied = config.model_copy(deep=True)
    varied.train.global_batch_size = None
    counts = sorted({*GPUS, world_size})
    cells: list[dict[str, Any]] = []
    for stage in STAGES:
        varied.deepspeed.zero_stage = stage  # type: ignore[assignment]
        for size in expert_sizes(config.model, counts, config.deepspeed.expert_parallel_size):
            varied.deepspeed.expert_parallel_size = size
            for gpus in counts:
                peak = None if gpus % size else _peak(varied, gpus, composer)
                cells.append({"zero_stage": stage, "expert_parallel_size": size, "gpus": gpus, "peak_bytes": peak})
    return cells


def _peak(config: RunConfig, gpus: int, composer: Composer) -> int | None:
    try:
        json = composer.json(config, gpus)
        return plan_memory(config, gpus, composer.precision, deepspeed_json=json).peak_bytes
    except ConfigError:
        return None


def expert_sizes(model: ModelConfig, counts: Sequence[int], own: int) -> list[int]:
    """Sizes that divide the experts and some number of GPUs, and the run's own."""
    if not model.num_experts:
        return [own]
    divisors = [size for size in range(1, max(counts) + 1) if model.num_experts % size == 0]
    return sorted({own} | {size for size in divisors if any(count % size == 0 for count in counts)})


def render_grid(grid: list[dict[str, Any]], gpu_memory: float, console: Console) -> None:
    """Print the grid in GiB, a line for each stage and expert-parallel size, marking what fits `gpu_memory` GB."""
    from rich.table import Table

    limit = usable_bytes(gpu_memory)
    counts = sorted({cell["gpus"] for cell in grid})
    sizes = sorted({cell["expert_parallel_size"] for cell in grid})
    table = Table(box=None, header_style="bold", pad_edge=False, title=f"GiB per GPU, {gpu_memory:g} GB cards")
    table.add_column("ZeRO", no_wrap=True)
    if len(sizes) > 1:
        table.add_column("EP", justify="right", no_wrap=True)
    for gpus in counts:
        table.add_column(counted(gpus, "GPU"), justify="right", no_wrap=True)
    peaks = {(cell["zero_stage"], cell["expert_parallel_size"], cell["gpus"]): cell["peak_bytes"] for cell in grid}
    for stage in STAGES:
        valid = [size for size in sizes if any(peaks[stage, size, gpus] is not None for gpus in counts)]
        for size in valid or sizes[:1]:
            shown = ["" if size != (valid or sizes)[0] else str(stage)]
            shown += [str(size) if valid else "any"] if len(sizes) > 1 else []
            table.add_row(*shown, *(_cell(peaks[stage, size, gpus], limit) for gpus in counts))
    console.print(table)
    console.print("EP: ranks that share one set of experts. ✔ fits, ✖ does not, - not a valid layout", highlight=False)


def grid_record(grid: list[dict[str, Any]], gpu_memory: float) -> dict[str, Any]:
    """The grid, with what fits a card of `gpu_memory` GB, as one JSON-ready mapping."""
    limit = usable_bytes(gpu_memory)
    fits = [{**cell, "fits": cell["peak_bytes"] is not None and cell["peak_bytes"] <= limit} for cell in grid]
    return {"gpu_memory_gb": gpu_memory, "grid": fits}


def _cell(peak: int | None, limit: int) -> str:
    if peak is None:
        return "-"
    return f"[green]{_gib(peak)} ✔[/green]" if peak <= limit else f"[red]{_gib(peak)} ✖[/red]"


def _gib(peak: int) -> str:
    """Narrow enough for eight columns."""
    gib = peak / GIB
    return f"{gib:.1f}" if gib < 1000 else f"{gib:.0f}"
