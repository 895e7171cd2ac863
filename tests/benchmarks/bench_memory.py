"""Predicted memory beside measured, over many configurations on this machine, and beside DeepSpeed's own estimators.

    python tests/benchmarks/bench_memory.py [--ranks N] [--set gpu|cpu] [--only TEXT] [--plan-only] [--out TABLE.md]

Every configuration takes three real steps through the deepspeed runner; the last one is measured, on a GPU by
max_memory_allocated, on a CPU by torch's record of every allocation. Without --set it is the set of what the machine
has. --plan-only starts nothing and prints what would be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumina_ds.cli.plan.verify import STATES, allocated_bytes, compare, memory_request, plan_request
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.schema import RunConfig
from lumina_ds.measure.requests import measure_on_ranks
from lumina_ds.plan.memory import PHASES, MemoryPlan
from lumina_ds.text import GIB

# On a CPU: as wide and with as many tokens as it takes for the figures to be those of the formulas, not of a few
# numbers on the side.
WIDE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "moe_intermediate_size": 176,
}
DENSE: dict[str, Any] = {"num_experts": 0, "moe_intermediate_size": None, "intermediate_size": 704}
SHARED: dict[str, Any] = {
    "num_shared_experts": 1,
    "first_k_dense_layers": 1,
    "intermediate_size": 704,
    "qk_norm": True,
    "tie_word_embeddings": True,
}
VARIANTS = {"": {}, "dense": DENSE, "shared": SHARED}
Case = tuple[str, RunConfig, str]


def cases(which: str, ranks: int) -> Iterator[Case]:
    """(name, run, precision) of the set for a GPU or a CPU."""
    yield from gpu_cases(ranks) if which == "gpu" else cpu_cases(ranks)


def gpu_cases(ranks: int) -> Iterator[Case]:
    for preset in ("m70_memory", "m120_speed", "b1"):
        for stage in (1, 2, 3):
            for precision in ("bf16", "mixed_bf16"):
                yield case(preset, stage, precision, 1)
        yield case(preset, 2, "bf16", 4)
        yield case(preset, 2, "bf16", 4, checkpointing="full")
        yield case(preset, 1, "bf16", 2, accumulation=2)
        if ranks > 1:
            yield case(preset, 2, "bf16", 1, experts=2)
            yield case(preset, 3, "bf16", 1, experts=2)


def cpu_cases(ranks: int) -> Iterator[Case]:
    """Every stage and precision, dense and with experts; each way of checkpointing; accumulation; EP 2."""
    for preset in ("wide", "wide dense"):
        for stage in (0, 1, 2, 3):
            for precision in ("fp32", "mixed_bf16", "bf16"):
                if stage or precision != "bf16":
                    yield case(preset, stage, precision)
        for mode, precision in (("full", "fp32"), ("attention", "bf16"), ("experts", "mixed_bf16")):
            yield case(preset, 2, precision, checkpointing=mode)
        yield case(preset, 3, "bf16", checkpointing="full")
        yield case(preset, 1, "fp32", accumulation=2)
        yield case(preset, 2, "bf16", accumulation=2)
    yield case("wide shared", 2, "fp32")
    yield case("wide shared", 1, "bf16", checkpointing="full")
    if ranks > 1:
        for stage, precision in (
            (0, "mixed_bf16"),
            (1, "fp32"),
            (2, "mixed_bf16"),
            (2, "bf16"),
            (3, "fp32"),
            (3, "bf16"),
        ):
            yield case("wide", stage, precision, experts=2)
        yield case("wide", 3, "mixed_bf16", checkpointing="full", experts=2)
        yield case("wide shared", 2, "bf16", checkpointing="experts", experts=2)


def case(
    preset: str,
    stage: int,
    precision: str,
    micro_batch: int = 2,
    checkpointing: str = "none",
    accumulation: int = 1,
    experts: int = 1,
) -> Case:
    """`preset` is a preset's name or "wide", and one of VARIANTS."""
    name, _, variant = preset.partition(" ")
    model = VARIANTS[variant]
    if name == "wide":
        name, model = "debug", WIDE | model
    values: dict[str, Any] = {
        "deepspeed.zero_stage": stage,
        "deepspeed.expert_parallel_size": experts,
        "train.micro_batch_size": micro_batch,
        "train.gradient_accumulation_steps": accumulation,
        "train.activation_checkpointing": checkpointing,
        "train.global_batch_size": None,
    }
    values |= {f"model.{key}": value for key, value in model.items()}
    run = load_config(name, [Override(key, value, key) for key, value in values.items()]).config
    parts = [preset, f"ZeRO-{stage}", precision, f"batch {micro_batch}"]
    parts += [f"x {accumulation}"] if accumulation > 1 else []
    parts += [f"checkpointing {checkpointing}"] if checkpointing != "none" else []
    parts += [f"EP {experts}"] if experts > 1 else []
    return " ".join(parts), run, precision


