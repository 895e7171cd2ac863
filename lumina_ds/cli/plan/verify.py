"""`lumina plan verify`: a few real steps on this machine, predicted beside measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click

from lumina_ds.cli.plan.options import overrides, setting_options
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.load import load_config
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan.memory import PHASES, MemoryPlan, plan_memory
from lumina_ds.plan.shape import ExpertLoad
from lumina_ds.text import format_bytes

STATES = ("parameters", "master weights", "moments", "gradients")
# Outside the allocator, or not a prediction.
_NOT_ALLOCATED = ("margin", "CUDA context and NCCL")


@dataclass(frozen=True)
class Compared:
    """One line of the table, in bytes of the fullest rank."""

    name: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted > 0)


@click.command(
    "verify",
    epilog="Example: lumina plan verify --config debug --gpus 2 --zero 2",
    short_help="predicted beside measured memory, here",
)
@click.option("--config", "source", required=True, help="A preset's name or a YAML file.")
@click.option("--gpus", type=click.IntRange(min=1), help="Ranks on this machine; all its GPUs, or 1 on a CPU.")
@setting_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def verify(source: str, gpus: int | None, as_json: bool, **settings: Any) -> None:
    """Run 3 real steps on this machine, with random tokens, and print predicted beside measured memory.

    Model states are live tensors. Peaks come from the allocator on a GPU, and on a CPU from torch's record of every
    allocation; the margin and the CUDA context of a plan are left out of the comparison.
    """
    config = load_config(source, overrides(settings)).config
    from lumina_ds.engine.resources import num_local_devices
    from lumina_ds.measure.requests import measure_on_ranks
    from lumina_ds.ranks.check_run import check_ranks, check_run

    world_size = gpus or num_local_devices()
    checked = check_run(config, world_size)
    device, precision = checked.device, checked.precision
    request, plan = memory_request(config, world_size, precision, device)
    check_ranks(world_size, device, plan.peak_bytes)
    (measured,) = measure_on_ranks([request], world_size)
    plan = plan_request(request, world_size, device, measured)
    table = compare(plan, measured)
    if as_json:
        lines = [{**asdict(line), "error": line.error} for line in table]
        document = {"device": measured["device"], "world_size": world_size, "precision": precision, "lines": lines}
        click.echo(json.dumps(document | {"seconds": measured["seconds"]}, indent=2))
    else:
        _print(plan, measured["device"], table)


def memory_request(
    config: RunConfig, world_size: int, precision: str, device: str
) -> tuple[dict[str, Any], MemoryPlan]:
    """What the ranks are asked to run, and the plan of the same."""
    composed = compose_deepspeed(config, world_size, precision)
    asked = {"config": config.model_dump(mode="json"), "precision": precision, "deepspeed": composed}
    return asked, plan_request(asked, world_size, device)


def plan_request(
    request: Mapping[str, Any], world_size: int, device: str, measured: Mapping[str, Any] | None = None
) -> MemoryPlan:
    """The plan of what `memory_request` asked for, with this CPU's way to multiply bf16; with the load of the experts
    that was `measured`, which no plan can know, instead of the assumed one."""
    import torch

    from lumina_ds.model.cpu_products import product_dtype

    load = (measured or {}).get("expert_load") or {}
    width = (
        product_dtype(torch.bfloat16, "cpu").itemsize if device == "cpu" and request["precision"] != "fp32" else None
    )
    config = RunConfig.model_validate(request["config"])
    return plan_memory(
        config, world_size, request["precision"], device, request["deepspeed"], width, ExpertLoad(**load)
    )


def compare(plan: MemoryPlan, measured: Mapping[str, Any]) -> list[Compared]:
    """Model states, activations (where nothing is recomputed), the peak of every phase, and the peak of all."""
    lines = [Compared(name, plan.states[name], measured["components"][name]) for name in STATES]
    lines.append(Compared("activations", plan.decoder_end, measured["activations"]))
    planned = {phase: allocated_bytes(plan, phase) for phase in PHASES}
    lines += [Compared(f"peak of {phase}", planned[phase], measured["peaks"][phase]) for phase in PHASES]
    return [*lines, Compared("peak", max(planned.values()), max(measured["peaks"].values()))]


def allocated_bytes(plan: MemoryPlan, phase: str) -> int:
    """A phase of the plan without what no allocator sees."""
    return sum(size for name, size in plan.phases[phase].items() if name not in _NOT_ALLOCATED)


def _print(plan: MemoryPlan, device: str, table: list[Compared]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    console.print(
        f"{plan.name} on {plan.world_size} x {device}: ZeRO {plan.zero_stage}, expert parallel "
        f"{plan.expert_parallel_size}, {plan.precision}, {plan.micro_batch_size} x {plan.seq_length} tokens"
    )
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("per rank", no_wrap=True)
    for title in ("predicted", "measured", "error"):
        shown.add_column(title, justify="right", no_wrap=True)
    for line in table:
        shown.add_row(
            line.name, format_bytes(line.predicted), format_bytes(line.measured), f"{100 * line.error:+.1f} %"
        )
    console.print(shown)
