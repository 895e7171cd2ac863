"""From config.json of Llama, Qwen3, Mixtral, Qwen3-MoE or GLM-4-MoE to our model section.

What we do not compute is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lumina_ds.config.checks import model_faults
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.export.hugging_face import ARCHITECTURES, ROUTERS

# Ours -> theirs, where the value is taken as it is. Every one of them must stand in config.json.
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
# Settings that change what the model computes, and the values under which it computes what ours does.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
    "decoder_sparse_step": (None, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "pretraining_tp": (None, 1),
    "n_group": (None, 1),
    "routed_scaling_factor": (None, 1, 1.0),
}
# The families whose QK-norm models have a head width of their own, not hidden_size / heads, when none is given.
OWN_HEAD_DIM = ("qwen3", "qwen3_moe")


def model_from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """Our model section for the content of a config.json; ConfigError with every field that does not fit."""
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise ConfigError(f"config.json has model_type {family!r}; only {', '.join(ARCHITECTURES)} can be imported")
    faults = _faults(config, family)
    if faults:
        raise ConfigError.from_faults(faults)
    values: dict[str, Any] = {name: config[name] for name in SAME}
    values |= {
        "head_dim": config.get("head_dim"),
        "rope_theta": _rope_theta(config),
        "qk_norm": family in OWN_HEAD_DIM or bool(config.get("use_qk_norm", False)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "initializer_range": config.get("initializer_range", 0.02),
    }
    values |= _feed_forward(config, family)
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        shown = [f"model.{fault['loc'][0]} is {fault['input']!r}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError.from_faults(shown) from error
    if wrong := model_faults(RunConfig(model=model)):
        raise ConfigError.from_faults(wrong)
    return model


def _feed_forward(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    if family in ("llama", "qwen3"):
        return {"intermediate_size": config["intermediate_size"]}
    experts = {
        "num_experts_per_tok": config["num_experts_per_tok"],
        "router_aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
    }
    if family == "mixtral":
        width = config["intermediate_size"]
        return {**experts, "num_experts": _num_experts(config), "moe_intermediate_size": width}
    num_dense = len(config.get("mlp_only_layers") or [])
    if family == "glm4_moe":
        num_dense = config["first_k_dense_replace"]
        # The bias is kept as it came until the user gives it a rate.
        bias = {"scoring_func": "sigmoid", "router_bias_update_rate": 0.0}
        experts |= {"num_shared_experts": config["n_shared_experts"], **bias}
    return {
        **experts,
        "num_experts": _num_experts(config),
        "moe_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": bool(config["norm_topk_prob"]),
        "first_k_dense_layers": num_dense,
        "intermediate_size": config["intermediate_size"] if num_dense else None,
    }


def _faults(config: Mapping[str, Any], family: str) -> list[str]:
    needed = [*SAME, "intermediate_size"]
    if family in OWN_HEAD_DIM:
        needed.append("head_dim")
    if family == "mixtral":
        needed.append("num_experts_per_tok")
    if family == "qwen3_moe":
        needed += ["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
    if family == "glm4_moe":
        needed += ["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "n_shared_experts"]
        needed.append("first_k_dense_replace")
    faults = [f"config.json lacks {name}; add it" for name in needed if config.get(name) is None]
    if family in ROUTERS and _num_experts(config) is None:
        faults.append("config.json lacks num_experts (or num_local_experts); add it")
    for name, allowed in REQUIRED_VALUES.items():
        if config.get(name) not in allowed:
            faults.append(
                f"config.json has {name} {config[name]!r}, which this model cannot compute; use another model"
            )
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    # Qwen3 carries a width and a switch, which is checked above; for Mixtral the width is the switch.
    if family == "mixtral" and window is not None and context is not None and window < context:
        faults.append(f"config.json has sliding_window {window}, which this model cannot compute; use another model")
    rotated = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if family == "glm4_moe" and rotated != 1:
        faults.append(
            f"config.json has partial_rotary_factor {rotated}, and this model rotates the whole head; use another model"
        )
    dense = config.get("mlp_only_layers") or []
    if list(dense) != list(range(len(dense))):
        faults.append(f"config.json has mlp_only_layers {dense}; only the first layers may be dense")
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            faults.append(
                f"config.json has {name} of type {kind!r}, which this model cannot compute; use another model"
            )
    if _rope_theta(config) is None:
        faults.append("config.json lacks rope_theta; add it")
    return faults


def _num_experts(config: Mapping[str, Any]) -> Any:
    """Under any name: transformers 5 writes num_local_experts for Qwen3-MoE too."""
    return next(
        (config[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config), None
    )


def _rope_theta(config: Mapping[str, Any]) -> Any:
    return (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
