"""Formulas of what activations take at one moment of a step, with a run's numbers in them.

Symbols: T tokens of a micro-batch, d hidden width, q = Hc and k = Kc the widths of queries and keys, H query heads and
A heads of both kinds, f feed-forward width, E experts, t of them a token, s shared ones, R rows of the fullest rank's experts, V
vocabulary, b bytes of a matrix product's operand, r of the residual stream, p of the products of experts and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lumina_ds.config.precision import loss_chunk_tokens
from lumina_ds.config.schema import ModelConfig
from lumina_ds.plan.activations import (
    RANDOM_STATE_BYTES,
    ActivationBytes,
    LayerBytes,
    expert_rows,
)
from lumina_ds.plan.formula import Formula, number
from lumina_ds.plan.loss_memory import fused_chunk_tokens, loss_parts, takes_fused_loss
from lumina_ds.plan.peaks import Peak
from lumina_ds.plan.shape import Shape


def activation_formulas(
    model: ModelConfig, shape: Shape, activations: ActivationBytes, moment: Peak, parts: Mapping[str, int]
) -> dict[str, Formula]:
    """By component; `parts` are the moment's bytes, which every formula gives."""
    alive = activations.layers if moment.block is None else activations.layers[: moment.block + 1]
    layer = None if moment.block is None else activations.layers[moment.block]
    return {
        "gathered parameters": _gathered(parts["gathered parameters"], activations, moment),
        "activations: attention": _attention(model, shape, alive),
        "activations: feed-forward": _feed_forward(model, shape, alive, moment),
        "activations: other": _other(model, shape, alive, moment),
        "activations: recomputed": _recomputed(model, shape, layer, moment),
        "activation gradients": _gradients(model, shape, layer, moment),
        "logits and loss": _loss(model, shape, moment),
        "all-to-all buffers": _all_to_all(model, shape, moment),
    }


def _gathered(size: int, activations: ActivationBytes, moment: Peak) -> Formula:
    layers = activations.layers
    if moment.kind in ("experts", "gathering", "decoder end", "loss"):
        cast = sum(layer.attention_copies + layer.dense_copies for layer in layers)
        cast += sum(layer.expert_copies for layer in layers if not layer.feed_forward_anew)
    else:
        left = layers if moment.block is None else layers[: moment.block + 1]
        cast = sum(layer.kept_copies for layer in left)
        cast += layers[moment.block].made_copies if moment.block is not None else 0
    return Formula(
        "2 x elements that autocast has cast to 16 bits + what ZeRO-3 has gathered, its flat buffers included",
        f"2 x {number(cast // 2)} + {number(size - cast)}",
    )


def _attention(model: ModelConfig, shape: Shape, alive: tuple[LayerBytes, ...]) -> Formula:
    queries = model.num_attention_heads * model.attention_head_dim
    keys = model.num_key_value_heads * model.attention_head_dim
    layers = sum(not layer.attention_anew for layer in alive)
    inputs = 3 * shape.b if shape.casts else shape.r
    symbols = "kept blocks x T (input d + b (3 q + 2 k) + 4 H"
    filled = (
        f"{layers} x {number(shape.tokens)} x ({inputs} x {number(model.hidden_size)} + {shape.b} x "
        f"(3 x {number(queries)} + 2 x {number(keys)}) + 4 x {model.num_attention_heads}"
    )
    if model.qk_norm:
        heads = model.num_attention_heads + model.num_key_value_heads
        symbols += " + A (8 c + 4)"
        filled += f" + {heads} x (8 x {model.attention_head_dim} + 4)"
    return Formula(symbols + ")", filled + ")")


def _feed_forward(model: ModelConfig, shape: Shape, alive: tuple[LayerBytes, ...], moment: Peak) -> Formula:
    """Kept blocks of each kind, by what one keeps."""
    numbers = range(len(alive) - (moment.kind in ("attention", "gathering")))
    counts: dict[tuple[bool, bool], int] = {}
    for layer in numbers:
        kind = (model.is_moe_layer(layer), alive[layer].feed_forward_anew)
        counts[kind] = counts.get(kind, 0) + 1
    formulas = [(count, feed_forward_formula(model, shape, *kind)) for kind, count in counts.items()]
    kept = [(count, formula) for count, formula in formulas if formula is not None]
    return Formula(
        " + ".join(f"kept blocks x ({formula.symbols})" for _, formula in kept),
        " + ".join(f"{count} x ({formula.filled})" for count, formula in kept),
    )


