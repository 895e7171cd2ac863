"""The tiny run that the self-test trains: a shape of its own, or a configuration's, shrunk."""

from __future__ import annotations

from typing import Any

from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.measure.selftest.corpus import SEQ_LENGTH, VOCAB_SIZE

# Large router losses and initial weights: a fault in either shows in a few steps.
_TINY = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": SEQ_LENGTH, "num_experts": 4, "moe_intermediate_size": 24,
    "num_shared_experts": 1, "first_k_dense_layers": 1, "intermediate_size": 40, "qk_norm": True,
    "tie_word_embeddings": True, "initializer_range": 0.1, "router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.01,
}  # fmt: skip
# What decides how a model is computed, and is kept when its size is not.
_KEPT = (
    "num_experts_per_tok", "norm_topk_prob", "scoring_func", "router_aux_loss_coef", "router_aux_loss_scope",
    "router_z_loss_coef", "router_bias_update_rate", "rope_theta", "rms_norm_eps", "qk_norm", "tie_word_embeddings",
)  # fmt: skip
_KEPT_OF_TRAINING = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "lr_scheduler_type")
_MAX_EXPERTS = 16


def tiny_run(num_ranks: int, given: RunConfig | None) -> tuple[dict[str, Any], list[str]]:
    """The configuration's values, and what of `given` was set aside because it makes layouts differ by design."""
    # A multiple of the ranks, so that they can share the experts.
    model: dict[str, Any] = {**_TINY, "num_experts": -(-4 // num_ranks) * num_ranks}
    train: dict[str, Any] = {"learning_rate": 3e-3, "warmup_ratio": 0.1}
    notes: list[str] = []
    if given is not None:
        model |= _shrunk(given.model)
        train |= {name: getattr(given.train, name) for name in _KEPT_OF_TRAINING}
        notes = _set_aside(given)
        if model["router_aux_loss_scope"] == "micro_batch":
            model["router_aux_loss_scope"] = "global_batch"
    return {"model": model, "train": train}, notes


def _shrunk(model: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(model, name) for name in _KEPT}
    queries_per_key = min(4, model.num_attention_heads // model.num_key_value_heads)
    values["num_key_value_heads"] = {1: 4, 2: 2, 3: 2, 4: 1}[queries_per_key]
    values["num_experts"] = min(model.num_experts, _MAX_EXPERTS)
    values["num_experts_per_tok"] = min(model.num_experts_per_tok, max(1, values["num_experts"] // 2))
    values["num_shared_experts"] = min(1, model.num_shared_experts)
    values["first_k_dense_layers"] = min(1, model.first_k_dense_layers)
    if model.router_bias_update_rate and model.router_aux_loss_scope != "sequence":
        values["router_aux_loss_coef"] = 0.0
    return values


def _set_aside(given: RunConfig) -> list[str]:
    """Settings that mean another result under another layout, or that plain PyTorch has no counterpart for."""
    model, notes = given.model, []
    if model.overflow_policy != "dropless":
        notes.append(f"overflow_policy {model.overflow_policy}: capacity is counted per micro-batch; dropless here")
    if model.router_aux_loss_scope == "micro_batch" and model.router_aux_loss_coef:
        notes.append("router_aux_loss_scope micro_batch depends on the micro-batch; global_batch here")
    notes += [
        f"{name}: rows draw it, and conversations stand in other rows when unpacked; none here"
        for name in ("router_jitter_noise", "expert_dropout")
        if getattr(model, name)
    ]
    if given.train.optimizer != "adamw":
        notes.append(f"optimizer {given.train.optimizer}: adamw here")
    return notes
