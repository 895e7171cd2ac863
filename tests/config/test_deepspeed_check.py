"""The strict check of a DeepSpeed JSON, and the contract of its key table with the installed DeepSpeed."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect

import pytest

from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.deepspeed.keys import Key, table
from lumina_ds.config.load import load_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_bach_size": 8}, "unknown DeepSpeed key train_bach_size; did you mean train_batch_size?"),
        ({"zero_optimization": {"stage": 1, "overlapcomm": True}}, "did you mean overlap_comm?"),
        ({"bf16": {"enable": True}}, "unknown DeepSpeed key bf16.enable; did you mean enabled?"),
        ({"fp16": {"loss_scal": 0}}, "did you mean loss_scale?"),
        ({"optimizer": {"typ": "Adam"}}, "did you mean type?"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "optimizer.params.learning_rate"),
        ({"expert_parallel": {"enabled": True, "auto_ep_size": 2}}, "did you mean autoep_size?"),
        ({"zero_optimization": {"offload_param": {"devices": "cpu"}}}, "did you mean device?"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "overlap_comm is 'yes'; it must be true or false"),
        ({"train_batch_size": 1.5}, "train_batch_size is 1.5; it must be a whole number"),
        ({"gradient_clipping": True}, "gradient_clipping is True; it must be a number"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; use 0, 1, 2 or 3"),
        ({"amp": {"enabled": True}}, "amp was removed from DeepSpeed; use bf16, fp16 or torch_autocast"),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
            "train_batch_size 10 is not a multiple of 4",
        ),
        ({"train_batch_size": 0}, "train_batch_size is 0; it must be at least 1"),
        ({"moe": {"ep_size": 2}, "zero_optimization": {"stage": 3}}, "native deepspeed.moe layers assert under ZeRO-3"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": True}}, "bf16 with ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1, 2 or 3"),
        ({"expert_parallel": {"enabled": True}, "sequence_parallel_size": 2}, "excludes sequence_parallel_size"),
        (
            {"expert_parallel": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "excludes zero_hpz_partition_size above 1",
        ),
        (
            {"expert_parallel": {"enabled": True}, "zero_optimization": {"stage": 2, "contiguous_gradients": False}},
            "experts with ZeRO-2 need zero_optimization.contiguous_gradients true",
        ),
        (
            {"expert_parallel": {"enabled": True}, "zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "excludes zero_quantized_gradients",
        ),
    ],
)
def test_faults(settings, message):
    assert any(message in fault for fault in deepspeed_faults(settings)), deepspeed_faults(settings)


def _known(path: str) -> set[str]:
    return {name for name, key in table().sections[path].items() if not key.removed}


def test_the_table_says_what_is_done_with_each_key():
    """Without a file a run writes exactly the keys that are marked, over all precisions and stages."""
    written: set[str] = set()
    for precision in ("fp32", "mixed_bf16", "bf16", "fp16"):
        for stage in (1, 2, 3):
            for offload in ("none", "optimizer+params" if stage == 3 else "optimizer"):
                for shared in (0, 1):
                    config = load_config("debug").config
                    config.model.num_shared_experts = shared
                    config.deepspeed.zero_stage, config.deepspeed.offload = stage, offload
                    written |= set(_paths(compose_deepspeed(config, 2, precision)))
    marked = {
        f"{path}.{name}" if path else name
        for path, section in table().sections.items()
        for name, key in section.items()
        if key.role in ("run", "ours") and path != "bfloat16"
    }
    # A dense model at stage 1 alone goes without contiguous gradients, and offload with them.
    assert {path for path in written if not path.startswith("optimizer.params.")} == marked


def _paths(section, prefix=""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_the_table_is_read_as_it_stands():
    zero, top = table().sections["zero_optimization"], table().sections[""]
    assert zero["reduce_bucket_size"] == Key("int", 1, role="ours") and zero["stage"].role == "run"
    assert top["gradient_allreduce_op"].choices == ("mean", "sum") and top["amp"].removed.startswith("use bf16")
    assert table().sections["bfloat16"] is table().sections["bf16"]
    assert set(table().optimizers) == {"adam", "adamw", "lion", "lamb"} and "WarmupLR" in table().schedulers
    every = (*table().sections.values(), *table().optimizers.values(), *table().schedulers.values())
    for section in every:
        for name, key in section.items():
            # range_faults goes by the name alone.
            assert key.removed or (key.low, key.high) == table().ranges[name], name


def test_the_table_equals_the_installed_models():
    zero = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    offload = importlib.import_module("deepspeed.runtime.zero.offload_config")
    precision = importlib.import_module("deepspeed.runtime.precision_config")
    experts = importlib.import_module("deepspeed.module_inject.auto_ep_presets.base").AutoEPConfig
    assert _known("zero_optimization") == _aliases(zero)
    assert _known("zero_optimization.offload_param") == _aliases(offload.DeepSpeedZeroOffloadParamConfig)
    assert _known("zero_optimization.offload_optimizer") == _aliases(offload.DeepSpeedZeroOffloadOptimizerConfig)
    assert _known("bf16") == _aliases(precision.DeepSpeedBF16Config)
    assert _known("fp16") == _aliases(precision.DeepSpeedFP16Config)
    assert _known("expert_parallel") == {f.name for f in dataclasses.fields(experts) if not f.name.startswith("_")}


def test_the_top_level_equals_what_deepspeed_reads():
    modules = (
        "runtime.config",
        "runtime.precision_config",
        "runtime.zero.config",
        "runtime.activation_checkpointing.config",
        "runtime.swap_tensor.aio_config",
        "runtime.tensor_parallel.config",
        "comm.config",
        "profiling.config",
        "autotuning.config",
        "datastates.config",
        "utils.config",
    )
    read = set().union(*(_keys_read(importlib.import_module(f"deepspeed.{name}")) for name in modules))
    monitor = importlib.import_module("deepspeed.monitor.config").DeepSpeedMonitorConfig
    # Read through helpers that take the key as an argument, or inside a section; and DeepSpeed's __init__.
    indirect = {
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "data_efficiency",
        "sequence_parallel_size",
        "data_parallel_size",
    }
    inside_sections = {"allgather_size", "model_info"}
    assert _known("") == (read - inside_sections) | indirect | set(monitor.model_fields)


def test_the_removed_keys_are_deepspeeds():
    module = importlib.import_module("deepspeed.runtime.config")
    assert {name for name, key in table().sections[""].items() if key.removed} == set(
        module._REMOVED_TOP_LEVEL_CONFIG_KEYS
    )


def test_the_table_is_for_the_installed_version():
    assert importlib.import_module("deepspeed").__version__.startswith("0.19.8")


def _aliases(model):
    return {field.alias or name for name, field in model.model_fields.items()}


def _keys_read(module):
    """Every key that a DeepSpeed module takes from the top-level `param_dict`, found in its source."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        key = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "get_scalar_param":
            key = node.args[1] if _is_param_dict(node.args[0]) else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0] if _is_param_dict(node.func.value) else None
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            key = node.left if _is_param_dict(node.comparators[0]) else None
        elif isinstance(node, ast.Subscript):
            key = node.slice if _is_param_dict(node.value) else None
        if isinstance(key, ast.Name):
            found.add(getattr(module, key.id, None))
        elif isinstance(key, ast.Constant):
            found.add(key.value)
    return {key for key in found if isinstance(key, str)}


def _is_param_dict(node):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys":
        return _is_param_dict(node.func.value)
    if isinstance(node, ast.Attribute):
        return node.attr == "_param_dict"
    return isinstance(node, ast.Name) and node.id in ("param_dict", "ds_config")
