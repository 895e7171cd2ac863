"""Faults of a DeepSpeed JSON that can be seen without starting anything: typos, wrong kinds of values,
numbers out of range, combinations that DeepSpeed refuses late or handles wrongly. Each says the way that works.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina_ds.config.deepspeed.combinations import expert_faults, precision_faults, zero_faults
from lumina_ds.config.deepspeed.keys import OPTIMIZER_TYPES, Key, Section, table
from lumina_ds.config.deepspeed.tree import AUTO, section_of, sections_at
from lumina_ds.text import nearest, shortened


def deepspeed_faults(json: Mapping[str, Any]) -> list[str]:
    """Every fault of a DeepSpeed configuration; `"auto"` is accepted wherever a value may stand."""
    faults = _key_faults(json, "", table().sections[""]) + _zero_section_faults(json)
    for pattern, keys in table().sections.items():
        for path, section in sections_at(json, pattern) if pattern else ():
            faults += _key_faults(section, f"{path}.", keys)
        if pattern.endswith(".*"):
            # Below the user's own names stand objects.
            for path, parent in sections_at(json, pattern.removesuffix(".*")):
                faults += _key_faults(parent, f"{path}.", dict.fromkeys(parent, Key("section")))
    faults += _typed_faults(json) + _choice_faults(json) + batch_faults(json)
    named = {fault.partition(" ")[0] for fault in faults}
    faults += [fault for fault in range_faults(json) if fault.partition(" ")[0] not in named]
    return faults + combination_faults(json)


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


def unplanned_faults(json: Mapping[str, Any]) -> list[str]:
    """Settings that change memory as no plan of ours says, for a run's file: its plan would be silently wrong."""
    faults: list[str] = []
    for pattern, keys in table().sections.items():
        for path, section in sections_at(json, pattern) if pattern else (("", json),):
            for key in (name for name, known in keys.items() if known.role == "unplanned" and name in section):
                value = section[key]
                is_off = not value or (value in (1, AUTO) and value is not True)
                if not is_off and not (isinstance(value, Mapping) and value.get("enabled") is False):
                    name = f"{path}.{key}" if path else key
                    faults.append(
                        f"{name} is {shortened(repr(value))}: it changes memory, and neither plan nor run of ours follow "
                        "it; remove it"
                    )
    return faults


def combination_faults(json: Mapping[str, Any]) -> list[str]:
    """Pairs of settings that DeepSpeed refuses only after start-up, or accepts and gets wrong."""
    return precision_faults(json) + zero_faults(json) + expert_faults(json)


def _zero_section_faults(json: Mapping[str, Any]) -> list[str]:
    """A stage in the place of the section: DeepSpeed passes over it, and trains at its default."""
    zero = json.get("zero_optimization", {})
    if isinstance(zero, bool | Mapping) or zero == AUTO:
        return []
    stage = str(zero) if str(zero) in ("0", "1", "2", "3") else "2"
    return [f'zero_optimization is {shortened(repr(zero))}; it must be an object, such as {{"stage": {stage}}}']


