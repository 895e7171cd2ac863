"""The DeepSpeed JSON of a run: the user's file, checked, and completed with the run's own settings.

This is the only place that composes it. A user's file is the base and is never changed silently: what
belongs to the run (batch, optimizer, precision, experts) must agree with it or be `"auto"`; what the
file leaves open gets a value sized to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lumina_ds.config.checks import world_faults
from lumina_ds.config.deepspeed.check import combination_faults, deepspeed_faults, unplanned_faults
from lumina_ds.config.deepspeed.combinations import OLD_NAMES
from lumina_ds.config.deepspeed.keys import table
from lumina_ds.config.deepspeed.optimizer import merge_optimizer, optimizer_faults
from lumina_ds.config.deepspeed.tree import (
    AUTO,
    Merger,
    is_above,
    is_enabled,
    load_deepspeed_json,
    section_of,
    value_at,
)
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.tensors import moe_layers, parameter_tensors
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# DeepSpeed's default of 5e8 elements costs gigabytes of buffers; larger than 2e8 gains no speed.
_MAX_BUCKET = 200_000_000
# Below this many parameters a step is bound by launches, not by bandwidth: overlap only costs time.
_SMALL_MODEL = 50_000_000
_NEVER = 1_000_000_000_000
_AUTOCAST_MODULES = ("torch.nn.Linear", "lumina_ds.model.loss.LanguageHead")
_HALF_PRECISION = ("bf16", "fp16")


def compose_deepspeed(config: RunConfig, world_size: int, precision: str) -> dict[str, Any]:
    """The complete JSON for `deepspeed.initialize` on `world_size` ranks in a resolved `precision`.

    Raises ConfigError with every fault: of the file, of the run's layout, and where the two contradict.
    """
    source = config.deepspeed.config
    merged = _with_new_names(load_deepspeed_json(source)) if source else {}
    faults = [f"{source}: {fault}" for fault in _file_faults(merged, config)] + world_faults(config, world_size)
    if faults:
        raise ConfigError.from_faults(faults)
    stage = resolve_zero_stage(config, world_size, precision)
    merger = Merger(merged, source or "")
    _merge_batch(merger, config, world_size)
    merge_optimizer(merger, config, stage, precision)
    _merge_precision(merger, precision)
    _merge_zero(merger, config, stage)
    _merge_experts(merger, config)
    merger.propose("steps_per_print", _NEVER)
    merger.propose("wall_clock_breakdown", False)
    _merge_offload(merger, config, stage)
    merger.faults += optimizer_faults(config.train, merged) + combination_faults(merged)
    if merger.faults:
        raise ConfigError.from_faults(merger.faults)
    _drop_auto(merged)
    return {key: merged[key] for key in table().sections[""] if key in merged}


def with_batch(composed: Mapping[str, Any], config: RunConfig, world_size: int) -> dict[str, Any]:
    """A copy of a composed JSON for the batch of `config` on `world_size` ranks, its only part that depends on them."""
    return deepcopy(dict(composed)) | _batch(config, world_size)


def pins_batch(config: RunConfig) -> bool:
    """Whether the run's file names a batch number, so that it fits some batches and numbers of ranks only."""
    file = load_deepspeed_json(config.deepspeed.config) if config.deepspeed.config else {}
    return any(file.get(name, AUTO) not in (AUTO, None) for name in BATCH_KEYS)


