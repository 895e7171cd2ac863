"""Faults of a DeepSpeed JSON that can be seen without starting anything: typos, wrong kinds of values,
combinations that DeepSpeed refuses late or handles wrongly. Each fault says the way that works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina_ds.config.deepspeed_keys import ADAM_PARAMS, REMOVED, SECTIONS, TOP_LEVEL, Kinds
from lumina_ds.config.suggest import nearest

AUTO = "auto"


def deepspeed_faults(json: Mapping[str, Any]) -> list[str]:
    """Every fault of a DeepSpeed configuration; `"auto"` is accepted wherever a value may stand."""
    faults = _key_faults(json, "", TOP_LEVEL)
    for path, keys in SECTIONS.items():
        section = section_of(json, path)
        if section:
            faults += _key_faults(section, f"{path}.", keys)
    optimizer = section_of(json, "optimizer")
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        faults += _key_faults(section_of(json, "optimizer.params"), "optimizer.params.", ADAM_PARAMS)
    return faults + batch_faults(json) + combination_faults(json)


def section_of(json: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The object at a dotted path, or an empty one where there is none."""
    section: Any = json
    for part in path.split("."):
        section = section.get(part) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def batch_faults(json: Mapping[str, Any]) -> list[str]:
    """Batch numbers that cannot hold together for any number of ranks."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    numbers = {name: json[name] for name in names if _is_kind(json.get(name), "int") and json[name] != AUTO}
    faults = [f"{name} is {value}; it must be at least 1" for name, value in numbers.items() if value < 1]
    if faults or names[0] not in numbers:
        return faults
    parts = [numbers[name] for name in names[1:] if name in numbers]
    product = 1
    for part in parts:
        product *= part
    if numbers[names[0]] % product:
        faults.append(
            f"train_batch_size {numbers[names[0]]} is not a multiple of {' x '.join(map(str, parts))} "
            "(micro-batch x accumulation); it must be micro-batch x accumulation x ranks"
        )
    return faults


def combination_faults(json: Mapping[str, Any]) -> list[str]:
    """Pairs of settings that DeepSpeed refuses only after start-up, or accepts and gets wrong."""
    zero = section_of(json, "zero_optimization")
    stage = zero.get("stage", 0)
    faults: list[str] = []
    if stage not in (0, 1, 2, 3, AUTO):
        faults.append(f"zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    bf16, fp16 = is_enabled(json, "bf16") or is_enabled(json, "bfloat16"), is_enabled(json, "fp16")
    if bf16 and fp16:
        faults.append("bf16 and fp16 are both enabled; enable one of them")
    if bf16 and stage == 0:
        faults.append(
            "bf16 with ZeRO stage 0 takes an optimizer path that diverges from the other stages; "
            "use stage 1, or torch_autocast (--precision mixed_bf16)"
        )
    if section_of(json, "zero_optimization.offload_param") and stage in (0, 1, 2):
        faults.append(f"zero_optimization.offload_param needs stage 3, not {stage}; use --zero 3 or remove it")
    if section_of(json, "zero_optimization.offload_optimizer") and stage == 0:
        faults.append("zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0; use --zero 2 or remove it")
    return faults + _expert_faults(json, zero, stage)


def is_enabled(json: Mapping[str, Any], path: str) -> bool:
    return section_of(json, path).get("enabled") is True


def _expert_faults(json: Mapping[str, Any], zero: Mapping[str, Any], stage: Any) -> list[str]:
    if not is_enabled(json, "expert_parallel"):
        return []
    faults: list[str] = []
    if _above(json.get("sequence_parallel_size"), 1):
        faults.append("expert_parallel (AutoEP) excludes sequence_parallel_size above 1; set it to 1")
    if _above(zero.get("zero_hpz_partition_size"), 1):
        faults.append("expert_parallel (AutoEP) excludes zero_hpz_partition_size above 1 (hpZ); set it to 1")
    if stage == 3 and zero.get("zero_quantized_gradients") is True:
        faults.append("expert_parallel (AutoEP) with ZeRO-3 excludes zero_quantized_gradients; set it to false")
    if stage == 2 and zero.get("contiguous_gradients") is False:
        faults.append("experts with ZeRO-2 need zero_optimization.contiguous_gradients true")
    if stage in (1, 2) and zero.get("reduce_scatter") is False:
        faults.append(f"experts with ZeRO-{stage} need zero_optimization.reduce_scatter true")
    return faults


def _key_faults(section: Mapping[str, Any], prefix: str, keys: Kinds) -> list[str]:
    faults: list[str] = []
    for key, value in section.items():
        if key not in keys:
            faults.append(_unknown(key, prefix, keys, section))
        elif value is not None and not _is_kind(value, keys[key]):
            faults.append(f"{prefix}{key} is {value!r}; it must be {_KIND_NAMES[keys[key]]}")
    return faults


def _unknown(key: str, prefix: str, keys: Kinds, section: Mapping[str, Any]) -> str:
    if not prefix and key in REMOVED:
        return f"{key} was removed from DeepSpeed; {REMOVED[key]}"
    if not prefix and key == "moe":
        stage = section_of(section, "zero_optimization").get("stage")
        reason = "native deepspeed.moe layers assert under ZeRO-3" if stage == 3 else "DeepSpeed reads no such key"
        return f"moe: {reason}; experts run through expert_parallel (AutoEP), set --expert-parallel N"
    return f"unknown DeepSpeed key {prefix}{key}{nearest(key, keys)}"


_KIND_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "number": "a number",
    "str": "a text",
    "list": "a list",
    "section": "an object",
}


def _is_kind(value: Any, kind: str) -> bool:
    if value == AUTO or kind == "any":
        return True
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "int":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, {"number": (int, float), "str": str, "list": list, "section": Mapping}[kind])  # type: ignore[arg-type]


def _above(value: Any, limit: int) -> bool:
    return isinstance(value, (int, float)) and value > limit
