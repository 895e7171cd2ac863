"""The keys that DeepSpeed 0.19.8 reads from its JSON, section by section, each with the kind of its value.

DeepSpeed ignores unknown keys at the top level, so a typo there changes a run silently. The table is
written out, not imported, because reading it must not cost the import of deepspeed; a contract test
compares it with the installed version's source and pydantic models.
"""

from __future__ import annotations

Kinds = dict[str, str]

# Kinds: bool, int (5e8 counts), number, str, list, section (an object), any.
TOP_LEVEL: Kinds = {
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "gradient_accumulation_steps": "int",
    "managed_gradient_accumulation": "bool",
    "gradient_clipping": "number",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "gradient_allreduce_op": "str",
    "communication_data_type": "str",
    "seq_parallel_communication_data_type": "str",
    "disable_allgather": "bool",
    "disable_python_gc": "bool",
    "dump_state": "bool",
    "steps_per_print": "int",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "log_level": "any",
    "vocabulary_size": "int",
    "dataloader_drop_last": "bool",
    "use_data_before_expert_parallelism": "bool",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "sequence_parallel_size": "int",
    "data_parallel_size": "int",
    "optimizer": "section",
    "scheduler": "section",
    "fp16": "section",
    "bf16": "section",
    "bfloat16": "section",
    "torch_autocast": "section",
    "data_types": "section",
    "zero_optimization": "any",
    "activation_checkpointing": "section",
    "aio": "section",
    "autotuning": "section",
    "checkpoint": "section",
    "comms_logger": "section",
    "compile": "section",
    "data_efficiency": "section",
    "datastates_ckpt": "section",
    "expert_parallel": "section",
    "flops_profiler": "section",
    "hybrid_engine": "section",
    "pipeline": "section",
    "tensor_parallel": "section",
    "timers": "section",
    "weight_quantization": "section",
    "tensorboard": "section",
    "comet": "section",
    "wandb": "section",
    "csv_monitor": "section",
}

ZERO: Kinds = {
    "stage": "int",
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "int",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "int",
    "overlap_comm": "bool",
    "compute_grad_norm": "bool",
    "load_from_fp32_weights": "bool",
    "elastic_checkpoint": "bool",
    "offload_param": "section",
    "offload_optimizer": "section",
    "zenflow": "section",
    "sub_group_size": "int",
    "cpu_offload": "bool",
    "cpu_offload_param": "bool",
    "cpu_offload_use_pin_memory": "bool",
    "stage3_prefetch_bucket_size": "int",
    "stage3_param_persistence_threshold": "int",
    "stage3_model_persistence_threshold": "int",
    "stage3_max_live_parameters": "int",
    "stage3_max_reuse_distance": "int",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_gather_fp16_weights_on_model_save": "bool",
    "stage3_module_granularity_threshold": "int",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "stage3_allgather_sequential": "bool",
    "ignore_unused_parameters": "bool",
    "legacy_stage1": "bool",
    "round_robin_gradients": "bool",
    "parameter_alignment": "bool",
    "zero_hpz_partition_size": "int",
    "zero_quantized_weights": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_gradients": "bool",
    "memory_efficient_linear": "bool",
    "pipeline_loading_checkpoint": "bool",
    "override_module_apply": "bool",
    "log_trace_cache_warnings": "bool",
    "enable_sanity_checks": "bool",
    "save_muon_momentum_buffer_in_memory": "bool",
    "leaf_module": "section",
}

OFFLOAD_PARAM: Kinds = {
    "device": "str",
    "nvme_path": "str",
    "buffer_count": "int",
    "buffer_size": "int",
    "max_in_cpu": "int",
    "pin_memory": "bool",
}

OFFLOAD_OPTIMIZER: Kinds = {
    "device": "str",
    "nvme_path": "str",
    "buffer_count": "int",
    "pin_memory": "bool",
    "pipeline_read": "bool",
    "pipeline_write": "bool",
    "fast_init": "bool",
    "ratio": "number",
    "super_offload": "bool",
    "cpuadam_cores_perc": "number",
}