def feed_forward_formula(model: ModelConfig, shape: Shape, is_moe: bool, anew: bool) -> Formula | None:
    """What one block keeps, as activations.py counts it; of what is recomputed, where rows go. None for nothing."""
    tokens, b, d = number(shape.tokens), shape.b, number(model.hidden_size)
    local = shape.device == "cpu" and shape.expert_parallel_size == 1
    rows, t = number(expert_rows(model, shape)), model.num_experts_per_tok
    if anew:
        if not is_moe or shape.device != "cpu":
            return None
        return Formula("24 T t", f"24 x {tokens} x {t}") if local else Formula("8 R", f"8 x {rows}")
    if not is_moe:
        inputs = 2 * b if shape.casts else shape.r
        f = number(model.intermediate_size or 0)
        return Formula("T (input d + 4 b f)", f"{tokens} x ({inputs} x {d} + 4 x {b} x {f})")
    experts, f = number(model.num_experts), number(model.moe_intermediate_size or 0)
    shared, filled = "", ""
    if model.num_shared_experts:
        shared, filled = " + 4 b s f", f" + 4 x {b} x {model.num_shared_experts} x {f}"
        if b != 4:
            shared, filled = shared + " + b d", f"{filled} + {b} x {d}"
    if shape.device != "cpu":
        return Formula(
            f"T (4 d + 22 E + b t d{shared}) + R b (d + 4 f)",
            f"{tokens} x (4 x {d} + 22 x {experts} + {b} x {t} x {d}{filled}) + {rows} x {b} x ({d} + 4 x {f})",
        )
    if local:
        return Formula(
            f"T (4 d + 8 E + 16 + (45 + b) t{shared}) + R b (d + 2 f)",
            f"{tokens} x (4 x {d} + 8 x {experts} + 16 + {45 + b} x {t}{filled}) + {rows} x {b} x ({d} + 2 x {f})",
        )
    return Formula(
        f"T (4 d + 8 E + 16 + 41 t + b t d{shared}) + R (b (d + 2 f) + 12 + b)",
        f"{tokens} x (4 x {d} + 8 x {experts} + 16 + 41 x {t} + {b} x {t} x {d}{filled}) + "
        f"{rows} x ({b} x ({d} + 2 x {f}) + {12 + b})",
    )


def _other(model: ModelConfig, shape: Shape, alive: tuple[LayerBytes, ...], moment: Peak) -> Formula:
    """Norms, inputs of recomputed blocks, cosines and sines, and the final norm's output."""
    tokens, d, r = number(shape.tokens), number(model.hidden_size), shape.r
    ends = moment.kind in ("reduction", "end")
    norms = 0 if ends else sum((not layer.attention_anew) + (not layer.feed_forward_anew) for layer in alive)
    norms += moment.kind in ("decoder end", "loss", "head weight", "head input", "final norm")
    if moment.kind == "attention":
        norms -= not alive[-1].feed_forward_anew
    inputs = 0 if ends else sum(layer.attention_anew or layer.feed_forward_anew for layer in alive)
    hidden = moment.kind in ("decoder end", "loss", "reduction", "end")
    symbols, filled = ["8 c T"], [f"8 x {model.attention_head_dim} x {tokens}"]
    if norms:
        symbols.append("norms x T (8 d + 4)")
        filled.append(f"{norms} x {tokens} x (8 x {d} + 4)")
    if inputs:
        symbols.append("recomputed blocks x (r d T + state of the random numbers)")
        filled.append(f"{inputs} x ({r} x {d} x {tokens} + {number(RANDOM_STATE_BYTES)})")
    if hidden:
        symbols.append("r d T")
        filled.append(f"{r} x {d} x {tokens}")
    return Formula(" + ".join(symbols), " + ".join(filled))


def _recomputed(model: ModelConfig, shape: Shape, layer: LayerBytes | None, moment: Peak) -> Formula:
    """Attention, feed-forward and norms of the block at work, less what of its input was kept."""
    if layer is None or moment.block is None:
        return Formula("", "0")
    tokens, d = number(shape.tokens), number(model.hidden_size)
    plain = _without_recomputation(layer)
    symbols, filled = [], []
    if layer.attention_anew:
        formula = _attention(model, shape, (plain,))
        symbols += [formula.symbols.replace("kept blocks x ", "")]
        filled += [formula.filled]
    if moment.kind == "feed-forward":
        made = feed_forward_formula(model, shape, model.is_moe_layer(moment.block), False)
        assert made is not None
        symbols.append(made.symbols)
        filled.append(made.filled)
    norms = layer.attention_anew + (moment.kind == "feed-forward")
    symbols.append("norms x T (8 d + 4)")
    filled.append(f"{norms} x {tokens} x (8 x {d} + 4)")
    text, numbers = " + ".join(symbols), " + ".join(filled)
    if layer.shared_input:
        text, numbers = text + " - 4 d T", f"{numbers} - 4 x {d} x {tokens}"
    kept = feed_forward_formula(model, shape, model.is_moe_layer(moment.block), True)
    if kept is not None and moment.kind == "feed-forward":
        text, numbers = f"{text} - {kept.symbols}", f"{numbers} - {kept.filled}"
    return Formula(text, numbers)


