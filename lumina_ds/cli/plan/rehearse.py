"""`lumina plan rehearse`: a run of any size set up by DeepSpeed itself on one CPU, and what would fail on the cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.cli.completers import complete_card
from lumina_ds.cli.plan.options import overrides, setting_options
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.deepspeed.report import batch_equation
from lumina_ds.config.load import load_config
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.precision import resolve_precision
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.tensors import num_parameters, parameter_tensors
from lumina_ds.errors import ConfigError
from lumina_ds.plan.cluster import cluster_findings
from lumina_ds.plan.duration import checkpoint_bytes
from lumina_ds.plan.hardware import find_gpu
from lumina_ds.plan.memory import MemoryPlan, plan_memory
from lumina_ds.plan.shape import PARAMETER_BYTES
from lumina_ds.plan.states import ZeroSettings, moment_bytes, optimizer_groups
from lumina_ds.text import counted, format_bytes

if TYPE_CHECKING:
    from lumina_ds.measure.rehearsal import RankRehearsal


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `detail` gives the figures, or why it fails."""

    name: str
    ok: bool
    detail: str


@click.command(
    "rehearse",
    epilog="Example: lumina plan rehearse --config b300 --nodes 32 --gpus 8 --zero 3",
    short_help="set a large run up on one CPU",
)
@click.option("--config", "source", required=True, help="A preset's name or a YAML file.")
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a machine.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines of --gpus each.")
@click.option("--gpu", "gpu_name", shell_complete=complete_card, help="A card, such as h100-80: does a rank fit it?")
@click.option("--host-memory", type=click.FloatRange(min=1), help="GB of a machine: do offloaded states fit it?")
@setting_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def rehearse(
    source: str,
    gpus: int,
    nodes: int,
    gpu_name: str | None,
    host_memory: float | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Set a run up as single ranks of its cluster, on one CPU, without memory for its tensors.

    DeepSpeed's own code takes the configuration, converts the experts, makes the groups, partitions the model and
    saves a checkpoint; its numbers are compared with the plan's. Nothing is computed. Exit code 2 when something
    would fail.
    """
    config = load_config(source, overrides(settings)).config
    gpu = find_gpu(gpu_name) if gpu_name else None
    world_size = gpus * nodes
    bf16 = gpu is None or gpu.bf16
    precision, _ = resolve_precision(config.train.precision, "cuda", bf16, num_parameters(config.model))
    composed = compose_deepspeed(config, world_size, precision)
    plan = plan_memory(config, world_size, precision, "cuda", composed)
    from lumina_ds.measure.rehearsal import rehearse as rehearse_ranks
    from lumina_ds.measure.rehearsal import substituted

    # At ZeRO-3 experts have no files of their own, so that all ranks but the first save alike.
    writer = plan.expert_parallel_size - 1 if plan.zero_stage < 3 else 0
    ranks = sorted({0, writer, world_size - 1})
    rehearsed = rehearse_ranks(config, world_size, precision, composed, ranks)
    checks = rehearsal_checks(config, plan, composed, rehearsed)
    findings = cluster_findings(config, plan, composed, gpus, gpu, host_memory)
    notes = substituted(composed)[1]
    faults = [f"{check.name}: {check.detail}" for check in checks if not check.ok] + findings.faults
    if as_json:
        record = {
            "world_size": world_size,
            "ranks": [{**asdict(each), "files": len(each.files)} for each in rehearsed],
            "checks": [asdict(check) for check in checks],
            "checkpoint": None if any(each.error for each in rehearsed) else _checkpoint(config, plan, rehearsed),
            "faults": faults,
            "warnings": findings.warnings,
            "substituted": notes,
            "ok": not faults,
        }
        click.echo(json.dumps(record, indent=2))
    else:
        _print(plan, checks, rehearsed, findings.faults, findings.warnings, notes)
    if faults:
        raise ConfigError(f"{len(faults)} of the things looked at would fail on the cluster; nothing was started")


def rehearsal_checks(
    config: RunConfig, plan: MemoryPlan, composed: Mapping[str, Any], rehearsed: list[RankRehearsal]
) -> list[Check]:
    """DeepSpeed's numbers against the configuration's and the plan's, one check a line."""
    refused = [f"as rank {each.rank}: {each.error}" for each in rehearsed if each.error]
    batch, fault = batch_equation(composed, plan.world_size)
    checks = [Check("DeepSpeed takes the configuration", not refused, refused[0] if refused else str(batch or fault))]
    if refused:
        return checks
    if plan.parameters.experts:
        checks += _expert_checks(config, plan, rehearsed)
    total = plan.parameters.total
    held = {each.held_elements for each in rehearsed}
    checks.append(
        Check(
            "the ranks' partitions sum to the model",
            held == {total},
            f"{total:,} elements, and {max(each.padding_elements for each in rehearsed):,} of padding"
            if held == {total}
            else f"{', '.join(f'{n:,}' for n in sorted(held))} elements, and the model has {total:,}",
        )
    )
    # Of Muon's momentum the plan has the fullest rank's.
    has_whole_momenta = bool(OPTIMIZERS[config.train.optimizer].own_kinds)
    planned = _planned_states(config, plan, composed)
    for each in rehearsed:
        found = (each.parameter_bytes, each.master_bytes, each.moment_bytes)
        names = ("parameters", "master weights", "moments")
        sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in zip(names, found, strict=True))
        wrong = [
            f"{name} {size:,} bytes, planned {expected:,}"
            for name, size, expected in zip(names, found, planned, strict=True)
            if size != expected and not (name == "moments" and has_whole_momenta and size < expected)
        ]
        checks.append(Check(f"rank {each.rank} holds what is planned", not wrong, "; ".join(wrong) or sizes))
    saved = _checkpoint(config, plan, rehearsed)
    checks.append(
        Check(
            "a checkpoint can be saved",
            bool(saved["files"]),
            f"{counted(saved['files'], 'file')}, {format_bytes(saved['bytes'])}; DeepSpeed's largest {format_bytes(saved['largest'])}",
        )
    )
    return checks


