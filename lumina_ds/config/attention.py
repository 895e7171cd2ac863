"""The attention kernels for packed rows: where each can run, and whether --flash-attention stands for it.

To add one, add an entry to ATTENTION_BACKENDS; `train.attention_backend` then takes its name. The kernels themselves
need torch and stand in model/attention_backends.py, which also chooses among the entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

_MIN_CAPABILITY = (8, 0)
_MAX_FLASH_HEAD_DIM = 256


@dataclass(frozen=True)
class Place:
    """Where a kernel is to train: "cuda" or "cpu", a resolved precision, the width of a head, and the GPU's compute
    capability, which is asked for only when it matters."""

    device: str
    precision: str
    head_dim: int
    capability: Callable[[], tuple[int, int]]


def _nothing(place: Place) -> str | None:
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """`function` is "module:name" of a function (q [T, H, C], k [T, K, C], v [T, K, C], documents) -> [T, H, C].

    `obstacle(place)` says why it cannot train there, or None. The first `is_flash` one without an obstacle is taken for
    rows that gain by it.
    """

    function: str
    obstacle: Callable[[Place], str | None] = _nothing
    is_flash: bool = False

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


def _fused(place: Place) -> str | None:
    if place.device != "cuda":
        return f"it needs a CUDA GPU and this run is on {place.device}"
    if place.precision == "fp32":
        return "its kernels take fp16 or bf16, not fp32"
    if place.capability() < _MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or above"
    if place.head_dim > _MAX_FLASH_HEAD_DIM or place.head_dim % 8:
        return f"its kernels take head widths up to {_MAX_FLASH_HEAD_DIM} that 8 divides, not {place.head_dim}"
    return None


def _flash(place: Place) -> str | None:
    missing = "the package flash-attn is not installed (pip install 'lumina-ds[flash]')"
    return _fused(place) or (missing if find_spec("flash_attn") is None else None)


def _varlen(place: Place) -> str | None:
    if (obstacle := _fused(place)) or find_spec("torch.nn.attention.varlen") is not None:
        return obstacle
    return f"torch {version('torch')} has no torch.nn.attention.varlen"


def _flex(place: Place) -> str | None:
    if place.device != "cuda":
        return "flex_attention has no backward pass on a CPU"
    missing = "it is compiled by Triton, which is not installed (pip install triton)"
    return missing if find_spec("triton") is None else None


_KERNELS = "lumina_ds.model.attention_backends"
ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "flash": AttentionBackend(f"{_KERNELS}:attend_flash", _flash, is_flash=True),
    "varlen": AttentionBackend(f"{_KERNELS}:attend_varlen", _varlen, is_flash=True),
    "flex": AttentionBackend(f"{_KERNELS}:attend_flex", _flex),
    "sdpa": AttentionBackend(f"{_KERNELS}:attend_sdpa"),
    "reference": AttentionBackend(f"{_KERNELS}:attend_reference"),
}
