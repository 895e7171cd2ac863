"""Which fused kernels a run computes with, and why: by name, or all that can run here and compute what ours do.

Each is run beside plain PyTorch first, forward and backward, on the run's device in the run's types. The shapes are
those of the run, where a kernel's blocks depend on them, with a few rows.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from lumina_ds.config.precision import choose_compile
from lumina_ds.config.schema import FusedKernel, ModelConfig, RunConfig
from lumina_ds.errors import MachineError
from lumina_ds.model import fused_kernels
from lumina_ds.model.kernels import PLAIN, Kernels
from lumina_ds.model.rope import rotary_tables

_LIGER = {
    "rms_norm": fused_kernels.liger_rms_norm,
    "rope": fused_kernels.liger_rope,
    "swiglu": fused_kernels.liger_swiglu,
    "cross_entropy": fused_kernels.liger_cross_entropy,
}

# Relative to the norm of what is compared. Two roundings to the type differ by a third of this; a wrong formula by far
# more.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (inputs, weights): under autocast norms see the fp32 stream and bf16 projections, with fp32 weights.
_TYPES = {
    "fp32": [(torch.float32, torch.float32)],
    "fp16": [(torch.float16, torch.float16)],
    "bf16": [(torch.bfloat16, torch.bfloat16)],
    "mixed_bf16": [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
}
_ROWS, _TOKENS = 2, 24
# The product with the vocabulary is torch's own; wide enough for Liger's loop over blocks of 32,768 ids.
_MAX_VOCABULARY, _MAX_WIDTH = 1 << 16, 256

Function = Callable[..., Tensor | tuple[Tensor, ...]]
# Plain and fused function, the inputs that get gradients, and the other arguments.
Case = tuple[Function, Function, Sequence[Tensor], Sequence[object]]


@dataclass(frozen=True)
class KernelChoice:
    """`names` are the fused kernels of a run, `kernels` what its model computes with, `reason` a sentence for the log.

    `combine` is no part of the model: engine/deepspeed/expert_parallel.py sets it in DeepSpeed's layers.
    """

    names: tuple[str, ...]
    kernels: Kernels
    reason: str


def choose_kernels(config: RunConfig, device: str, precision: str, compares: bool = True) -> KernelChoice:
    """The fused kernels for training on "cuda" or "cpu" in a resolved precision.

    `compares`: each is run beside ours on the device first (check_kernel), a few seconds of compilation. Raises
    MachineError where one that was asked for cannot run or computes something else, with the difference.
    """
    asked = config.train.fused_kernels
    if asked == "off":
        return KernelChoice((), PLAIN, "none, because of train.fused_kernels off")
    if asked == "auto" and device == "cpu":
        return KernelChoice((), PLAIN, "none, because they are for CUDA GPUs")
    if asked == "auto" and choose_compile(config, device)[0]:
        return KernelChoice((), PLAIN, "none, because torch.compile fuses by itself")
    names = [name for name in get_args(FusedKernel) if asked in ("auto", "on") or name in asked]
    used = [name for name in names if _has_use(name, config)]
    obstacles = {name: _obstacle(name, device) for name in used}
    if compares:
        runnable = [name for name in used if obstacles[name] is None]
        obstacles |= {name: check_kernel(name, config.model, precision, torch.device(device)) for name in runnable}
    lacking = {name: obstacle for name, obstacle in obstacles.items() if obstacle is not None}
    if asked != "auto" and lacking:
        [(name, obstacle), *_] = lacking.items()
        raise MachineError(
            f"the fused kernel {name} is not possible: {obstacle}; use train.fused_kernels auto, off, or others"
        )
    chosen = tuple(name for name in used if name not in lacking)
    kernels = replace(PLAIN, **{name: _LIGER[name] for name in chosen if name in _LIGER})
    return KernelChoice(chosen, kernels, _reason(chosen, lacking, compares))


def _reason(chosen: tuple[str, ...], lacking: dict[str, str], compared: bool) -> str:
    by_obstacle: dict[str, list[str]] = {}
    for name, obstacle in lacking.items():
        by_obstacle.setdefault(obstacle, []).append(name)
    plain = [f"{', '.join(names)} plain: {obstacle}" for obstacle, names in by_obstacle.items()]
    if not chosen:
        return "; ".join(["none", *plain])
    state = "which compute here what plain PyTorch does" if compared else "if they prove equal to ours at the start"
    return "; ".join([f"{', '.join(chosen)}, {state}", *plain])


def _has_use(name: str, config: RunConfig) -> bool:
    """Whether the model has what a kernel computes. DeepSpeed's experts have a fused SwiGLU of their own."""
    model = config.model
    has_dense = not all(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))
    if name == "cross_entropy":
        # Liger's loss does not tell the sources of a mixture apart.
        return config.train.may_fuse_loss and not config.data.sources
    return {"swiglu": has_dense or model.num_shared_experts > 0, "combine": model.num_experts > 0}.get(name, True)