def resolve_zero_stage(config: RunConfig, world_size: int, precision: str) -> int:
    """ZeRO stage of the run: --zero, else the file's, else 0 on one rank and 1 on several, or for an optimizer that needs ZeRO.

    Pure half precision never runs at stage 0, where DeepSpeed's unfused optimizer diverges: by default
    it takes stage 1, and asking for 0 raises ConfigError.
    """
    asked: int | None = config.deepspeed.zero_stage
    if asked is None and config.deepspeed.config:
        stage = section_of(load_deepspeed_json(config.deepspeed.config), "zero_optimization").get("stage", AUTO)
        if stage not in (0, 1, 2, 3, AUTO):
            raise ConfigError(f"{config.deepspeed.config}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
        asked = None if stage == AUTO else stage
    half = precision in _HALF_PRECISION
    if asked == 0 and half:
        raise ConfigError(
            f"ZeRO stage 0 with {precision} takes an optimizer path that diverges from the other stages; "
            "use --zero 1, or --precision mixed_bf16"
        )
    sharded = world_size > 1 or half or 0 not in OPTIMIZERS[config.train.optimizer].stages
    return asked if asked is not None else int(sharded)


def _with_new_names(json: dict[str, Any]) -> dict[str, Any]:
    """Sections of old, as DeepSpeed itself reads them: true is offloading to the host's memory. Both names together are a
    fault of the file."""
    zero = json.get("zero_optimization")
    if not isinstance(zero, Mapping) or not any(old in zero and new not in zero for old, new in OLD_NAMES.items()):
        return json
    renamed = {OLD_NAMES.get(name, name): value for name, value in zero.items() if name not in OLD_NAMES or value}
    for new in OLD_NAMES.values():
        if renamed.get(new) is True:
            renamed[new] = {"device": "cpu", "pin_memory": bool(zero.get("cpu_offload_use_pin_memory"))}
    return {**json, "zero_optimization": renamed}


def _file_faults(base: Mapping[str, Any], config: RunConfig) -> list[str]:
    zero = base.get("zero_optimization", {})
    if isinstance(zero, bool):
        return ['zero_optimization: true and false are an old form; write {"stage": 1} or {"stage": 0}']
    if isinstance(zero, Mapping):
        # Judged with the stage that will run; a stage that is left to us is never a fault of the file.
        stage = config.deepspeed.zero_stage
        base = {**base, "zero_optimization": {**zero, "stage": zero.get("stage", AUTO) if stage is None else stage}}
    faults = deepspeed_faults(base) + unplanned_faults(base)
    if "scheduler" in base:
        faults.append("scheduler: the run schedules the learning rate itself; set train.lr_scheduler_type, remove it")
    if is_above(base.get("sequence_parallel_size"), 1):
        faults.append("sequence_parallel_size: the run sets it up itself; remove it and use --sequence-parallel")
    if is_enabled(base, "expert_parallel") and not config.model.num_experts:
        faults.append("expert_parallel is enabled, but model.num_experts is 0; use a file without it, such as zero2")
    return faults


def _merge_batch(merger: Merger, config: RunConfig, world_size: int) -> None:
    product, micro, accumulation = _batch(config, world_size).values()
    equation = f"the batch is {micro} x {accumulation} x {counted(world_size, 'rank')} = {product}"
    for name, value, owner in zip(
        BATCH_KEYS, (product, micro, accumulation), ("", "--batch-size; ", "--grad-accum; "), strict=True
    ):
        merger.impose(name, value, owner + equation)


def _batch(config: RunConfig, world_size: int) -> dict[str, int]:
    micro, accumulation = config.train.micro_batch_size, config.train.gradient_accumulation_steps
    return dict(zip(BATCH_KEYS, (micro * accumulation * world_size, micro, accumulation), strict=True))


def _merge_precision(merger: Merger, precision: str) -> None:
    if "bfloat16" in merger.merged:
        merger.merged.setdefault("bf16", merger.merged.pop("bfloat16"))
    for section, wanted_by in (("bf16", "bf16"), ("fp16", "fp16"), ("torch_autocast", "mixed_bf16")):
        wanted = precision == wanted_by
        if wanted or section in merger.merged:
            merger.impose(f"{section}.enabled", wanted, f"--precision {precision}")
    if precision == "fp16":
        # A dynamic scale from 2^16 on: halved after the second overflow, doubled after 1000 steps without one.
        dynamic = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
        for key, value in (dynamic | {"min_loss_scale": 1}).items():
            merger.propose(f"fp16.{key}", value)
    if precision == "mixed_bf16":
        merger.impose("torch_autocast.dtype", "bfloat16", "--precision mixed_bf16")
        # DeepSpeed reduces the gradients of exactly these classes in bf16.
        merger.propose("torch_autocast.lower_precision_safe_modules", list(_AUTOCAST_MODULES))


def _merge_zero(merger: Merger, config: RunConfig, stage: int) -> None:
    merger.propose("zero_optimization.stage", stage)
    merger.merged["zero_optimization"]["stage"] = stage
    if stage == 0:
        return
    size = _elements_per_rank(config)
    merger.propose("zero_optimization.reduce_bucket_size", min(size + size % 2, _MAX_BUCKET))
    if size < _SMALL_MODEL:
        merger.propose("zero_optimization.overlap_comm", False)
        # Measured at stage 1; with experts DeepSpeed tests only the contiguous path.
        if stage == 1 and not config.model.num_experts:
            merger.propose("zero_optimization.contiguous_gradients", False)


def _merge_offload(merger: Merger, config: RunConfig, stage: int) -> None:
    """Host memory for optimizer states, or parameters as well, where the run asks for it by name."""
    offload = config.deepspeed.offload
    if offload in (None, "none"):
        for section in ("offload_optimizer", "offload_param"):
            if offload == "none" and value_at(merger.merged, f"zero_optimization.{section}.device") in ("cpu", "nvme"):
                merger.faults.append(
                    f"{merger.source}: zero_optimization.{section} is set, but the run has --offload none; drop one"
                )
        return
    if stage == 0 or (offload == "optimizer+params" and stage != 3):
        needed = f"ZeRO-3, not {stage}; add --zero 3, or use --offload optimizer"
        if offload == "optimizer":
            needed = f"ZeRO-1 or above, not {stage}; add --zero 2"
        merger.faults.append(f"--offload {offload} needs {needed}")
        return
    for section in ("offload_optimizer", "offload_param")[: 2 if "params" in offload else 1]:
        merger.impose(f"zero_optimization.{section}.device", "cpu", f"--offload {offload}")
        merger.propose(f"zero_optimization.{section}.pin_memory", True)
    # Offloaded gradients are copied from the contiguous buffer.
    merger.merged["zero_optimization"]["contiguous_gradients"] = True


def _merge_experts(merger: Merger, config: RunConfig) -> None:
    model = config.model
    if not model.num_experts:
        return
    layers = "|".join(str(layer) for layer in moe_layers(model))
    settings: dict[str, Any] = {
        "enabled": True,
        "autoep_size": config.deepspeed.expert_parallel_size,
        "moe_layer_pattern": rf"model\.layers\.({layers})\.mlp",
        "router_pattern": "router",
        "expert_pattern": "experts",
        "expert_w1": "w1",
        "expert_w2": "w2",
        "expert_w3": "w3",
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_tok",
    }
    if model.num_shared_experts:
        settings |= {"has_shared_experts": True, "shared_experts_pattern": "shared_experts"}
    for key, value in settings.items():
        owner = "--expert-parallel" if key == "autoep_size" else "the model's structure"
        merger.impose(f"expert_parallel.{key}", value, owner)
    # torch's grouped product wants rows of a multiple of 16 bytes; other widths take DeepSpeed's loop over experts.
    aligned = model.hidden_size % 8 == 0 and (model.moe_intermediate_size or 0) % 8 == 0
    merger.propose("expert_parallel.use_grouped_mm", aligned)


def _elements_per_rank(config: RunConfig) -> int:
    """Parameters that one rank reduces: everything but other ranks' experts."""
    size = config.deepspeed.expert_parallel_size
    tensors = parameter_tensors(config.model)
    return sum(tensor.numel // (size if tensor.kind == "experts" else 1) for tensor in tensors)


def _drop_auto(section: dict[str, Any]) -> None:
    """Remove what is still "auto", so that DeepSpeed's default applies; AutoEP gives the word a meaning of its own."""
    for key, value in list(section.items()):
        if isinstance(value, dict) and key != "expert_parallel":
            _drop_auto(value)
        elif value == AUTO and key != "keep_in_fp32_modules":
            del section[key]