BF16: Kinds = {
    "enabled": "bool",
    "immediate_grad_update": "bool",
    "check_grad_overflow": "bool",
    "bf16_master_weights_and_grads": "bool",
    "bf16_optimizer_states": "bool",
}

FP16: Kinds = {
    "enabled": "bool",
    "auto_cast": "bool",
    "loss_scale": "number",
    "initial_scale_power": "int",
    "loss_scale_window": "int",
    "hysteresis": "int",
    "consecutive_hysteresis": "bool",
    "min_loss_scale": "int",
    "fp16_master_weights_and_grads": "bool",
}

TORCH_AUTOCAST: Kinds = {"enabled": "bool", "dtype": "str", "lower_precision_safe_modules": "list"}

DATA_TYPES: Kinds = {
    "grad_accum_dtype": "str",
    "param_dtype": "str",
    "buffer_dtype": "str",
    "keep_in_fp32_modules": "any",
}

OPTIMIZER: Kinds = {"type": "str", "params": "section", "legacy_fusion": "bool"}
SCHEDULER: Kinds = {"type": "str", "params": "section"}

# What DeepSpeed takes out itself, and torch.optim.AdamW's and FusedAdam's own arguments.
ADAM_PARAMS: Kinds = {
    "lr": "number",
    "betas": "list",
    "eps": "number",
    "weight_decay": "number",
    "torch_adam": "bool",
    "adam_w_mode": "bool",
    "fp32_optimizer_states": "bool",
    "fused": "bool",
    "foreach": "bool",
    "amsgrad": "bool",
    "bias_correction": "bool",
}

# `"auto"` is a value of its own in several of these, not a wish for ours.
EXPERT_PARALLEL: Kinds = {
    "enabled": "bool",
    "autoep_size": "int",
    "expert_tensor_parallel_size": "int",
    "validate_folding_routing": "bool",
    "async_split_plan": "bool",
    "preset_model": "str",
    "moe_layer_pattern": "str",
    "expert_pattern": "str",
    "router_pattern": "str",
    "use_grouped_mm": "bool",
    "disable_triton_grouped_mm": "bool",
    "route_norm": "bool",
    "route_scale": "number",
    "score_apply": "str",
    "combine_impl": "str",
    "row_weighting_impl": "str",
    "gate_up_impl": "str",
    "comm_backend": "str",
    "comm_num_sm": "int",
    "comm_qp_margin": "int",
    "comm_max_tokens_per_rank": "int",
    "num_expert_groups": "int",
    "num_limited_groups": "int",
    "score_func": "str",
    "top_k": "int",
    "load_balance_coeff": "number",
    "routed_scaling_factor": "number",
    "expert_w1": "str",
    "expert_w2": "str",
    "expert_w3": "str",
    "num_experts_attr": "str",
    "top_k_attr": "str",
    "has_shared_experts": "bool",
    "shared_experts_pattern": "str",
    "shared_experts_gate_pattern": "str",
    "expert_activation": "str",
}

# Dotted path of a section to its keys; sections not named here are DeepSpeed's own business.
SECTIONS: dict[str, Kinds] = {
    "zero_optimization": ZERO,
    "zero_optimization.offload_param": OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "torch_autocast": TORCH_AUTOCAST,
    "data_types": DATA_TYPES,
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "expert_parallel": EXPERT_PARALLEL,
}

# Keys that DeepSpeed 0.19 took out and refuses, with what replaces them.
REMOVED: dict[str, str] = {
    "amp": "use bf16, fp16 or torch_autocast",
    "compression_training": "remove it",
    "curriculum_learning": "use data_efficiency.data_sampling.curriculum_learning",
    "eigenvalue": "remove it",
    "elasticity": "a resumed run may change its number of ranks without it",
    "graph_harvesting": "remove it",
    "nebula": "remove it",
    "progressive_layer_drop": "remove it",
    "quantize_training": "remove it",
    "sparse_attention": "remove it",
    "sparse_gradients": "remove it",
}
