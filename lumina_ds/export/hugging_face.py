"""The model in Hugging Face's published layout: Llama, Qwen3, Mixtral, Qwen3-MoE or GLM-4-MoE.

Names and splits are those of the checkpoints on disk (one tensor per expert), which transformers, vLLM and
llama.cpp all read; not those of any library's in-memory modules.
"""

from __future__ import annotations

from typing import Any

from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError

# (is MoE, has QK-norm) -> model_type
FAMILIES = {
    (False, False): "llama",
    (False, True): "qwen3",
    (True, False): "mixtral",
    (True, True): "qwen3_moe",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# Our expert tensor -> the name of one expert's matrix in each family.
_QWEN_MATRICES = {"w1": "mlp.experts.{}.gate_proj", "w2": "mlp.experts.{}.down_proj", "w3": "mlp.experts.{}.up_proj"}
EXPERT_MATRICES = {
    "mixtral": {
        "w1": "block_sparse_moe.experts.{}.w1",
        "w2": "block_sparse_moe.experts.{}.w2",
        "w3": "block_sparse_moe.experts.{}.w3",
    },
    "qwen3_moe": _QWEN_MATRICES,
    "glm4_moe": _QWEN_MATRICES,
}
ROUTERS = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate", "glm4_moe": "mlp.gate"}
SELECTION_BIAS = "e_score_correction_bias"


def hugging_face_family(model: ModelConfig) -> str:
    """The model_type that computes the same function; ConfigError when no published one does."""
    if model.num_experts and model.scoring_func == "sigmoid":
        if model.router_bias_update_rate is None or not model.num_shared_experts:
            raise ConfigError(
                "model.scoring_func sigmoid: of the published shapes GLM-4-MoE has it, with a selection bias "
                "(model.router_bias_update_rate) and shared experts; this model lacks one of them"
            )
        return "glm4_moe"
    if model.num_experts and model.scoring_func != "softmax":
        raise ConfigError(f"model.scoring_func {model.scoring_func}: no published shape scores experts by it")
    family = FAMILIES[(model.num_experts > 0, model.qk_norm)]
    if model.num_shared_experts:
        raise ConfigError(
            f"model.num_shared_experts {model.num_shared_experts}: neither Mixtral nor Qwen3-MoE has shared experts, "
            "and GLM-4-MoE scores by sigmoid"
        )
    if model.num_experts and model.router_bias_update_rate is not None:
        raise ConfigError(
            f"model.router_bias_update_rate {model.router_bias_update_rate}: neither Mixtral nor Qwen3-MoE has a "
            "selection bias, and GLM-4-MoE scores by sigmoid"
        )
    if family == "mixtral" and (model.first_k_dense_layers or not model.norm_topk_prob):
        raise ConfigError("Mixtral has no dense layers and always normalises top-k; train with model.qk_norm true")
    return family


def exportable(model: ModelConfig) -> str | None:
    """Why `lumina export` refuses such a model; None where it takes it. Known before a step is trained."""
    try:
        hugging_face_family(model)
    except ConfigError as error:
        return str(error)
    return None


def hugging_face_config(model: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of config.json."""
    family = hugging_face_family(model)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.attention_head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "sliding_window": None,
        # Readers before transformers 5 know the first name only, such as llama.cpp's converter.
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if model.num_experts:
        config |= {"num_experts_per_tok": model.num_experts_per_tok, "router_aux_loss_coef": model.router_aux_loss_coef}
    if family == "mixtral":
        config |= {"num_local_experts": model.num_experts, "intermediate_size": model.moe_intermediate_size}
    if family == "qwen3_moe":
        config |= {
            "num_experts": model.num_experts,
            "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": model.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(model.first_k_dense_layers)),
        }
    if family == "glm4_moe":
        config |= {
            "n_routed_experts": model.num_experts,
            "n_shared_experts": model.num_shared_experts,
            "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": model.norm_topk_prob,
            "first_k_dense_replace": model.first_k_dense_layers,
            "use_qk_norm": model.qk_norm,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "num_nextn_predict_layers": 0,
            # Readers take one half where it is missing.
            "partial_rotary_factor": 1.0,
        }
        config["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    return config


def published_names(name: str, num_rows: int, model: ModelConfig) -> list[tuple[str, int | None]]:
    """(published name, expert) of every tensor that one of ours becomes; an expert is a row of ours, None all of it.

    num_rows: size of our tensor's first dimension. A tied head is stored once, as the embedding; what only
    the training of routers needs, not at all.
    """
    if name == "lm_head.weight" and model.tie_word_embeddings:
        return []
    layer, _, part = name.partition(".mlp.")
    if part in ("router.load", "router.capacity_factor"):
        # What only a resumed run needs.
        return []
    if part == "router.gate.weight":
        return [(f"{layer}.{ROUTERS[hugging_face_family(model)]}.weight", None)]
    if part == f"router.{SELECTION_BIAS}":
        return [(f"{layer}.{ROUTERS[hugging_face_family(model)]}.{SELECTION_BIAS}", None)]
    if part.startswith("experts."):
        matrix = EXPERT_MATRICES[hugging_face_family(model)][part.removeprefix("experts.")]
        return [(f"{layer}.{matrix.format(expert)}.weight", expert) for expert in range(num_rows)]
    return [(name, None)]
