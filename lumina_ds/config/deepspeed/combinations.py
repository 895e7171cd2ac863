"""Settings that DeepSpeed 0.19.8 does not take together: refused late, or accepted and handled wrongly.

Faults stop a run; warnings say what a setting costs or that it has no effect. Each says the way that works.
Sources: deepspeed/runtime/config.py, runtime/zero/config.py, runtime/engine.py, module_inject/auto_ep.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from lumina_ds.config.deepspeed.tree import AUTO, is_above, is_enabled, section_of, value_at

# Names of sections from before they were sections.
OLD_NAMES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_HALF_DTYPES = {"bf16": ("bf16", "bfloat16", "torch.bfloat16"), "fp16": ("fp16", "float16", "torch.float16", "half")}


def precision_faults(json: Mapping[str, Any]) -> list[str]:
    """Faults of the precision sections among themselves and with the ZeRO stage."""
    faults: list[str] = []
    stage = _stage(json)
    bf16, fp16, autocast = _bf16(json), is_enabled(json, "fp16"), is_enabled(json, "torch_autocast")
    if stage not in (0, 1, 2, 3, AUTO):
        faults.append(f"zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    if bf16 and fp16:
        faults.append("bf16 and fp16 are both enabled; enable one of them")
    if bf16 and stage == 0:
        faults.append(
            "bf16 with ZeRO stage 0 takes an optimizer path that diverges from the other stages; "
            "use stage 1, or torch_autocast (--precision mixed_bf16)"
        )
    for section, enabled in (("bf16", bf16), ("fp16", fp16)):
        accumulation = value_at(json, "data_types.grad_accum_dtype")
        if enabled and stage == 0 and accumulation not in (None, AUTO, *_HALF_DTYPES[section]):
            faults.append(
                f"data_types.grad_accum_dtype {accumulation!r} with {section} needs ZeRO-1 or above; use stage 2"
            )
        if value_at(json, f"{section}.{section}_master_weights_and_grads") is True and stage == 0:
            faults.append(f"{section}.{section}_master_weights_and_grads needs ZeRO stage 1, 2 or 3; set the stage")
    if value_at(json, "bf16.bf16_optimizer_states") is True and not value_at(
        json, "bf16.bf16_master_weights_and_grads"
    ):
        faults.append("bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads true; set both")
    if autocast and value_at(json, "zero_optimization.zero_quantized_weights") is True:
        faults.append("torch_autocast excludes zero_optimization.zero_quantized_weights; set one of them to false")
    return faults


def zero_faults(json: Mapping[str, Any]) -> list[str]:
    """Faults inside the zero_optimization section."""
    faults: list[str] = []
    zero, stage = section_of(json, "zero_optimization"), _stage(json)
    if section_of(json, "zero_optimization.offload_param") and stage in (0, 1, 2):
        faults.append(f"zero_optimization.offload_param needs stage 3, not {stage}; use --zero 3 or remove it")
    if section_of(json, "zero_optimization.offload_optimizer") and stage == 0:
        faults.append("zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0; use --zero 2 or remove it")
    for section in ("offload_param", "offload_optimizer"):
        offload = section_of(zero, section)
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            faults.append(
                f"zero_optimization.{section}.device is nvme, so its nvme_path must name a folder on a local disk"
            )
    for old, new in OLD_NAMES.items():
        if zero.get(old) and section_of(zero, new):
            faults.append(f"zero_optimization.{old} is the old name of {new}, which is there too; remove {old}")
    ratio = value_at(zero, "offload_optimizer.ratio")
    if isinstance(ratio, (int, float)) and ratio < 1 and stage in (0, 1, 2):
        faults.append("zero_optimization.offload_optimizer.ratio below 1 needs stage 3; remove it or use --zero 3")
    if zero.get("compute_grad_norm") is False and stage in (0, 3):
        faults.append("zero_optimization.compute_grad_norm false needs stage 1 or 2; remove it")
    if str(json.get("gradient_allreduce_op", "")).lower() == "sum" and stage == 3:
        faults.append("gradient_allreduce_op sum is refused with ZeRO-3; use mean")
    return faults


def expert_faults(json: Mapping[str, Any]) -> list[str]:
    """Faults of AutoEP with ZeRO and with other kinds of parallelism."""
    if not is_enabled(json, "expert_parallel"):
        return []
    zero, stage = section_of(json, "zero_optimization"), _stage(json)
    faults: list[str] = []
    if is_above(json.get("sequence_parallel_size"), 1):
        faults.append("expert_parallel (AutoEP) excludes sequence_parallel_size above 1; set it to 1")
    if is_above(zero.get("zero_hpz_partition_size"), 1):
        faults.append("expert_parallel (AutoEP) excludes zero_hpz_partition_size above 1 (hpZ); set it to 1")
    if value_at(json, "expert_parallel.comm_backend") == "deepep" and not value_at(
        json, "expert_parallel.comm_max_tokens_per_rank"
    ):
        faults.append(
            "expert_parallel.comm_backend deepep needs comm_max_tokens_per_rank, the tokens of a micro-batch; set it"
        )
    if stage == 3 and zero.get("zero_quantized_gradients") is True:
        faults.append("expert_parallel (AutoEP) with ZeRO-3 excludes zero_quantized_gradients; set it to false")
    if stage == 3 and is_above(value_at(json, "expert_parallel.expert_tensor_parallel_size"), 1):
        faults.append("expert_parallel.expert_tensor_parallel_size above 1 is refused with ZeRO-3; set it to 1")
    if stage == 3 and value_at(json, "compile.autoep_non_moe") is True:
        faults.append("compile.autoep_non_moe is refused with ZeRO-3; set it to false or use --zero 2")
    if stage == 2 and zero.get("contiguous_gradients") is False:
        faults.append("experts with ZeRO-2 need zero_optimization.contiguous_gradients true")
    if stage in (1, 2) and zero.get("reduce_scatter") is False:
        faults.append(f"experts with ZeRO-{stage} need zero_optimization.reduce_scatter true")
    return faults


def combination_warnings(json: Mapping[str, Any]) -> list[str]:
    """What runs, but costs more than it must, does nothing, or depends on this machine."""
    warnings = _precision_warnings(json)
    zero, stage = section_of(json, "zero_optimization"), _stage(json)
    unused = sorted(key for key in zero if key.startswith("stage3_") or key == "sub_group_size")
    if unused and stage in (0, 1, 2):
        warnings.append(f"ZeRO-{stage} does not read {', '.join(unused)}; they belong to stage 3")
    for old, new in OLD_NAMES.items():
        if old in zero:
            warnings.append(f'zero_optimization.{old} is deprecated; write "{new}": {{"device": "cpu"}}')
    if isinstance(json.get("zero_optimization"), bool):
        warnings.append('zero_optimization true or false is an old form; write {"stage": 1} or {"stage": 0}')
    offloaded = value_at(zero, "offload_optimizer.device")
    if offloaded in ("cpu", "nvme") and _needs_cpu_adam(json) and not _has_compiler():
        warnings.append(
            "optimizer offload builds DeepSpeed's CPU Adam, and this machine has no C++ compiler (c++, g++ or clang++); "
            "install one, or set optimizer.params.torch_adam true"
        )
    if is_enabled(json, "expert_parallel") and stage == 3 and offloaded == "nvme":
        warnings.append(
            "experts with ZeRO-3 and NVMe optimizer offload train but cannot be saved; offload to cpu instead"
        )
    return warnings


def _precision_warnings(json: Mapping[str, Any]) -> list[str]:
    warnings: list[str] = []
    stage, accumulation = _stage(json), value_at(json, "data_types.grad_accum_dtype")
    if _bf16(json) and stage == 1 and accumulation not in (None, AUTO, *_HALF_DTYPES["bf16"]):
        warnings.append(
            "ZeRO-1 with bf16 and fp32 gradients keeps them whole on every rank; ZeRO-2 keeps 1/ranks of them"
        )
    if _bf16(json) and accumulation in (None, AUTO) and is_above(json.get("gradient_accumulation_steps"), 8):
        warnings.append(
            "more than 8 micro-batches are summed in bf16, which has 8 bits; set data_types.grad_accum_dtype fp32 and stage 2"
        )
    if "max_grad_norm" in section_of(json, "optimizer.params"):
        warnings.append("optimizer.params.max_grad_norm is not read; set gradient_clipping")
    return warnings


def _stage(json: Mapping[str, Any]) -> Any:
    zero = json.get("zero_optimization")
    if isinstance(zero, bool):
        return 1 if zero else 0
    return section_of(json, "zero_optimization").get("stage", 0)


def _bf16(json: Mapping[str, Any]) -> bool:
    return is_enabled(json, "bf16") or is_enabled(json, "bfloat16")


def _needs_cpu_adam(json: Mapping[str, Any]) -> bool:
    kind = str(value_at(json, "optimizer.type", AUTO)).lower()
    return kind in ("adam", "adamw") and value_at(json, "optimizer.params.torch_adam") is not True


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))
