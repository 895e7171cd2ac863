"""Every key and value of the shipped JSON files and of documented examples, mutated: found; the originals: silent."""

from __future__ import annotations

import copy
import importlib
import inspect

import pytest

from lumina_ds.config import deepspeed_sections as sections
from lumina_ds.config.deepspeed import deepspeed_config_names, load_deepspeed_json
from lumina_ds.config.deepspeed_check import deepspeed_faults
from lumina_ds.config.deepspeed_keys import TOP_LEVEL

ADAM = {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}}
# Settings that DeepSpeed's configuration page and its tutorials show together, one entry a page or section.
DOCUMENTED = {
    "getting started": {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
        "fp16": {"enabled": True},
        "zero_optimization": True,
    },
    "cifar": {
        "train_batch_size": 4,
        "steps_per_print": 2000,
        "optimizer": ADAM,
        "scheduler": WARMUP,
        "wall_clock_breakdown": False,
    },
    "fp16": {
        "fp16": {
            "enabled": True,
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        }
    },
    "one-cycle": {
        "scheduler": {
            "type": "OneCycle",
            "params": {
                "cycle_first_step_size": 1000,
                "cycle_first_stair_count": 500,
                "cycle_second_step_size": 1000,
                "cycle_second_stair_count": 500,
                "decay_step_size": 1000,
                "cycle_min_lr": 0.0001,
                "cycle_max_lr": 0.0010,
                "decay_lr_rate": 0.001,
                "cycle_min_mom": 0.85,
                "cycle_max_mom": 0.99,
                "decay_mom_rate": 0.0,
            },
        }
    },
    "learning-rate range test": {
        "scheduler": {
            "type": "LRRangeTest",
            "params": {
                "lr_range_test_min_lr": 0.0001,
                "lr_range_test_step_size": 200,
                "lr_range_test_step_rate": 5,
                "lr_range_test_staircase": False,
            },
        }
    },
    "zero-1": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}, "bf16": {"enabled": True}},
    "zero-2": {
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "round_robin_gradients": True,
        },
        "zero_allow_untested_optimizer": True,
    },
    "zero-3 offload": {
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_prefetch_bucket_size": 1e7,
            "stage3_param_persistence_threshold": 1e5,
            "reduce_bucket_size": 1e7,
            "sub_group_size": 1e9,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    },
    "infinity": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4},
            "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_size": 1e8, "max_in_cpu": 1e9},
        },
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
    },
    "zero++": {
        "zero_optimization": {
            "stage": 3,
            "zero_quantized_weights": True,
            "zero_hpz_partition_size": 16,
            "zero_quantized_gradients": True,
        }
    },
    "activation checkpointing": {
        "activation_checkpointing": {
            "partition_activations": True,
            "cpu_checkpointing": True,
            "contiguous_memory_optimization": True,
            "number_checkpoints": 4,
            "synchronize_checkpoint_boundary": False,
            "profile": True,
        }
    },
    "flops profiler": {
        "flops_profiler": {
            "enabled": True,
            "profile_step": 1,
            "module_depth": -1,
            "top_modules": 1,
            "detailed": True,
            "output_file": "flops.txt",
        }
    },
    "monitors": {
        "tensorboard": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train"},
        "wandb": {"enabled": True, "group": "my_group", "team": "my_team", "project": "my_project"},
        "csv_monitor": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train"},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    },
    "checkpoint": {
        "checkpoint": {
            "tag_validation": "Warn",
            "load_universal": False,
            "use_node_local_storage": False,
            "parallel_write": {"pipeline_stage": False},
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "hugging face": {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8, "overlap_comm": True},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
    },
}
ORIGINALS = DOCUMENTED | {name: load_deepspeed_json(name) for name in deepspeed_config_names()}


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals_raise_no_alarm(name):
    assert deepspeed_faults(ORIGINALS[name]) == []


def test_mutated_keys_are_found():
    tried, missed = 0, []
    for name, original in ORIGINALS.items():
        for path in paths(original):
            for typo in typos(path[-1]):
                mutated = copy.deepcopy(original)
                section = at(mutated, path[:-1])
                section[typo] = section.pop(path[-1])
                tried += 1
                if not any(typo in fault for fault in deepspeed_faults(mutated)):
                    missed.append((name, *path, typo))
    assert tried > 1000
    assert len(missed) <= tried // 100, missed


def test_mutated_keys_name_the_original():
    hinted, tried = 0, 0
    for original in ORIGINALS.values():
        for path in paths(original):
            mutated = copy.deepcopy(original)
            section = at(mutated, path[:-1])
            typo = path[-1][:-1] + "q"
            section[typo] = section.pop(path[-1])
            tried += 1
            hinted += any(f"{typo}; did you mean {path[-1]}?" in fault for fault in deepspeed_faults(mutated))
    assert hinted >= 0.95 * tried


def test_values_of_the_wrong_kind_are_found():
    tried, missed = 0, []
    for name, original in ORIGINALS.items():
        for path in paths(original):
            value = at(original, path)
            wrong = {"not": "this"} if not isinstance(value, dict) else [1]
            # These two take numbers or lists, and are any text's business.
            if value == "auto" or path == ("zero_optimization",) or path[-1].endswith(("_min_lr", "_max_lr")):
                continue
            mutated = copy.deepcopy(original)
            at(mutated, path[:-1])[path[-1]] = wrong
            tried += 1
            if not deepspeed_faults(mutated):
                missed.append((name, *path))
    assert tried > 150
    assert len(missed) <= tried // 100, missed


def typos(key: str) -> set[str]:
    """What slips of the finger make of a key: one letter lost, doubled, swapped or in capitals, a dash."""
    middle = len(key) // 2
    return {
        key[1:],
        key[:-1],
        key[:middle] + key[middle + 1 :],
        key + key[-1],
        key[:middle] + key[middle] * 2 + key[middle + 1 :],
        key[:middle] + key[middle : middle + 2][::-1] + key[middle + 2 :],
        key.upper(),
        key.replace("_", "-"),
    } - {key}


def paths(section, prefix=()):
    for key, value in section.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def at(section, path):
    for part in path:
        section = section[part]
    return section


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("comms_logger", "comm.config.CommsLoggerConfig"),
        ("compile", "compile.config.CompileConfig"),
        ("hybrid_engine", "runtime.config.HybridEngineConfig"),
        ("tensorboard", "monitor.config.TensorBoardConfig"),
        ("csv_monitor", "monitor.config.CSVConfig"),
        ("wandb", "monitor.config.WandbConfig"),
        ("comet", "monitor.config.CometConfig"),
        ("timers.throughput", "utils.config.DeepSpeedThroughputTimerConfig"),
        ("zero_optimization.leaf_module", "runtime.zero.leaf_module_config.DeepSpeedZeroLeafModuleConfig"),
        ("zero_optimization.zenflow", "runtime.zenflow.zenflow_config.ZenFlowConfig"),
    ],
)
def test_side_sections_equal_the_installed_models(path, place):
    module, _, name = place.rpartition(".")
    model = getattr(importlib.import_module(f"deepspeed.{module}"), name)
    assert set(sections.SIDE_SECTIONS[path]) == set(model.model_fields)


