"""The peak of a memory plan as formulas with this run's numbers in them.

Every `filled` is arithmetic that gives `num_bytes`; a test evaluates it. Symbols: n elements of the parameters on
this rank, N the same padded to 2 per rank and group, P this rank's share, b bytes of a parameter, g of a gradient,
T tokens of a micro-batch, L layers, d hidden width, H query and K key/value heads of width c, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lumina_ds.config.loss_chunk import loss_chunk_tokens
from lumina_ds.config.schema import RunConfig
from lumina_ds.plan.activations import fused_chunk_tokens, fused_loss_bytes, recomputed_layers
from lumina_ds.plan.memory import PARAMETER_BYTES, MemoryPlan
from lumina_ds.plan.states import ZeroSettings, moment_elements, momentum_bytes, optimizer_groups

_WHY = {
    "gathered parameters": "b x elements gathered at once at ZeRO-3, and 2 x what autocast copies to bf16",
    "activations: feed-forward": "router, expert rows and SwiGLU of every kept layer (lumina_ds/plan/activations.py)",
    "activations: other": "norms, residual stream and the head's input, and one block's gradients in the backward",
    "all-to-all buffers": "send and receive buffers of one exchange of k rows a token",
    "activations: recomputed": "what checkpointing makes anew for one block at a time",
    "step temporaries": "gradient copies that the optimizer makes for the largest group",
    "offloaded states": "states that stay in the same memory on a CPU",
    "CUDA context and NCCL": "allowance, not measured",
}


@dataclass(frozen=True)
class Explanation:
    """One component of the peak phase: its formula, the same with numbers, and what it gives."""

    component: str
    formula: str
    filled: str
    num_bytes: int


def explain(plan: MemoryPlan, config: RunConfig, deepspeed_json: Mapping[str, Any]) -> list[Explanation]:
    """The components of `plan`'s peak phase, largest first; `config` and `deepspeed_json` are what it was made of."""
    known = _formulas(plan, config, deepspeed_json)
    explanations = []
    for component, size in sorted(plan.breakdown.items(), key=lambda item: -item[1]):
        if size:
            formula, filled = known.get(component, (_WHY.get(component, ""), f"{size:,}"))
            explanations.append(Explanation(component, formula, filled, size))
    return explanations


