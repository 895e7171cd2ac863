"""Grouped-query causal attention over packed rows, in which documents never see each other.

The kernels for packed rows stand in attention_backends.py; rows of one document each, and generation with a
cache, take torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.config.attention import ATTENTION_BACKENDS
from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.feed_forward import RMSNorm
from lumina_ds.model.kernels import PLAIN, Kernels


class Attention(nn.Module):
    """Projections, optional QK-norm, rotary embedding, and causal attention within each document."""

    def __init__(self, config: ModelConfig, backend: str = "sdpa", kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self.rotate = kernels.rope
        width, head_dim = config.hidden_size, config.attention_head_dim
        self.head_dim = head_dim
        self.num_key_value_heads = config.num_key_value_heads
        # Sequence parallelism puts an exchange between ranks around it.
        self.attend: Callable[..., Tensor] = partial(attend_packed_rows, ATTENTION_BACKENDS[backend].load())
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=False)
        self.q_norm = _head_norm(config, kernels)
        self.k_norm = _head_norm(config, kernels)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: DocumentLayout | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, S, D] to [B, S, D]. Without `documents` every row is one document; `cache` holds its earlier tokens."""
        rows, length, _ = x_BSD.shape
        heads = (rows, length, -1, self.head_dim)
        q_BSHC, k_BSKC = self.rotate(
            self.q_norm(self.q_proj(x_BSD).view(heads)), self.k_norm(self.k_proj(x_BSD).view(heads)), *rotary
        )
        v_BSKC = self.v_proj(x_BSD).view(heads)
        if documents is not None:
            out = self.attend(q_BSHC, k_BSKC, v_BSKC, documents=documents)
        else:
            out = attend_rows(q_BSHC, k_BSKC, v_BSKC, cache)
        return self.o_proj(out.reshape(rows, length, -1))


class LayerCache:
    """Keys and values [B, K, length, C] of the tokens that generation has read, in one layer.

    They stand in buffers of `capacity` tokens that are filled in place.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' [B, K, S, C] and return all keys and values so far."""
        end = self.length + keys.shape[2]
        assert end <= self.capacity, "generation stops at the context length before the cache is full"
        if self._keys is None or self._values is None:
            shape = (keys.shape[0], keys.shape[1], self.capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def _head_norm(config: ModelConfig, kernels: Kernels) -> nn.Module:
    if not config.qk_norm:
        return nn.Identity()
    return RMSNorm(config.attention_head_dim, config.rms_norm_eps, kernels.rms_norm)


def attend_packed_rows(
    backend: Callable[..., Tensor], q_BSHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, documents: DocumentLayout
) -> Tensor:
    """Causal attention within each document of packed rows, by one of ATTENTION_BACKENDS; [B, S, H, C]."""
    out_THC = backend(q_BSHC.flatten(0, 1), k_BSKC.flatten(0, 1), v_BSKC.flatten(0, 1), documents)
    return out_THC.view(q_BSHC.shape)


def attend_rows(q_BSHC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, cache: LayerCache | None = None) -> Tensor:
    """Causal attention where each row is one document, continuing after the cache's tokens if there are any."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHC, k_BSKC, v_BSKC))
    past = 0
    if cache is not None:
        past = cache.length
        k, v = cache.append(k, v)
    if past == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        # Query i stands at position past + i and sees the keys up to itself.
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2)
