"""What a run would meet on its cluster: memory of cards and hosts, experts across machines, what must be installed.

Arithmetic on the plan; `lumina plan rehearse` adds what DeepSpeed itself says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lumina_ds.config.deepspeed.combinations import combination_warnings
from lumina_ds.config.deepspeed.tree import section_of, value_at
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan.hardware import Gpu, cards_that_fit
from lumina_ds.plan.memory import MemoryPlan
from lumina_ds.text import format_bytes


@dataclass(frozen=True)
class ClusterFindings:
    """`faults` would end the run, `warnings` slow it down or depend on the machines; each says why and what helps."""

    faults: list[str]
    warnings: list[str]


def cluster_findings(
    config: RunConfig,
    plan: MemoryPlan,
    deepspeed_json: Mapping[str, Any],
    gpus_per_node: int,
    gpu: Gpu | None = None,
    host_memory_gb: float | None = None,
) -> ClusterFindings:
    """Judge `plan` on nodes of `gpus_per_node`; without a card or host memory those two are not judged."""
    faults, warnings = [], list(combination_warnings(deepspeed_json))
    if gpu is not None and plan.peak_bytes > gpu.usable_bytes:
        component, size = max(plan.breakdown.items(), key=lambda item: item[1])
        larger = cards_that_fit(plan.peak_bytes)
        remedy = f"cards of {larger[0].label} hold it, and " if larger else ""
        faults.append(
            f"out of memory: a rank peaks at {format_bytes(plan.peak_bytes)} in {plan.peak_phase}, {format_bytes(size)} of "
            f"it {component}, and {gpu.name} has {format_bytes(gpu.usable_bytes)}; {remedy}lumina plan --gpu {gpu.name} "
            "finds the cheapest layout that fits"
        )
    host = plan.host_bytes * min(gpus_per_node, plan.world_size)
    on_host = value_at(deepspeed_json, "zero_optimization.offload_optimizer.device") != "nvme"
    if host_memory_gb is not None and on_host and host > host_memory_gb * 1e9:
        faults.append(
            f"out of host memory: a node keeps {format_bytes(host)} of offloaded states, and has "
            f"{format_bytes(host_memory_gb * 1e9)}; use more nodes, or offload to NVMe (--deepspeed_config zero3_nvme)"
        )
    size = plan.expert_parallel_size
    if size > gpus_per_node or gpus_per_node % size:
        warnings.append(
            f"expert-parallel groups of {size} reach over nodes of {gpus_per_node} GPUs, so every MoE layer's "
            f"all-to-all crosses the network; {_sizes_within(config, gpus_per_node)} stay inside"
        )
    for section in ("offload_optimizer", "offload_param"):
        path = section_of(deepspeed_json, f"zero_optimization.{section}").get("nvme_path")
        if path:
            warnings.append(f"every node needs the folder {path} on a local disk ({section}.nvme_path)")
    if config.train.flash_attention == "on":
        warnings.append("every node needs the package flash-attn (--flash-attention on)")
    return ClusterFindings(faults, warnings)


def _sizes_within(config: RunConfig, gpus_per_node: int) -> str:
    experts = config.model.num_experts
    sizes = [n for n in range(1, gpus_per_node + 1) if gpus_per_node % n == 0 and experts % n == 0]
    return "sizes " + ", ".join(map(str, sizes))