def _without_recomputation(layer: LayerBytes) -> LayerBytes:
    """The same block without recomputation."""
    return replace(layer, attention_anew=False, feed_forward_anew=False)


def _gradients(model: ModelConfig, shape: Shape, layer: LayerBytes | None, moment: Peak) -> Formula:
    tokens, b, r, d = number(shape.tokens), shape.b, shape.r, number(model.hidden_size)
    if moment.kind == "final norm":
        return Formula("16 d T: five fp32 gradients of the norm, less its output", f"16 x {d} x {tokens}")
    if layer is None or moment.block is None:
        return Formula("", "0")
    if moment.kind == "attention":
        head = model.attention_head_dim
        q, k = number(model.num_attention_heads * head), number(model.num_key_value_heads * head)
        return Formula("T (r d + 2 b (q + k) + 8 q)", f"{tokens} x ({r} x {d} + 2 x {b} x ({q} + {k}) + 8 x {q})")
    if not model.is_moe_layer(moment.block):
        f = number(model.intermediate_size or 0)
        return Formula("T (r d + 2 b f)", f"{tokens} x ({r} x {d} + 2 x {b} x {f})")
    held = model.num_experts // shape.expert_parallel_size
    wide = model.moe_intermediate_size or 0
    if shape.device != "cpu":
        width = (model.num_experts_per_tok + model.num_shared_experts) * wide
        return Formula(
            "T (r d + 2 b (t + s) f) + w x one matrix of the experts",
            f"{tokens} x ({r} x {d} + 2 x {b} x {number(width)}) + {shape.w} x {held} x {d} x {number(wide)}",
        )
    rows = number(expert_rows(model, shape))
    first = f"2 x {rows} x {b} x {d} + {b} x 3 x {held} x {d} x {number(wide)}"
    known = 2 * expert_rows(model, shape) * b * model.hidden_size + 3 * b * held * model.hidden_size * wide
    return Formula(
        "2 R b d + b x the experts' weights + T r d, and what the expert at hand needs or leaves (model/experts.py)",
        f"{first} + {number(layer.feed_forward_gradients - known)}",
    )


def _loss(model: ModelConfig, shape: Shape, moment: Peak) -> Formula:
    tokens, d, v = number(shape.tokens), number(model.hidden_size), number(model.vocab_size)
    if moment.kind in ("head weight", "head input"):
        copies = 1 if moment.kind == "head weight" else 2
        return Formula(f"{copies} r d T", f"{copies} x {shape.r} x {d} x {tokens}")
    chunk = loss_chunk_tokens(shape.loss_chunk, model.vocab_size)
    if chunk == 0:
        return Formula("12 V T + r d T", f"12 x {v} x {tokens} + {shape.r} x {d} x {tokens}")
    parts = loss_parts(model, shape, chunk)
    if takes_fused_loss(model, shape, parts):
        return _fused_loss(model, shape)
    rows = min(chunk, shape.tokens)
    symbols, filled = ["2 r d T"], [f"2 x {shape.r} x {d} x {tokens}"]
    if shape.p != shape.r:
        symbols.append("p d c")
        filled.append(f"{shape.p} x {d} x {number(rows)}")
    if parts["weight"]:
        symbols.append("p V d")
        filled.append(f"{shape.p} x {v} x {d}")
    if parts["sum"]:
        symbols.append("4 V d")
        filled.append(f"4 x {v} x {d}")
    highest = parts["chunk"] // model.vocab_size
    symbols.append(
        f"V x (bytes of logits, softmax and gradients a row of c = {number(rows)}, or of the weight's gradient)"
    )
    filled.append(f"{v} x {number(highest)} + {number(parts['chunk'] - highest * model.vocab_size)}")
    return Formula(" + ".join(symbols), " + ".join(filled))


def _fused_loss(model: ModelConfig, shape: Shape) -> Formula:
    tokens, d, v, b = number(shape.tokens), number(model.hidden_size), number(model.vocab_size), shape.b
    symbols, filled = ("(r + b)", f"({shape.r} + {b})") if shape.r != b else ("r", f"{shape.r}")
    cast = (" + b V d", f" + {b} x {v} x {d}") if shape.w != b else ("", "")
    rows = number(fused_chunk_tokens(model, shape.tokens))
    return Formula(
        f"2 {symbols} d T{cast[0]} + (4 + b) V d + b V c, Liger's loss, c = {rows} tokens a chunk",
        f"2 x {filled} x {d} x {tokens}{cast[1]} + {4 + b} x {v} x {d} + {b} x {v} x {rows}",
    )


def _all_to_all(model: ModelConfig, shape: Shape, moment: Peak) -> Formula:
    copies = 3 if moment.kind == "experts" else 1
    rows, d = number(expert_rows(model, shape)), number(model.hidden_size)
    return Formula(f"{copies} R b d", f"{copies} x {rows} x {shape.b} x {d}")
