"""From config.json of Llama, Qwen3, Mixtral, Qwen3-MoE or GLM-4-MoE to our model section.

The file comes from anybody: a field of another type, or out of range, is one line; what we do not compute is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lumina_ds.config.checks import model_faults
from lumina_ds.config.schema import MAX_INTEGER, ModelConfig, RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.export.hugging_face import ARCHITECTURES, ROUTERS
from lumina_ds.text import shortened

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
    "pretraining_tp": (None, 1),
    "n_group": (None, 1),
    "routed_scaling_factor": (None, 1, 1.0),
}
# What the fields are that are read here, where they are given.
_WHOLE, _NUMBER, _TRUTH = "a whole number, 0 or above", "a number, 0 or above", "true or false"
_LIST, _OBJECT, _TEXT = "a list of whole numbers", "an object", "a text"
KINDS = (
    dict.fromkeys(SAME, _WHOLE)
    | dict.fromkeys(("head_dim", "intermediate_size", "moe_intermediate_size", "num_experts_per_tok"), _WHOLE)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), _WHOLE)
    | dict.fromkeys(("first_k_dense_replace", "sliding_window", "decoder_sparse_step", "pretraining_tp"), _WHOLE)
    | dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range", "router_aux_loss_coef"), _NUMBER)
    | dict.fromkeys(("partial_rotary_factor", "routed_scaling_factor"), _NUMBER)
    | dict.fromkeys(("use_qk_norm", "tie_word_embeddings", "norm_topk_prob"), _TRUTH)
    | dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), _TRUTH)
    | {"n_group": _WHOLE, "hidden_act": _TEXT, "mlp_only_layers": _LIST}
    | {"rope_scaling": _OBJECT, "rope_parameters": _OBJECT}
)
ROPE_KINDS = {"rope_theta": _NUMBER, "partial_rotary_factor": _NUMBER, "rope_type": _TEXT, "type": _TEXT}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# The families whose QK-norm models have a head width of their own, not hidden_size / heads, when none is given.
OWN_HEAD_DIM = ("qwen3", "qwen3_moe")


def model_from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """Our model section for the content of a config.json; ConfigError with every field that does not fit."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        shown = shortened(repr(family))
        raise ConfigError(f"config.json has model_type {shown}; only {', '.join(ARCHITECTURES)} can be imported")
    # Of a field of another type nothing else can be asked.
    if faults := kind_faults(config) or _faults(config, family):
        raise ConfigError.from_faults(faults)
    values: dict[str, Any] = {name: config[name] for name in SAME}
    values |= {
        "head_dim": config.get("head_dim"),
        "rope_theta": _rope_theta(config),
        "qk_norm": family in OWN_HEAD_DIM or bool(config.get("use_qk_norm", False)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "initializer_range": _given(config, "initializer_range", 0.02),
    }
    values |= _feed_forward(config, family)
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        wrong = [
            f"config.json has {_their_name(str(fault['loc'][0]), config, family)} {fault['input']!r}: "
            f"{fault['msg'].removeprefix('Value error, ')}; take the file from its source again"
            for fault in error.errors()
        ]
        raise ConfigError.from_faults(wrong) from error
    if wrong := model_faults(RunConfig(model=model)):
        raise ConfigError.from_faults([f"config.json does not fit itself: {fault}" for fault in wrong])
    return model


def kind_faults(config: Mapping[str, Any]) -> list[str]:
    """Fields of another type than any reader could use, one line each."""
    faults = _kind_faults(config, KINDS, "")
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(name), Mapping):
            faults += _kind_faults(config[name], ROPE_KINDS, f"{name}.")
    return faults


def _kind_faults(values: Mapping[str, Any], kinds: Mapping[str, str], prefix: str) -> list[str]:
    return [
        f"config.json has {prefix}{name} {shortened(repr(values[name]))}, and it must be {kind}; "
        "take the file from its source again"
        for name, kind in kinds.items()
        if values.get(name) is not None and not _is_kind(values[name], kind)
    ]


def _is_kind(value: Any, kind: str) -> bool:
    if kind == _WHOLE:
        return type(value) is int and 0 <= value <= MAX_INTEGER
    if kind == _NUMBER:
        return type(value) in (int, float) and 0 <= value <= MAX_INTEGER
    if kind == _LIST:
        return isinstance(value, list) and all(_is_kind(part, _WHOLE) for part in value)
    return isinstance(value, {_TRUTH: bool, _OBJECT: Mapping, _TEXT: str}[kind])


def _their_name(name: str, config: Mapping[str, Any], family: str) -> str:
    """What config.json calls a field of ours."""
    if name == "num_experts":
        return next((other for other in EXPERTS if config.get(other) is not None), name)
    theirs = {"num_shared_experts": "n_shared_experts", "first_k_dense_layers": "first_k_dense_replace"}
    if family == "mixtral":
        theirs["moe_intermediate_size"] = "intermediate_size"
    return theirs.get(name, name)


def _feed_forward(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    if family in ("llama", "qwen3"):
        return {"intermediate_size": config["intermediate_size"]}
    experts = {
        "num_experts_per_tok": config["num_experts_per_tok"],
        "router_aux_loss_coef": _given(config, "router_aux_loss_coef", 0.001),
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
    experts = {name: config[name] for name in EXPERTS if config.get(name) is not None}
    if family in ROUTERS and len(set(experts.values())) > 1:
        both = " and ".join(f"{name} {number}" for name, number in experts.items())
        faults.append(f"config.json has {both}, which say the same thing; keep the right one")
    if family in ROUTERS and 0 in experts.values():
        faults.append(f"config.json has no experts ({', '.join(experts)} 0), and {family} is made of them")
    if family in ROUTERS and _num_experts(config) is None:
        faults.append("config.json lacks num_experts (or num_local_experts); add it")
    for name, allowed in REQUIRED_VALUES.items():
        if config.get(name) not in allowed:
            faults.append(
                f"config.json has {name} {shortened(repr(config.get(name)))}, which this model cannot compute; use another model"
            )
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    # Qwen3 carries a width and a switch, which is checked above; for Mixtral the width is the switch.
    if family == "mixtral" and window is not None and context is not None and window < context:
        faults.append(f"config.json has sliding_window {window}, which this model cannot compute; use another model")
    rotated = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated != 1 and (family == "glm4_moe" or rotated is not None):
        faults.append(
            f"config.json has partial_rotary_factor {rotated}, and this model rotates the whole head; use another model"
        )
    dense = config.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        faults.append(f"config.json has mlp_only_layers {shortened(repr(dense))}; only the first layers may be dense")
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            faults.append(
                f"config.json has {name} of type {shortened(repr(kind))}, which this model cannot compute; use another model"
            )
    thetas = [rope.get("rope_theta") for rope in (config, config.get("rope_parameters") or {})]
    if thetas == [None, None]:
        faults.append("config.json lacks rope_theta; add it")
    elif None not in thetas and thetas[0] != thetas[1]:
        faults.append(f"config.json has rope_theta {thetas[0]}, and {thetas[1]} in rope_parameters; keep the right one")
    return faults


def _given(config: Mapping[str, Any], name: str, default: float) -> Any:
    return default if config.get(name) is None else config[name]


def _num_experts(config: Mapping[str, Any]) -> Any:
    """Under any name: transformers 5 writes num_local_experts for Qwen3-MoE too."""
    return next((config[name] for name in EXPERTS if config.get(name) is not None), None)


def _rope_theta(config: Mapping[str, Any]) -> Any:
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    return config.get("rope_theta") if theta is None else theta