def test_side_sections_equal_the_installed_constants():
    activations = importlib.import_module("deepspeed.runtime.activation_checkpointing.config")
    assert set(sections.SIDE_SECTIONS["activation_checkpointing"]) == set(activations.ACT_CHKPT_DEFAULT)
    aio = importlib.import_module("deepspeed.runtime.swap_tensor.aio_config")
    assert set(sections.SIDE_SECTIONS["aio"]) == set(aio.AIO_DEFAULT_DICT)
    profiler = importlib.import_module("deepspeed.profiling.config").DeepSpeedFlopsProfilerConfig({})
    assert set(sections.SIDE_SECTIONS["flops_profiler"]) == set(vars(profiler))


def test_schedulers_equal_the_installed_ones():
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    assert set(sections.SCHEDULER_PARAMS) == set(schedules.VALID_LR_SCHEDULES)
    for name, known in sections.SCHEDULER_PARAMS.items():
        assert set(known) == set(inspect.signature(getattr(schedules, name)).parameters) - {"optimizer"}, name


def test_optimizers_equal_the_installed_ones():
    import torch

    known = {name.lower() for name in sections.OPTIMIZERS}
    assert {name.lower() for name in importlib.import_module("deepspeed.runtime.config").DEEPSPEED_OPTIMIZERS} <= known
    of_torch = {name.lower() for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    assert of_torch - {"optimizer"} <= known


def test_removed_keys_equal_the_installed_ones():
    assert set(sections.REMOVED_ZERO) == set(
        importlib.import_module("deepspeed.runtime.config")._REMOVED_ZERO_CONFIG_KEYS
    )


def test_every_side_section_stands_below_a_known_key():
    assert {path.partition(".")[0] for path in sections.SIDE_SECTIONS} <= set(TOP_LEVEL)