def deepspeed_estimate(plan: MemoryPlan, run: RunConfig) -> int | None:
    """What estimate_zero2|zero3_model_states_mem_needs_all_cold prints for one node without offload, on a GPU."""
    total, ranks = plan.parameters.total, plan.world_size
    if plan.zero_stage == 2:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        return int(estimate_zero2_model_states_mem_needs(total, ranks, 1, cpu_offload=False)[1])
    if plan.zero_stage == 3:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        # The largest layer as its _all_live form counts it: the module that owns the most parameters.
        model = run.model
        experts = 3 * model.num_experts * model.hidden_size * (model.moe_intermediate_size or 0)
        largest = max(model.vocab_size * model.hidden_size, experts)
        found = estimate_zero3_model_states_mem_needs(total, largest, ranks, 1, cpu_offload=False)
        return int(found[1])
    return None


def rows(chosen: list[Case], ranks: int, device: str) -> Iterator[dict[str, Any]]:
    """Measure all of them in one start and compare."""
    asked = [memory_request(run, ranks, precision, device) for _, run, precision in chosen]
    measured = measure_on_ranks([request for request, _ in asked], ranks)
    for (name, run, _), (request, plan), found in zip(chosen, asked, measured, strict=True):
        # No plan can know how many rows the router sends where.
        plan = plan_request(request, ranks, device, found) if found.get("expert_load") else plan
        row: dict[str, Any] = {"name": name, "device": found["device"], "estimate": deepspeed_estimate(plan, run)}
        row["predicted_peak"] = max(allocated_bytes(plan, phase) for phase in PHASES)
        row["predicted_total"] = plan.peak_bytes
        row["predicted_states"] = sum(plan.states[state] for state in STATES)
        if found.get("out_of_memory"):
            yield row | {"out_of_memory": True}
            continue
        row["measured_states"] = sum(found["components"][state] for state in STATES)
        row["measured_peak"] = max(found["peaks"].values())
        row["lines"] = {line.name: (line.predicted, line.measured) for line in compare(plan, found)}
        yield row


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown; errors are predicted over measured, less one."""
    lines = [
        "| configuration | states, MiB | planned | DeepSpeed's estimate | activations, MiB | planned | peak, MiB | planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in measured:
        if row.get("out_of_memory"):
            said = f"planned {row['predicted_total'] / GIB:.1f} GiB"
            lines.append(f"| {row['name']} | out of memory | | | | | | {said} |")
            continue
        states, peak = row["measured_states"], row["measured_peak"]
        kept = row["lines"]["activations"]
        estimate = _error(row["estimate"], states) if row["estimate"] else "none for this stage"
        lines.append(
            f"| {row['name']} | {_mib(states)} | {_error(row['predicted_states'], states)} | {estimate} | "
            f"{_mib(kept[1])} | {_error(*kept)} | {_mib(peak)} | {_error(row['predicted_peak'], peak)} |"
        )
    return "\n".join(lines) + "\n"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f}"


def _error(predicted: int, measured: int) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, help="ranks on this machine; all its GPUs, or 2 on a CPU")
    parser.add_argument("--set", choices=("gpu", "cpu"), dest="which")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the table here, and the figures beside it as JSON")
    parsed = parser.parse_args(arguments)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    which = parsed.which or ("gpu" if device == "cuda" else "cpu")
    ranks = parsed.ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    chosen = [entry for entry in cases(which, ranks) if parsed.only in entry[0]]
    if parsed.plan_only:
        for name, run, precision in chosen:
            plan = memory_request(run, ranks, precision, "cuda" if which == "gpu" else "cpu")[1]
            print(f"{name}: {plan.peak_bytes / GIB:.2f} GiB in {plan.peak_phase}")
        return 0
    found = list(rows(chosen, ranks, device))
    text = f"{ranks} x {found[0]['device']}, {len(found)} configurations\n\n{table(found)}"
    sys.stdout.write(text)
    if parsed.out:
        parsed.out.write_text(text, encoding="utf-8")
        parsed.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    # A plan that fits where the run did not is the one error that costs a user money.
    return int(any(row.get("out_of_memory") and row["predicted_total"] <= _capacity() for row in found))


def _capacity() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    sys.exit(main())
