"""The configuration of a run so small that its ranks train it in seconds; `corpus` has the vocabulary."""

from lumina_ds.config.schema import RunConfig

BIAS = {"scoring_func": "sigmoid", "router_bias_update_rate": 0.01, "router_aux_loss_scope": "sequence"}
# Everything that routers learn or draw must go on after resuming; elsewhere it is the default, last step's loads.
ROUTING = {
    (2, "bf16"): BIAS | {"overflow_policy": "reroute", "capacity_factor": 1.0},
    (3, "fp32"): BIAS
    | {"router_jitter_noise": 0.2, "expert_dropout": 0.1, "overflow_policy": "drop", "capacity_factor": 1.0}
    | {"min_capacity_factor": 0.5, "max_capacity_factor": 2.0},
}


def configuration(name, stage, precision, runs_dir, **train_fields):
    """Ten steps of two layers and four experts; its folder is NAME-zeroSTAGE-PRECISION below `runs_dir`."""
    return RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts": 4,
                "moe_intermediate_size": 32, "tie_word_embeddings": True, **ROUTING.get((stage, precision), {}),
            },
            "train": {
                "micro_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "max_steps": 10,
                "warmup_ratio": 0.2, "precision": precision, **train_fields,
            },
            "deepspeed": {"zero_stage": stage, "expert_parallel_size": 2},
            "run": {"name": f"{name}-zero{stage}-{precision}", "runs_dir": runs_dir, "record_samples": True},
        }
    )  # fmt: skip
