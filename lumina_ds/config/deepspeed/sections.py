"""Keys of DeepSpeed 0.19.8's side sections, of its schedulers and optimizers, and the values that texts may take.

Continues deepspeed_keys.py: those are the sections that shape a run, these are the ones around it. DeepSpeed
reads most of them key by key and ignores what it does not know. A contract test compares the tables with the
installed version.
"""

from __future__ import annotations

from lumina_ds.config.deepspeed.keys import ADAM_PARAMS, Kinds

_ENABLED: Kinds = {"enabled": "bool"}

# Dotted path of a section to its keys.
SIDE_SECTIONS: dict[str, Kinds] = {
    "activation_checkpointing": {
        "partition_activations": "bool",
        "cpu_checkpointing": "bool",
        "contiguous_memory_optimization": "bool",
        "number_checkpoints": "int",
        "synchronize_checkpoint_boundary": "bool",
        "profile": "bool",
    },
    "aio": {
        "block_size": "int",
        "queue_depth": "int",
        "intra_op_parallelism": "int",
        "single_submit": "bool",
        "overlap_events": "bool",
        "use_gds": "bool",
    },
    "autotuning": {
        "enabled": "bool",
        "fast": "bool",
        "results_dir": "str",
        "exps_dir": "str",
        "overwrite": "bool",
        "start_profile_step": "int",
        "end_profile_step": "int",
        "metric": "str",
        "metric_path": "str",
        "tuner_type": "str",
        "tuner_early_stopping": "int",
        "tuner_num_trials": "int",
        "arg_mappings": "section",
        "max_train_batch_size": "int",
        "min_train_batch_size": "int",
        "max_train_micro_batch_size_per_gpu": "int",
        "min_train_micro_batch_size_per_gpu": "int",
        "num_tuning_micro_batch_sizes": "int",
        "mp_size": "int",
        "model_info": "section",
        "model_info_path": "str",
    },
    "checkpoint": {
        "tag_validation": "str",
        "load_universal": "bool",
        "use_node_local_storage": "bool",
        "parallel_write": "section",
        "checkpoint_serialization": "bool",
        "writer": "section",
    },
    "checkpoint.parallel_write": {"pipeline_stage": "bool"},
    "checkpoint.writer": {
        "type": "str",
        "io_buffer_size": "int",
        "io_buffer_double": "bool",
        "io_multiplier": "int",
        "show_statistics": "bool",
        "data_parallel": "str",
        "decoupled": "bool",
    },
    "comms_logger": {**_ENABLED, "prof_all": "bool", "prof_ops": "list", "verbose": "bool", "debug": "bool"},
    "compile": {
        "deepcompile": "bool",
        "autoep_non_moe": "bool",
        "free_activation": "bool",
        "free_activation_threshold": "int",
        "offload_activation": "bool",
        "offload_activation_pin_memory": "bool",
        "offload_opt_states": "bool",
        "double_buffer": "bool",
        "symmetric_memory": "bool",
        "debug_log": "bool",
        "offload_parameters": "bool",
        "sync_before_reduce": "bool",
        "sync_after_reduce": "bool",
        "sync_before_allgather": "bool",
        "sync_after_allgather": "bool",
        "keep_int_input_tensors": "bool",
        "keep_all_input_tensors": "bool",
        "passes": "list",
    },
    "data_efficiency": {**_ENABLED, "seed": "int", "data_sampling": "section", "data_routing": "section"},
    "data_efficiency.data_sampling": {
        "enabled": "bool",
        "num_epochs": "int",
        "num_workers": "int",
        "pin_memory": "bool",
        "curriculum_learning": "section",
        "dynamic_batching": "section",
    },
    "data_efficiency.data_routing": {**_ENABLED, "random_ltd": "section"},
    "flops_profiler": {
        "enabled": "bool",
        "recompute_fwd_factor": "number",
        "profile_step": "int",
        "module_depth": "int",
        "top_modules": "int",
        "detailed": "bool",
        "output_file": "str",
    },
    "hybrid_engine": {
        "enabled": "bool",
        "max_out_tokens": "int",
        "inference_tp_size": "int",
        "release_inference_cache": "bool",
        "pin_parameters": "bool",
        "tp_gather_partition_size": "int",
        "enable_cuda_graph": "bool",
    },
    "pipeline": {
        "stages": "int",
        "partition": "str",
        "seed_layers": "bool",
        "activation_checkpoint_interval": "int",
        "pipe_partitioned": "bool",
        "grad_partitioned": "bool",
        "use_reentrant": "bool",
    },
    "tensorboard": {**_ENABLED, "output_path": "str", "job_name": "str"},
    "csv_monitor": {**_ENABLED, "output_path": "str", "job_name": "str"},
    "wandb": {**_ENABLED, "group": "str", "team": "str", "project": "str"},
    "comet": {
        "enabled": "bool",
        "samples_log_interval": "int",
        "project": "str",
        "workspace": "str",
        "api_key": "str",
        "experiment_name": "str",
        "experiment_key": "str",
        "online": "bool",
        "mode": "str",
    },
    "timers": {"throughput": "section"},
    "timers.throughput": {**_ENABLED, "synchronized": "bool"},
    "zero_optimization.leaf_module": {"classes": "any", "names": "any", "name_suffixes": "any"},
    "zero_optimization.zenflow": {
        "topk_ratio": "number",
        "select_strategy": "str",
        "select_interval": "int",
        "update_interval": "int",
        "overlap_step": "bool",
        "offload": "bool",
        "auto_ratio": "number",
        "full_warm_up_rounds": "int",
        "pt_reserved_cores_perc": "number",
        "steps_per_epoch": "int",
    },
}

