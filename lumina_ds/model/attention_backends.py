"""Causal attention within each document of flattened packed rows, by several kernels with one signature.

A backend is a function (q [T, H, C], k [T, K, C], v [T, K, C], documents) -> [T, H, C]; config/attention.py names them
and says where each can run, and `choose_attention` takes one for a run. `attend_reference` builds the whole mask and is
the oracle of the others.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_ds.config.attention import ATTENTION_BACKENDS, Place
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import MachineError

# Below this many tokens a row, the fused kernels gain nothing over scaled_dot_product_attention.
MIN_FLASH_TOKENS = 512


@dataclass(frozen=True)
class DocumentLayout:
    """Where documents begin and end in B rows flattened to B*S tokens.

    `lengths` stands on the host so that no backend has to wait for the device; they sum to B*S, and
    a row's padding is a document of its own. `offsets` is their running sum, int32 [N+1].
    """

    lengths: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def from_lengths(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> DocumentLayout:
        offsets = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        return cls(lengths, offsets.to(device, non_blocking=True))


@dataclass(frozen=True)
class AttentionChoice:
    """`backend` is a name of ATTENTION_BACKENDS; `reason` one sentence for the log."""

    backend: str
    reason: str


def choose_attention(config: RunConfig, device: str, precision: str) -> AttentionChoice:
    """The backend for training on "cuda" or "cpu" in a resolved precision: by name, by --flash-attention, or by rule.

    The rule: rows above 512 tokens in fp16 or bf16 on a card that has FlashAttention kernels take them, the package
    flash-attn before torch's own; everything else takes torch's scaled_dot_product_attention.
    Raises MachineError where a backend that was asked for cannot run here, with what it lacks and what can be used.
    """
    forced, flash = config.train.attention_backend, config.train.flash_attention
    place = Place(device, precision, config.model.attention_head_dim, torch.cuda.get_device_capability)
    if forced != "auto":
        if obstacle := ATTENTION_BACKENDS[forced].obstacle(place):
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
    obstacles = {name: each.obstacle(place) for name, each in ATTENTION_BACKENDS.items() if each.is_flash}
    for name, obstacle in obstacles.items():
        if obstacle is None:
            return AttentionChoice(name, f"{name} because the GPU and {precision} allow it")
    lacking = "; ".join(dict.fromkeys(obstacle for obstacle in obstacles.values() if obstacle))
    if flash == "on":
        raise MachineError(f"--flash-attention on is not possible: {lacking}; use --flash-attention auto or off")
    return AttentionChoice("sdpa", f"sdpa because FlashAttention is not possible: {lacking}")


def attend_reference(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, documents: DocumentLayout) -> Tensor:
    """Softmax over an explicit [T, T] mask in fp32: slow, obvious, the oracle of the other backends."""
    document_T = _document_of_token(documents.lengths, q_THC.device)
    visible_TT = (document_T[:, None] == document_T[None, :]).tril()
    k_THC, v_THC = (x.float() for x in _repeat_heads(q_THC, k_TKC, v_TKC))
    scores_HTT = torch.einsum("thc,shc->hts", q_THC.float(), k_THC) / q_THC.shape[-1] ** 0.5
    weights_HTT = scores_HTT.masked_fill(~visible_TT, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shc->thc", weights_HTT, v_THC).to(q_THC.dtype)


def attend_sdpa(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, documents: DocumentLayout) -> Tensor:
    """One fused call per document.

    On a CPU 2 to 20 times faster than one call with a boolean mask, at any number of documents of eight tokens
    or more (tests/benchmarks/README.md), so there is no other path for packed rows.
    """
    lengths = list(documents.lengths)
    parts = []
    for document in zip(*(x.split(lengths) for x in (q_THC, k_TKC, v_TKC)), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in document)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def attend_flash(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, documents: DocumentLayout) -> Tensor:
    """flash-attn's variable-length kernel (Dao, arXiv 2307.08691); needs a CUDA card and fp16 or bf16."""
    from flash_attn import flash_attn_varlen_func

    longest = max(documents.lengths)
    offsets = documents.offsets
    return flash_attn_varlen_func(q_THC, k_TKC, v_TKC, offsets, offsets, longest, longest, causal=True)


def attend_varlen(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, documents: DocumentLayout) -> Tensor:
    """The FlashAttention kernel that ships with torch; needs a CUDA card and fp16 or bf16, and no further package."""
    from torch.nn.attention.varlen import varlen_attn

    options = varlen_options()
    if "enable_gqa" not in options:
        k_TKC, v_TKC = _repeat_heads(q_THC, k_TKC, v_TKC)
    longest, offsets = max(documents.lengths), documents.offsets
    return varlen_attn(q_THC, k_TKC, v_TKC, offsets, offsets, longest, longest, **options)  # type: ignore[return-value]


@lru_cache(maxsize=1)
def varlen_options() -> dict[str, Any]:
    """The keyword arguments that make varlen_attn causal and grouped, as this torch spells them.

    Early versions took `is_causal`; a later one replaced it by a window, and another learnt to share key heads.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


def attend_flex(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, documents: DocumentLayout) -> Tensor:
    """flex_attention with a block mask of the documents: compiled on a GPU; on a CPU eager, and forward only."""
    device = q_THC.device
    mask = _document_blocks(documents.lengths, device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THC, k_TKC, v_TKC))
    with warnings.catch_warnings():
        # That it is slow without a compiler is why nothing but a test or a forced choice gets here on a CPU.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = _flex_kernel(device.type == "cuda")(q, k, v, block_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _document_of_token(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Number of the document that each of the T tokens belongs to."""
    lengths_N = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths_N, output_size=sum(lengths))


def _repeat_heads(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
    groups = q_THC.shape[1] // k_TKC.shape[1]
    return k_TKC.repeat_interleave(groups, dim=1), v_TKC.repeat_interleave(groups, dim=1)


@lru_cache(maxsize=1)
def _flex_kernel(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # The number of tokens is that of the micro-batch, always the same, so one compilation serves the run.
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention  # type: ignore[return-value]


@lru_cache(maxsize=2)
def _document_blocks(lengths: tuple[int, ...], device: torch.device) -> Any:
    """The block mask of one micro-batch, which every layer and the recomputation of checkpointing share."""
    from torch.nn.attention.flex_attention import create_block_mask

    document_T = _document_of_token(lengths, device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_T[query] == document_T[key])

    return create_block_mask(visible, None, None, len(document_T), len(document_T), device=device)