def _formulas(plan: MemoryPlan, config: RunConfig, json: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    b = PARAMETER_BYTES[plan.precision]
    zero = ZeroSettings.from_json(json, b)
    groups = optimizer_groups(config.model, plan.world_size, plan.expert_parallel_size, config.train.optimizer)
    n = sum(group.numel for group in groups)
    padded = sum(group.padded for group in groups)
    share = sum(group.shards if zero.stage == 3 else group.partition for group in groups)
    states = n if zero.stage == 0 else share
    symbol = "n" if zero.stage == 0 else "P"
    known = {
        "master weights": (f"4 {symbol}", f"4 x {states:,}"),
        "moments": (f"8 {symbol}", f"8 x {states:,}"),
        "margin": ("5 % of the rest, for fragmentation", f"{plan.breakdown['margin']:,}"),
        **_activations(plan, config),
    }
    if config.train.optimizer == "muon":
        adam, muon = moment_elements(groups)
        width = momentum_bytes(zero, b)
        known["moments"] = (
            "8 x AdamW's part of P + one momentum, as wide as a gradient, of every Muon matrix that touches P",
            f"8 x {adam:,} + {width} x {muon:,}",
        )
    if zero.stage == 3:
        persistent = plan.breakdown["parameters"] // b - (0 if zero.offload_param != "none" else share)
        partitioned = "" if zero.offload_param != "none" else f"{share:,} + "
        known["parameters"] = ("b (P + those kept whole)", f"{b} x ({partitioned}{persistent:,})")
    else:
        known["parameters"] = ("b n", f"{b} x {n:,}") if zero.stage == 0 else ("b N", f"{b} x {padded:,}")
    known["gradients"] = _gradients(plan, zero, b)
    known["buckets"] = _buckets(plan, zero)
    return known


def _gradients(plan: MemoryPlan, zero: ZeroSettings, b: int) -> tuple[str, str]:
    size, g = plan.breakdown["gradients"], zero.gradient_bytes
    meaning = {
        0: "g n",
        1: "g N until the step, where those that touch this rank's share remain",
        2: "g x every tensor that touches this rank's share",
        3: "g P",
    }[zero.stage]
    return (meaning, f"{g} x {size // g:,}") if size % g == 0 and g == b else (meaning, f"{size:,}")


def _buckets(plan: MemoryPlan, zero: ZeroSettings) -> tuple[str, str]:
    size = plan.breakdown["buckets"]
    buffers = 2 if zero.overlap_comm and zero.stage in (1, 2) else 1
    elements = zero.reduce_bucket_size
    if zero.stage and elements and size % (elements * buffers) == 0:
        width = size // (elements * buffers)
        return "buffers x reduce_bucket_size x bytes an element", f"{buffers} x {elements:,} x {width}"
    return "what one reduction flattens", f"{size:,}"


def _activations(plan: MemoryPlan, config: RunConfig) -> dict[str, tuple[str, str]]:
    model = config.model
    tokens = plan.micro_batch_size * plan.seq_length
    known = {"logits and loss": _loss(plan, config, tokens)}
    layers = model.num_hidden_layers
    if plan.activation_checkpointing in ("full", "attention"):
        layers -= len(recomputed_layers(model, plan.activation_checkpointing, config.train.checkpoint_interval))
    copies = 3 if plan.precision == "mixed_bf16" else 1
    width, head = 4 if plan.precision == "fp32" else 2, model.attention_head_dim
    queries, keys = model.num_attention_heads, model.num_key_value_heads
    filled = (
        f"{tokens:,} x {layers} x ({width} x ({copies} x {model.hidden_size:,} + 3 x {queries} x {head} + 2 x {keys} x {head}) "
        f"+ 4 x {queries}"
    )
    formula = "T L (b (d, thrice under autocast, + 3 H c + 2 K c) + 4 H"
    if model.qk_norm:
        filled += f" + {queries + keys} x (8 x {head} + 4)"
        formula += " + (H + K) (8 c + 4)"
    known["activations: attention"] = (
        formula + ")" + (", of the layers kept" if layers < model.num_hidden_layers else ""),
        filled + ")",
    )
    return known


def _loss(plan: MemoryPlan, config: RunConfig, tokens: int) -> tuple[str, str]:
    model = config.model
    vocabulary, width = model.vocab_size, model.hidden_size
    chunk = loss_chunk_tokens(config.train.loss_chunk_tokens, vocabulary)
    operand = 4 if plan.precision == "fp32" else 2
    if config.train.may_fuse_loss and plan.breakdown["logits and loss"] == fused_loss_bytes(model, tokens, operand):
        rows = fused_chunk_tokens(model, tokens)
        filled = f"{operand} x {rows:,} x {vocabulary:,} + {4 + operand} x {vocabulary:,} x {width:,}"
        return (
            f"b V c + (4 + b) V d + b T d, Liger's loss, c = {rows:,} tokens a chunk",
            f"{filled} + {operand} x {tokens:,} x {width:,}",
        )
    if chunk == 0:
        return "12 V T", f"12 x {vocabulary:,} x {tokens:,}"
    rows, low = min(chunk, tokens), 0 if plan.precision == "fp32" else 2
    residual = 2 if plan.precision in ("bf16", "fp16") else 4
    several = tokens > chunk
    summand = low if several else low or 4
    symbols, parts = ["V c 8"], [f"{rows:,} x {vocabulary:,} x {8 + low}"]
    if rows * vocabulary * 4 < summand * vocabulary * width:
        # The product that makes the weight's gradient needs more than the softmax before it.
        symbols, parts = ["V c 4"], [f"{rows:,} x {vocabulary:,} x {4 + low}"]
        symbols.append("V d")
        parts.append(f"{summand} x {vocabulary:,} x {width:,}")
    if several:
        symbols.append("4 V d")
        parts.append(f"4 x {vocabulary:,} x {width:,}")
    symbols.append("T d")
    parts.append(f"{residual} x {tokens:,} x {width:,}")
    return " + ".join(symbols) + f", c = {rows:,} tokens a chunk", " + ".join(parts)
