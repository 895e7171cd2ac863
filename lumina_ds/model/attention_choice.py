"""Which attention backend a run uses, and why: by name, by --flash-attention, or by rule.

The rule: rows above 512 tokens in fp16 or bf16 on a card that has FlashAttention kernels take them, the package
flash-attn before torch's own; everything else takes torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import MachineError

# Below this many tokens a row, the fused kernels gain nothing over scaled_dot_product_attention.
MIN_FLASH_TOKENS = 512
_MIN_CAPABILITY = (8, 0)
_MAX_FLASH_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionChoice:
    """`backend` is a name of attention_backends.BACKENDS; `reason` one sentence for the log."""

    backend: str
    reason: str


def choose_attention(config: RunConfig, device: str, precision: str) -> AttentionChoice:
    """The backend for training on "cuda" or "cpu" in a resolved precision.

    Raises MachineError where a backend that was asked for cannot run here, with what it lacks and what can be used.
    """
    forced, flash = config.train.attention_backend, config.train.flash_attention
    if forced != "auto":
        if obstacle := _obstacle(forced, config, device, precision):
            raise MachineError(
                f"train.attention_backend {forced} is not possible: {obstacle}; use train.attention_backend auto or sdpa"
            )
        return AttentionChoice(forced, f"{forced} as requested")
    if flash == "off":
        return AttentionChoice("sdpa", "sdpa because of --flash-attention off")
    if flash == "auto" and config.seq_length <= MIN_FLASH_TOKENS:
        return AttentionChoice(
            "sdpa", f"sdpa because rows of {config.seq_length} tokens are not above {MIN_FLASH_TOKENS}"
        )
    obstacles = {name: _obstacle(name, config, device, precision) for name in ("flash", "varlen")}
    for name, obstacle in obstacles.items():
        if obstacle is None:
            return AttentionChoice(name, f"{name} because the GPU and {precision} allow it")
    lacking = "; ".join(dict.fromkeys(obstacle for obstacle in obstacles.values() if obstacle))
    if flash == "on":
        raise MachineError(f"--flash-attention on is not possible: {lacking}; use --flash-attention auto or off")
    return AttentionChoice("sdpa", f"sdpa because FlashAttention is not possible: {lacking}")


def _obstacle(name: str, config: RunConfig, device: str, precision: str) -> str | None:
    """Why a backend cannot train here, or None."""
    if name in ("sdpa", "reference"):
        return None
    if device != "cuda":
        if name == "flex":
            return "flex_attention has no backward pass on a CPU"
        return f"it needs a CUDA GPU and this run is on {device}"
    if name == "flex":
        missing = importlib.util.find_spec("triton") is None
        return "it is compiled by Triton, which is not installed (pip install triton)" if missing else None
    if precision == "fp32":
        return "its kernels take fp16 or bf16, not fp32"
    if torch.cuda.get_device_capability() < _MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or above"
    head_dim = config.model.attention_head_dim
    if head_dim > _MAX_FLASH_HEAD_DIM or head_dim % 8:
        return f"its kernels take head widths up to {_MAX_FLASH_HEAD_DIM} that 8 divides, not {head_dim}"
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install 'lumina-ds[flash]')"
    if name == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None