def range_faults(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every number at any depth that is out of its range, and factors of averages outside 0 to 1.

    DeepSpeed checks few of them when it reads a file; a negative bucket or a step count of 0 shows as an error, or as
    a wrong run, much later.
    """
    faults: list[str] = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        low, high = table().ranges.get(key, (0, None))
        if isinstance(value, Mapping):
            faults += range_faults(value, f"{path}.")
        elif key == "betas" and isinstance(value, list):
            wrong = [beta for beta in value if not isinstance(beta, (int, float)) or not 0 <= beta < 1]
            if len(value) not in (2, 3) or wrong:
                faults.append(f"{path} is {shortened(repr(value), 400)}; it must be two numbers from 0 to below 1")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if low is not None and value < low:
                faults.append(f"{path} is {shortened(repr(value), 400)}; it must be at least {low}")
            elif high is not None and value > high:
                faults.append(f"{path} is {shortened(repr(value), 400)}; it must be at most {high}")
    return faults


def _typed_faults(json: Mapping[str, Any]) -> list[str]:
    """Optimizer and scheduler: the type's name, and the arguments that this type takes."""
    faults: list[str] = []
    optimizer = str(section_of(json, "optimizer").get("type", AUTO))
    if optimizer != AUTO and optimizer.lower() not in {name.lower() for name in OPTIMIZER_TYPES}:
        hint = _OPTIMIZERS.get(optimizer.lower()) or nearest(optimizer, OPTIMIZER_TYPES)
        faults.append(f"optimizer.type {shortened(repr(optimizer))} is no optimizer of DeepSpeed or torch{hint}")
    known = table().optimizers.get(optimizer.lower())
    if known is not None:
        faults += _key_faults(section_of(json, "optimizer.params"), "optimizer.params.", known)
    scheduler = str(section_of(json, "scheduler").get("type", AUTO))
    known = table().schedulers.get(scheduler)
    if known is not None:
        faults += _key_faults(section_of(json, "scheduler.params"), "scheduler.params.", known)
    elif scheduler != AUTO and not scheduler.endswith("LR"):
        faults.append(
            f"scheduler.type {shortened(repr(scheduler))} is no scheduler of DeepSpeed{nearest(scheduler, table().schedulers)}"
        )
    return faults


def _choice_faults(json: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    for path, choices in table().choices.items():
        section, _, key = path.rpartition(".")
        value = (section_of(json, section) if section else json).get(key)
        if isinstance(value, str) and value.lower() not in (*choices, AUTO):
            faults.append(
                f"{path} is {shortened(repr(value), 400)}; use one of {', '.join(choices)}{nearest(value.lower(), choices)}"
            )
    return faults


def _key_faults(section: Mapping[str, Any], prefix: str, keys: Section) -> list[str]:
    faults: list[str] = []
    for key, value in section.items():
        known = keys.get(key)
        if known is None or known.removed:
            faults.append(_unknown(key, prefix, keys, section))
        elif value is not None and not _is_kind(value, known.kind):
            faults.append(f"{prefix}{key} is {shortened(repr(value), 400)}; it must be {_KIND_NAMES[known.kind]}")
    return faults


def _unknown(key: str, prefix: str, keys: Section, section: Mapping[str, Any]) -> str:
    if key in keys:
        return f"{prefix}{key} was removed from DeepSpeed; {keys[key].removed}"
    if not prefix and key == "moe":
        stage = section_of(section, "zero_optimization").get("stage")
        reason = "native deepspeed.moe layers assert under ZeRO-3" if stage == 3 else "DeepSpeed reads no such key"
        return f"moe: {reason}; experts run through expert_parallel (AutoEP), set --expert-parallel N"
    hint = (
        _THEIRS.get(key) or _elsewhere(key, prefix) or nearest(key, [name for name in keys if not keys[name].removed])
    )
    return f"unknown DeepSpeed key {shortened(prefix + key, 200)}{hint}"


# What people write for what DeepSpeed calls otherwise, or the run decides.
_THEIRS = {
    "expert_parallel_size": "; it is expert_parallel.autoep_size, which the run sets: --expert-parallel N",
    "ep_size": "; it is expert_parallel.autoep_size, which the run sets: --expert-parallel N",
    "micro_batch_size": "; it is train_micro_batch_size_per_gpu, which the run sets: --batch-size N",
    "zero_stage": "; it is zero_optimization.stage",
    "mixed_precision": '; it is "bf16": {"enabled": true}, which the run sets: --precision bf16',
}


def _elsewhere(key: str, prefix: str) -> str:
    """Where a key that is none here belongs: in the section that has it, the shallowest one."""
    places = [
        path for path, keys in table().sections.items()
        if key in keys and not keys[key].removed and "*" not in path and f"{path}." != prefix and path != prefix
    ]  # fmt: skip
    if not places or len(key) < 4 or key in ("enabled", "params", "type"):
        return ""
    place = min(places, key=lambda path: (path.count("."), path != "zero_optimization"))
    return f"; it belongs into {place}" if place else "; it belongs to the top level"


# Classes of DeepSpeed's and others', by which its JSON does not know an optimizer.
_OPTIMIZERS = {
    "fusedadam": "; write AdamW, which is fused on a GPU",
    "deepspeedcpuadam": "; write AdamW, which is that with offload_optimizer",
    "cpuadam": "; write AdamW, which is that with offload_optimizer",
    "fusedlamb": "; write Lamb",
    "adamw_torch": "; write AdamW",
    "adamw_hf": "; write AdamW",
    "adamw8bit": "; write AdamW: DeepSpeed has no optimizer in 8 bits",
    "adam8bit": "; write AdamW: DeepSpeed has no optimizer in 8 bits",
}

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