_WARMUP: Kinds = {
    "warmup_min_lr": "any",
    "warmup_max_lr": "any",
    "warmup_num_steps": "int",
    "warmup_type": "str",
    "last_batch_iteration": "int",
}
# Arguments of the schedulers in deepspeed/runtime/lr_schedules.py; another type is a class of torch.
SCHEDULER_PARAMS: dict[str, Kinds] = {
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": {**_WARMUP, "total_num_steps": "int"},
    "WarmupCosineLR": {
        "total_num_steps": "int",
        "warmup_min_ratio": "number",
        "warmup_num_steps": "int",
        "cos_min_ratio": "number",
        "warmup_type": "str",
        "last_batch_iteration": "int",
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": "any",
        "lr_range_test_step_size": "int",
        "lr_range_test_step_rate": "number",
        "lr_range_test_staircase": "bool",
        "last_batch_iteration": "int",
    },
    "OneCycle": {
        "cycle_min_lr": "any",
        "cycle_max_lr": "any",
        "decay_lr_rate": "number",
        "cycle_first_step_size": "int",
        "cycle_second_step_size": "int",
        "cycle_first_stair_count": "int",
        "cycle_second_stair_count": "int",
        "decay_step_size": "int",
        "cycle_momentum": "bool",
        "cycle_min_mom": "number",
        "cycle_max_mom": "number",
        "decay_mom_rate": "number",
        "last_batch_iteration": "int",
    },
}

# DeepSpeed lowers the names of the optimizers that it knows; another one is a class of torch.optim.
OPTIMIZER_PARAMS: dict[str, Kinds] = {
    "adam": ADAM_PARAMS,
    "adamw": ADAM_PARAMS,
    "lion": {"lr": "number", "betas": "list", "weight_decay": "number"},
    "lamb": {
        "lr": "number",
        "bias_correction": "bool",
        "betas": "list",
        "eps": "number",
        "eps_inside_sqrt": "bool",
        "weight_decay": "number",
        "max_grad_norm": "number",
        "max_coeff": "number",
        "min_coeff": "number",
        "amsgrad": "bool",
    },
}

OPTIMIZERS = (
    *("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD"),
    *("Adadelta", "Adafactor", "Adamax", "ASGD", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)

# Dotted path of a text to the values that DeepSpeed takes, in lower case.
_DTYPES = ("fp32", "fp16", "bf16")
_TORCH_DTYPES = (
    *_DTYPES,
    "float32",
    "float16",
    "bfloat16",
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "half",
    "float",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "communication_data_type": _DTYPES,
    "seq_parallel_communication_data_type": _DTYPES,
    "data_types.grad_accum_dtype": _TORCH_DTYPES,
    "torch_autocast.dtype": _TORCH_DTYPES,
    "gradient_allreduce_op": ("mean", "sum"),
    "checkpoint.tag_validation": ("warn", "ignore", "fail"),
    "checkpoint.writer.type": ("mock", "python", "fast"),
    "zero_optimization.zenflow.select_strategy": ("auto", "step", "epoch"),
}

# Keys of zero_optimization that DeepSpeed 0.19 took out and refuses.
REMOVED_ZERO: dict[str, str] = {
    "mics_shard_size": "use plain ZeRO-3, or zero_hpz_partition_size",
    "mics_hierarchical_params_gather": "use plain ZeRO-3",
    "zeropp_loco_param": "remove it; zero_quantized_gradients works without it",
}
