"""Keys of DeepSpeed 0.19.8's sections for other kinds of parallelism, for data efficiency and quantization.

Continues deepspeed_sections.py. A `*` in a path stands for every key that the user names. DeepSpeed reads the data
sections key by key where they are used, so a typo there shows late, or never; sources: runtime/tensor_parallel/config.py,
module_inject/autotp_config.py, runtime/data_pipeline/constants.py, inference/config.py, autotuning/constants.py.
"""

from __future__ import annotations

from lumina_ds.config.deepspeed.keys import Kinds

_QUANTIZED: Kinds = {
    "num_bits": "int",
    "group_size": "int",
    "group_dim": "int",
    "symmetric": "bool",
}
_SAMPLING = "data_efficiency.data_sampling"
_LTD = "data_efficiency.data_routing.random_ltd"

OTHER_SECTIONS: dict[str, Kinds] = {
    "autotuning.model_info": {"profile": "bool", "num_params": "int", "hidden_size": "int", "num_layers": "int"},
    "tensor_parallel": {
        "dtype": "str",
        "autotp_size": "int",
        "tp_overlap_comm": "bool",
        "vocab_parallel_lm_head": "bool",
        "vocab_parallel_ce_backend": "str",
        "tensor_parallel": "section",
        "tp": "section",
        "injection_policy_tuple": "list",
        "partition_config": "section",
        "preset_model": "str",
        "keep_module_on_host": "bool",
        "replace_with_kernel_inject": "bool",
        "kernel_inject": "bool",
    },
    "tensor_parallel.tp": {"tp_size": "int", "tp_grain_size": "int", "mpu": "any", "tp_group": "any"},
    "tensor_parallel.tensor_parallel": {"tp_size": "int", "tp_grain_size": "int", "mpu": "any", "tp_group": "any"},
    "tensor_parallel.partition_config": {
        "tp_size": "int",
        "layer_specs": "list",
        "embedding_partition_dim": "int",
        "lm_head_patterns": "list",
        "use_default_specs": "bool",
        "strict_mode": "bool",
    },
    "weight_quantization": {
        "enabled": "bool",
        "num_bits": "int",
        "q_type": "str",
        "q_groups": "int",
        "quantized_initialization": "section",
        "post_init_quant": "section",
    },
    "weight_quantization.quantized_initialization": _QUANTIZED,
    "weight_quantization.post_init_quant.*": _QUANTIZED,
    f"{_SAMPLING}.curriculum_learning": {
        "enabled": "bool",
        "data_cluster_path": "str",
        "curriculum_metrics": "section",
    },
    f"{_SAMPLING}.curriculum_learning.curriculum_metrics.*": {
        "index_to_sample_path": "str",
        "index_to_metric_path": "str",
        "difficulty_type": "str",
        "clustering_type": "str",
        "min_difficulty": "int",
        "max_difficulty": "int",
        "schedule_type": "str",
        "schedule_config": "section",
    },
    f"{_SAMPLING}.curriculum_learning.curriculum_metrics.*.schedule_config": {
        "difficulty": "list",
        "max_step": "list",
        "total_curriculum_step": "int",
        "difficulty_step": "int",
        "root_degree": "int",
    },
    f"{_SAMPLING}.dynamic_batching": {
        "enabled": "bool",
        "metrics_path": "str",
        "lr_scaling_method": "str",
        "min_batch_size": "int",
        "max_batch_size": "int",
        "sequence_picking_order": "str",
        "max_tokens": "int",
        "verbose": "bool",
    },
    _LTD: {
        "enabled": "bool",
        "total_layer_num": "int",
        "random_ltd_layer_num": "int",
        "random_ltd_layer_id": "list",
        "model_mask_name": "str",
        "model_type": "str",
        "hidden_state_order": "str",
        "micro_batch_size": "int",
        "global_batch_size": "int",
        "random_ltd_schedule": "section",
        "layer_token_lr_schedule": "section",
    },
    f"{_LTD}.random_ltd_schedule": {
        "min_value": "int",
        "max_value": "int",
        "schedule_type": "str",
        "schedule_config": "section",
    },
    f"{_LTD}.random_ltd_schedule.schedule_config": {"require_steps": "int", "seq_per_step": "int"},
    f"{_LTD}.layer_token_lr_schedule": {
        "enabled": "bool",
        "total_layer_tokens": "int",
        "warmup_type": "str",
        "warmup_layer_tokens": "int",
    },
}