def _expert_checks(config: RunConfig, plan: MemoryPlan, rehearsed: list[RankRehearsal]) -> list[Check]:
    size, world, experts = plan.expert_parallel_size, plan.world_size, config.model.num_experts
    each = experts // size
    wrong = []
    for rank in rehearsed:
        first = rank.rank // size * size
        place = rank.rank - first
        expected = (
            list(range(first, first + size)),
            list(range(place, world, size)),
            list(range(place * each, (place + 1) * each)),
        )
        if (rank.expert_group, rank.replica_group, rank.experts) != expected:
            wrong.append(f"rank {rank.rank}: group {rank.expert_group}, experts {rank.experts}")
    owned = f"rank r holds experts {each} x (r mod {size}) to {each} x (r mod {size}) + {each - 1} of every MoE layer"
    return [
        Check(
            "groups divide, every expert has a rank",
            not wrong,
            "; ".join(wrong)
            or f"{counted(world // size, 'group')} of {counted(size, 'rank')}, {counted(world // size, 'copy', 'copies')} of each expert; {owned}",
        )
    ]


def _planned_states(config: RunConfig, plan: MemoryPlan, composed: Mapping[str, Any]) -> tuple[int, int, int]:
    """Parameters, master weights and moments of a rank by the plan's formulas, wherever they are kept."""
    b = PARAMETER_BYTES[plan.precision]
    zero = ZeroSettings.from_json(composed, b)
    groups = optimizer_groups(config.model, plan.world_size, plan.expert_parallel_size, config.train.optimizer)
    if zero.stage == 0:
        n = sum(group.numel for group in groups)
        return b * n, 0, moment_bytes(groups, zero, b)
    share = sum(group.shards if zero.stage == 3 else group.partition for group in groups)
    parameters = plan.states["parameters"] + (b * share if zero.offload_param != "none" else 0)
    return parameters, 4 * share, moment_bytes(groups, zero, b)


def _checkpoint(config: RunConfig, plan: MemoryPlan, rehearsed: list[RankRehearsal]) -> dict[str, int]:
    """Files of all ranks: each one's pieces and random state, the whole weights with their index, the tokenizer and
    the manifest (lumina_ds/checkpoint/state.py), of which only pieces and weights weigh."""
    from lumina_ds.checkpoint.consolidate import weight_file_plan

    width, world = PARAMETER_BYTES[plan.precision], plan.world_size
    sizes = {tensor.name: width * tensor.numel for tensor in parameter_tensors(config.model)}
    return {
        "files": 2 * world + len(weight_file_plan(sizes, world)) + 3,
        "bytes": checkpoint_bytes(config, plan.precision).total,
        "largest": max((size for each in rehearsed for size in each.files.values()), default=0),
    }


def _print(
    plan: MemoryPlan,
    checks: list[Check],
    rehearsed: list[RankRehearsal],
    faults: list[str],
    warnings: list[str],
    notes: list[str],
) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    ranks = ", ".join(str(each.rank) for each in rehearsed)
    console.print(
        f"{plan.name} on {counted(plan.world_size, 'rank')}, ZeRO {plan.zero_stage}, expert parallel {plan.expert_parallel_size}, "
        f"{plan.precision}; rehearsed as ranks {ranks}"
    )
    for check in checks:
        console.print(f"{'✔' if check.ok else '✖'} {check.name}: {check.detail}")
    for fault in faults:
        console.print(f"✖ {fault}")
    for warning in warnings:
        console.print(f"! {warning}")
    for note in notes:
        console.print(f"  rehearsed {note}")