def _obstacle(name: str, device: str) -> str | None:
    """Why a kernel cannot run here, or None."""
    if device != "cuda" and (name == "combine" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"it needs a CUDA GPU and this run is on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if name in _LIGER and importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'lumina-ds[fused]')"
    return None


def check_kernel(name: str, model: ModelConfig, precision: str, device: torch.device) -> str | None:
    """What is wrong with a fused kernel here, with the difference, or None; `precision` is a resolved one.

    Whatever a kernel raises is an answer too: the libraries promise no kind of error for a card that they do not know.
    """
    for dtype, weight_dtype in _TYPES[precision]:
        try:
            difference = max(_differences(case) for case in _cases(name, model, dtype, weight_dtype, device))
        except Exception as error:
            return f"it failed in {dtype}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not difference <= TOLERANCES[dtype]:
            return f"it differs from plain PyTorch by {difference:.1e} in {dtype}, above {TOLERANCES[dtype]:.0e}"
    return None


def _differences(case: Case) -> float:
    """The largest relative difference of outputs and gradients between a case's two functions."""
    plain, fused, inputs, others = case
    found, expected = _outputs_and_gradients(fused, inputs, others), _outputs_and_gradients(plain, inputs, others)
    differences = []
    for ours, theirs in zip(expected, found, strict=True):
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return float("inf")
        ours, theirs = ours.double(), theirs.double()
        differences.append(float((ours - theirs).norm() / ours.norm()))
    return max(differences)


def _outputs_and_gradients(function: Function, inputs: Sequence[Tensor], others: Sequence[object]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    # Some kernels write into their inputs, which leaves may not be.
    outputs = function(*(leaf.clone() for leaf in leaves), *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]
    results = [output.detach().clone() for output in outputs]
    torch.autograd.backward(outputs, upstream)
    return results + [leaf.grad for leaf in leaves if leaf.grad is not None]


def _cases(
    name: str, model: ModelConfig, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> list[Case]:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if name == "rms_norm":
        widths = [model.hidden_size] + [model.attention_head_dim] * model.qk_norm
        inputs = [(drawn(_ROWS, _TOKENS, width), drawn(width, dtype=weight_dtype)) for width in widths]
        return [(PLAIN.rms_norm, fused_kernels.liger_rms_norm, pair, (model.rms_norm_eps,)) for pair in inputs]
    if name == "rope":
        positions = torch.arange(_TOKENS, device=device).expand(_ROWS, _TOKENS)
        tables = rotary_tables(positions, model.attention_head_dim, model.rope_theta)
        heads = (model.num_attention_heads, model.num_key_value_heads)
        pair = [drawn(_ROWS, _TOKENS, count, model.attention_head_dim) for count in heads]
        return [(PLAIN.rope, fused_kernels.liger_rope, pair, tables)]
    if name == "swiglu":
        width = model.intermediate_size or model.num_shared_experts * (model.moe_intermediate_size or 0)
        return [(PLAIN.swiglu, fused_kernels.liger_swiglu, [drawn(_ROWS, _TOKENS, width) for _ in range(2)], ())]
    if name == "cross_entropy":
        vocabulary, width = min(model.vocab_size, _MAX_VOCABULARY), min(model.hidden_size, _MAX_WIDTH)
        labels = torch.randint(vocabulary, (_ROWS * _TOKENS,), generator=generator, device=device)
        hidden, weight = drawn(_ROWS * _TOKENS, width), drawn(vocabulary, width) / 16
        # Under autocast both are rounded to the type of the product first, by either function.
        return [(PLAIN.cross_entropy, fused_kernels.liger_cross_entropy, [hidden, weight], (labels, _TOKENS))]
    assert name == "combine"
    return [_combine_case(model, drawn, generator)]


def _combine_case(model: ModelConfig, drawn: Callable[..., Tensor], generator: torch.Generator) -> Case:
    """DeepSpeed's weighted sum of each token's experts (module_inject/auto_ep_layer.py), plain and fused."""
    from deepspeed.module_inject.auto_ep_layer import combine_from_routed
    from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore

    tokens, top_k = _ROWS * _TOKENS, model.num_experts_per_tok
    rows = drawn(tokens * top_k, model.hidden_size)
    scores = drawn(tokens, top_k, dtype=torch.float32).softmax(-1)
    order = torch.randperm(tokens * top_k, generator=generator, device=rows.device)
    shape = (_ROWS, _TOKENS, model.hidden_size)

    def plain(rows: Tensor, scores: Tensor) -> Tensor:
        return combine_from_routed(rows, scores, order, top_k, "post", "weighted_sum", shape)

    def fused(rows: Tensor, scores: Tensor) -> Tensor:
        return fused_weighted_restore(rows, scores, order, top_k, shape)

    return plain, fused, [rows, scores], ()
